"""What a run writes down: one JSON object a line, and the same numbers for TensorBoard."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from a3_jax.paths import as_path, write_text


class JsonLines:
    """A file of JSON objects, one a line, each with the step it belongs to.

    A row is on disk when `append` returns; a reader of a running job never sees half a row for long.
    """

    def __init__(self, path):
        self.path = as_path(path)
        self._file = self.path.open("a")

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_without_nan(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_back(path, step: int) -> None:
    """Drops the rows of steps after `step`, and a torn last line: a resumed run writes them again.

    One row a step stays one row a step after any number of interruptions.
    """
    path = as_path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", math.inf) <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class TensorBoard:
    """Scalars for TensorBoard through clu; where that can't be had, one warning and nothing else."""

    def __init__(self, directory):
        self._writer = None
        try:
            from clu import metric_writers  # brings TensorFlow with it
        except ImportError as error:
            print(f"warning: no TensorBoard summaries: {error}", file=sys.stderr)
        else:
            self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write_scalars(step, dict(scalars))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Profiler:
    """Profiles of chosen steps, for TensorBoard's or XProf's trace viewer and Perfetto.

    Args:
      directory: where the trace goes.
      steps: first and last step, counted from 1; () for none.
      note: shows a line to whoever watches.
    """

    def __init__(self, directory, steps: Sequence[int], note: Callable[[str], None]):
        self._directory, self._note, self._active = directory, note, False
        self._first, self._last = steps or (math.inf, -math.inf)

    def start_before(self, step: int) -> None:
        """To be called before this step is dispatched; a resumed run may begin inside the range."""
        if not self._active and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def ends_with(self, step: int) -> bool:
        """Whether this is the last step of the profile, so that it must have ended before `stop`."""
        return self._active and step == self._last

    def stop(self) -> None:
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
            self._note(f"profile: {self._directory}")

    close = stop  # a run that fails still leaves what was traced


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numeric entries of a row, but its step."""
    return {
        prefix + name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _without_nan(row):
    """JSON has no NaN and no infinity: null says that there is no number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
