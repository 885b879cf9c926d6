"""What a run writes down: one JSON object a line, and the same numbers for TensorBoard."""

import contextlib
import json
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from a3_jax.errors import InputError
from a3_jax.paths import as_path, write_text


class JsonLines:
    """A file of JSON objects, one a line.

    A row is on disk when `append` returns; a reader of a running job never sees half a row for long. A
    file that can't be written costs one warning and its rows, not the run. Threads may share it.
    """

    def __init__(self, path, writes: bool = True):
        """`writes` is false in all processes but the first: they write nothing."""
        self.path, self._file, self._lock = as_path(path), None, threading.Lock()
        if writes:
            self._file = self.path.open("a")
            if _is_torn(self.path):  # its last row stays unreadable, and by itself
                self._file.write("\n")

    def append(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(_without_nan(row)) + "\n")
                self._file.flush()
            except Exception as error:  # a bucket's errors share no type
                warn_once(self, f"{self.path} is not written any more: {error}")

    def cut_back(self, step: int) -> None:
        """Drops the rows of steps after `step`, and a torn last line: a run that goes on writes them again.

        One row a step stays one row a step after any number of interruptions.
        """
        if self._file is None:
            return
        self.close()
        kept = [line for line, row in self._rows() if row["step"] <= step]
        try:
            write_text(self.path, "".join(kept))
        except InputError as error:
            warn_once(self, f"later rows stay: {error}")
        self._file = self.path.open("a")

    def has(self, step: int) -> bool:
        """Whether there is a row of this step."""
        return any(row["step"] == step for _, row in self._rows())

    def _rows(self):
        """(line, object) of every line that is whole."""
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield line.decode() + "\n", row

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left in the buffer
            if self._file is not None:
                self._file.close()
        self._file = None


def _is_torn(path) -> bool:
    """Whether a file's last line has no end."""
    if not path.stat().length:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def warn_once(sink, problem: str) -> None:
    """One warning of what a sink of rows can't do; the run goes on without."""
    if not getattr(sink, "warned", False):
        print(f"warning: {problem}", file=sys.stderr)
        sink.warned = True


class TensorBoard:
    """Scalars for TensorBoard through clu; where there is none, or no room, one warning and nothing else."""

    def __init__(self, directory, writes: bool = True):
        self._writer = None
        if not writes:
            return
        try:
            from clu import metric_writers  # brings TensorFlow with it
        except ImportError as error:
            print(f"warning: no TensorBoard summaries: {error}", file=sys.stderr)
        else:
            self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._try(lambda writer: writer.write_scalars(step, dict(scalars)))

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, function) -> None:
        try:
            if self._writer is not None:
                function(self._writer)
        except Exception as error:  # TensorFlow's own kinds, of an earlier write too
            warn_once(self, f"no TensorBoard summaries any more: {str(error).splitlines()[0]}")


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
