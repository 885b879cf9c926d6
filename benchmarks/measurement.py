"""Calls timed in turn, the rows they make, and rows as JSON or as a table."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.settings import thread_count

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers")


class MeasurementError(Exception):
    """A benchmark that cannot be finished; its text is one line."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: the measurements of a metric, in a unit, and the setting they were made on.

    The metric of a ratio says which way is better, `..._speedup` or `A_over_B`; its measurements are those of
    neighbours in time.
    """

    metric: str
    unit: str
    setting: Mapping[str, Any]
    repeats: Sequence[float]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "value": statistics.median(self.repeats)}


def note(text: str) -> None:
    """Prints progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int, label: str, warm_ups: int = 2):
    """Returns name -> seconds of each call, taken in turn: A, B, ..., A, B, ...

    Args:
      calls: name -> a call that returns when its work is done.
      repeats: calls of each that count.
      label: start of the progress lines.
      warm_ups: rounds before them that don't count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warm_ups, repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        if number >= 0:
            times = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items())
            note(f"{label}: {number + 1} of {repeats}: {times}")
    return {name: times[warm_ups:] for name, times in seconds.items()}


def ratio(metric: str, above: Iterable[float], below: Iterable[float], setting: Mapping[str, Any]) -> Row:
    """Returns the row of above / below, pair by pair."""
    return Row(metric, "ratio", setting, [a / b for a, b in zip(above, below, strict=True)])


def last_line(text: str) -> str:
    """Returns the last line of what a process that failed has printed."""
    return (text.strip().splitlines() or [""])[-1]


def versions() -> dict[str, Any]:
    """Returns what the figures depend on: packages, the device and the cores in use."""
    import jax

    names = [platform.processor() or platform.machine()]
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")] or names
    found = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), **found, "device": jax.devices()[0].device_kind,
            "processor": names[0], "cpu_count": os.cpu_count(), "threads": thread_count()}  # fmt: skip


def to_json(name: str, rows: Sequence[Row]) -> str:
    """Returns the object of `a3 bench NAME --json`."""
    result = {"bench": name, "rows": [row.to_dict() for row in rows], "versions": versions()}
    return json.dumps(result, indent=2)


def show(name: str, rows: Sequence[Row]) -> None:
    """Prints a table: what differs between rows in columns, what they share below."""
    scales = {"bytes": (2**20, ",.1f", "MiB"), "FLOPs": (1e9, ",.1f", "GFLOPs"),
              "tokens/s": (1, ",.0f", "tokens/s"), "s": (1, ".4g", "s")}  # fmt: skip
    keys = list(dict.fromkeys(key for row in rows for key in row.setting))
    shared = [key for key in keys if len({str(row.setting.get(key)) for row in rows}) == 1]
    varying = [key for key in keys if key not in shared]
    table = [["metric", *varying, "minimum", "median", "maximum"]]
    for row in rows:
        scale, form, unit = scales.get(row.unit, (1, ".4g", ""))
        figures = min(row.repeats), statistics.median(row.repeats), max(row.repeats)
        cells = [f"{figure / scale:{form}} {unit}".strip() for figure in figures]
        table.append([row.metric, *(str(row.setting.get(key, "")) for key in varying), *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"a3 bench {name}")
    for line in table:
        metric, *cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([metric.strip().ljust(widths[0]), *cells]))
    print(", ".join(f"{key} {rows[0].setting[key]}" for key in shared))
    print(", ".join(f"{key} {value}" for key, value in versions().items()))
