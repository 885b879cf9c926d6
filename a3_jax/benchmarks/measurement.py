"""Repeats in turn, the rows they make, and the exponent of a power law."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class MeasurementError(Exception):
    """A benchmark that can't be finished; its text is one line."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
      metric: its name; that of a ratio says which way is better: `..._speedup` or `A_over_B`.
      unit: "s", "bytes", "tokens/s", "ratio" or "exponent".
      setting: what it was measured on.
      repeats: the measurements; of a ratio, those of neighbours in time.
    """

    metric: str
    unit: str
    setting: Mapping[str, Any]
    repeats: Sequence[float]

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": statistics.median(self.repeats), "unit": self.unit,
                "setting": dict(self.setting), "repeats": list(self.repeats)}  # fmt: skip


def note(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def alternate(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, label: str, warm_ups: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn: A, B, ..., A, B, ...

    Args:
      contenders: name -> a call that returns when its work is done.
      repeats: calls of each that count.
      label: what the progress lines say.
      warm_ups: rounds before them that don't count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_ups, repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(elapsed)
        if number >= 0:
            times = ", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items())
            note(f"{label}: {number + 1} of {repeats}: {times}")
    return seconds


def ratio(metric: str, above: Sequence[float], below: Sequence[float], setting: Mapping[str, Any]) -> Row:
    """The row of above / below, pair by pair."""
    return Row(metric, "ratio", setting, [a / b for a, b in zip(above, below, strict=True)])


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of values ~ sizes^p: the slope of the least-squares line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
