"""Published figures (`paper_tables.json`), each with where it is known from and how surely."""

import dataclasses
import functools
import importlib.resources
import json

SUSPECT, COPIED = "suspect", "copied"


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of a table.

    Attributes:
      table, model, metric: its place; metrics as in `tasks.Task.cells`.
      value, unit: as printed; percent are points.
      source: key of `sources`. status: key of `statuses`.
      note: what is odd about it; "" for nothing.
    """

    table: str
    model: str
    metric: str
    value: float
    unit: str
    source: str
    status: str
    note: str = ""


@functools.cache
def _file() -> dict:
    text = importlib.resources.files("a3_jax.evaluation").joinpath("paper_tables.json")
    return json.loads(text.read_text(encoding="utf-8"))


def sources() -> dict[str, str]:
    """What the sources are."""
    return dict(_file()["sources"])


def statuses() -> dict[str, str]:
    """What it means that a figure is "read", "quoted", "copied" and so on."""
    return dict(_file()["statuses"])


@functools.cache
def published_figures() -> tuple[Published, ...]:
    """All of them, in the order of the tables."""
    return tuple(Published(**entry) for entry in _file()["entries"])


def published(table: str) -> dict[tuple[str, str], Published]:
    """The figures of a table by (model, metric)."""
    return {(each.model, each.metric): each for each in published_figures() if each.table == table}
