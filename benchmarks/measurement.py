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
    """A benchmark that cannot be finished: `what`, and the last line of what a process has printed."""

    def __init__(self, what: str, printed: str = ""):
        super().__init__(" ".join([what, *printed.strip().splitlines()[-1:]]))


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of a metric. A ratio's says which way is better: `..._speedup` or `A_over_B`."""

    metric: str
    unit: str
    setting: Mapping[str, Any]
    repeats: Sequence[float]


def note(text: str) -> None:
    """Prints progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int, label: str, warm_ups: int = 2):
    """Returns name -> seconds of each call that counts, taken in turn: A, B, ..., A, B, ..."""
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
    found = [{**dataclasses.asdict(row), "value": statistics.median(row.repeats)} for row in rows]
    return json.dumps({"bench": name, "rows": found, "versions": versions()}, indent=2)


def show(name: str, rows: Sequence[Row]) -> None:
    """Prints a line per row: its figures, and what differs between rows; below, what they share."""
    scales = {"bytes": (2**20, ",.1f", "MiB"), "FLOPs": (1e9, ",.1f", "GFLOPs"), "tokens/s": (1, ",.0f", "")}
    settings = [{key: str(value) for key, value in row.setting.items()} for row in rows]
    shared = dict(set.intersection(*(set(setting.items()) for setting in settings)))
    width = max(len(row.metric) for row in rows)
    print(f"{f'a3 bench {name}':<{width}} {'minimum':>13} {'median':>13} {'maximum':>13}")
    for row, setting in zip(rows, settings, strict=True):
        scale, form, unit = scales.get(row.unit, (1, ".4g", ""))
        figures = min(row.repeats), statistics.median(row.repeats), max(row.repeats)
        cells = " ".join(f"{figure / scale:{form}}".rjust(13) for figure in figures)
        own = ", ".join(f"{key} {value}" for key, value in setting.items() if key not in shared)
        print(f"{row.metric:<{width}} {cells} {unit or row.unit:<8} {own}")
    print(", ".join(f"{key} {settings[0][key]}" for key in settings[0] if key in shared))
    print(", ".join(f"{key} {value}" for key, value in versions().items()))
