"""Rows as JSON for machines, as a table for people."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from a3_jax.benchmarks.measurement import Row
from a3_jax.benchmarks.settings import thread_count

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers")
_WIDTH = 150  # of a table that goes to a file


def versions() -> dict[str, Any]:
    """What the figures depend on: packages, the device and the cores in use."""
    import jax

    found = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    return {
        "python": platform.python_version(),
        **found,
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": thread_count(),
    }


def to_json(name: str, rows: Sequence[Row]) -> str:
    """The object of `a3 bench NAME --json`."""
    return json.dumps(
        {"bench": name, "rows": [row.to_dict() for row in rows], "versions": versions()}, indent=2
    )


def show(name: str, rows: Sequence[Row]) -> None:
    """Prints a table: what differs between rows in columns, what they share below."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    settings = [row.setting for row in rows]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    shared = {key for key in keys if len({str(setting.get(key)) for setting in settings}) == 1}
    varying = [key for key in keys if key not in shared]
    common = ", ".join(f"{key} {settings[0][key]}" for key in keys if key in shared)
    machine = ", ".join(f"{key} {value}" for key, value in versions().items())
    table = Table(title=f"a3 bench {name}", caption=f"{common}\n{machine}", title_justify="left",
                  caption_justify="left")  # fmt: skip
    table.add_column("metric", no_wrap=True)
    for heading in (*varying, "minimum", "median", "maximum"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (min(row.repeats), row.to_dict()["value"], max(row.repeats))
        places = [str(row.setting.get(key, "")) for key in varying]
        table.add_row(row.metric, *places, *(_in_words(figure, row.unit) for figure in figures))
    console.print(table)


def _in_words(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    if unit == "FLOPs":
        return f"{value / 1e9:,.1f} GFLOPs"
    if unit == "tokens/s":
        return f"{value:,.0f} tokens/s"
    if unit == "s":
        return f"{value:.4g} s"
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}"


def _processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
