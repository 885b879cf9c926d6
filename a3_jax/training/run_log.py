"""What a run writes down: rows, events, TensorBoard summaries, profiles, and a progress line."""

import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from a3_jax.errors import EXIT_PREEMPTED, InputError
from a3_jax.ordering.curriculum import Stage
from a3_jax.paths import as_path, read_json_lines, write_text
from a3_jax.progress import ProgressLine
from a3_jax.runtime.distributed import PeerLost
from a3_jax.runtime.lease import Lease


class JsonLines:
    """A file of JSON objects, one per line.

    A row is on disk when `append` returns, and a reader of a running job never sees half a row for long. A
    file that can't be written costs one warning and its rows, not the run. Threads may share it.
    """

    def __init__(self, path, writes: bool = True):
        """Opens the file; `writes` is false in all processes except the first: they write nothing."""
        self.path, self._file, self._lock = as_path(path), None, threading.Lock()
        if writes:
            self._file = self.path.open("a")
            if _is_torn(self.path):  # its last row stays unreadable, on a line of its own
                self._file.write("\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row; numbers that are NaN or infinite become null."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(json.dumps(_without_nan(row)) + "\n")
                self._file.flush()
            except Exception as error:  # a bucket's errors share no type
                warn_once(self, f"{self.path} is not written any more: {error}")

    def cut_back(self, step: int) -> None:
        """Drops the rows after `step`, and a torn last line: a run that goes on writes them again.

        So there is one row per step after any number of interruptions.
        """
        if self._file is None:
            return
        self.close()
        kept = [json.dumps(row) + "\n" for row in self._rows() if row["step"] <= step]
        try:
            write_text(self.path, "".join(kept))
        except InputError as error:
            warn_once(self, f"later rows stay: {error}")
        self._file = self.path.open("a")

    def has(self, step: int) -> bool:
        """Returns whether there is a row of this step."""
        return any(row["step"] == step for row in self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_json_lines(self.path) if type(row.get("step")) is int]

    def close(self) -> None:
        """Closes the file; further rows are dropped."""
        with contextlib.suppress(OSError):  # from what is left in the buffer
            if self._file is not None:
                self._file.close()
        self._file = None


class Events:
    """The events of a run over all its attempts, in `events.jsonl`; none is ever removed.

    `a3 goodput` and `a3 status` read them. Each is `{"time": seconds since 1970, "event": NAME,
    "attempt": n, ...}`; attempts count from 1.

        init      host, pid, processes, devices, first_step, total_steps, seconds since the process began
        restore   step, seconds                 damaged   step, problem: set aside
        compile   what, seconds                 step      step, seconds, data_seconds, tokens, skipped
        evaluate  step, seconds                 sample    step, seconds
        save      step, seconds: of waiting     saved     step, seconds, bytes: in the background
        save_failed  step, problem              rollback  from_step, to_step, skipped_steps
        preempt   step, if it was saved now     hang      phase, seconds, file
        peer_lost, failed  problem              finish    step

    The supervisor of `a3 launch local` adds `restart`. `seconds` of a step contain `data_seconds`; all
    others are disjoint, except for `saved`.
    """

    def __init__(self, path, writes: bool = True):
        """Opens the file; `writes` is true on process 0 alone."""
        before = as_path(path)
        content = before.read_bytes() if writes and before.exists() else b""
        self.attempt = 1 + content.count(b'"event": "init"')
        self._lines = JsonLines(path, writes)

    def write(self, event: str, **fields) -> None:
        """Writes an event."""
        self._lines.append({"time": round(time.time(), 3), "event": event, "attempt": self.attempt, **fields})

    @contextlib.contextmanager
    def timed(self, event: str, **fields) -> Iterator[None]:
        """Writes an event with the seconds that the block took, if the block succeeds."""
        begin = time.monotonic()
        yield
        self.write(event, **fields, seconds=round(time.monotonic() - begin, 4))

    def beginning(self, devices: int, first_step: int, total_steps: int, restored: float | None) -> None:
        """Writes how the run began: the seconds that restoring took, None if it is new."""
        self.write(
            "init", host=socket.gethostname(), pid=os.getpid(), processes=jax.process_count(),
            devices=devices, first_step=first_step, total_steps=total_steps,
            seconds=round(_process_seconds() - (restored or 0.0), 3),
        )  # fmt: skip
        if restored is not None:
            self.write("restore", step=first_step, seconds=round(restored, 4))

    def hang(self, phase: str, seconds: float, file: str) -> None:
        """Writes what the watchdog found."""
        self.write("hang", phase=phase, seconds=round(seconds, 1), file=file)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class LastWords:
    """What is done if this process has to leave before the end of its run, whatever the reason.

    Attributes:
      events: gets the reason, once it is open.
      lease: is given back, once it is held.
    """

    def __init__(self):
        self.events: Events | None = None
        self.lease: Lease | None = None

    def __call__(self, error: BaseException | None = None) -> None:
        """Writes the reason; None: told to stop with nothing to save."""
        if self.events is not None:
            if isinstance(error, PeerLost):
                self.events.write("peer_lost", problem=str(error))
            elif error is None:
                self.events.write("preempt")
            elif getattr(error, "status", None) != EXIT_PREEMPTED:
                self.events.write("failed", problem=f"{type(error).__name__}: {error}")
        # With one process an exception unwinds, and the lease is given back last.
        if self.lease is not None and (error is None or jax.process_count() > 1):
            self.lease.release()


class TensorBoard:
    """Scalars for TensorBoard through clu; without clu, or on a full disk, one warning and nothing else."""

    def __init__(self, directory, writes: bool = True):
        """Opens the directory; `writes` is true on process 0 alone."""
        self._writer = None
        if not writes:
            return
        try:
            from clu import metric_writers  # imports TensorFlow
        except ImportError as error:
            print(f"warning: no TensorBoard summaries: {error}", file=sys.stderr)
        else:
            self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(directory)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        self._try(lambda writer: writer.write_scalars(step, dict(scalars)))

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self._try(lambda writer: writer.close())

    def _try(self, function) -> None:
        try:
            if self._writer is not None:
                function(self._writer)
        except Exception as error:  # TensorFlow's own types, also from earlier writes
            warn_once(self, f"no TensorBoard summaries any more: {str(error).splitlines()[0]}")


class Profiler:
    """Profiles of chosen steps, for the trace viewer of TensorBoard or XProf, and for Perfetto."""

    def __init__(self, directory, steps: Sequence[int], note: Callable[[str], None]):
        """Prepares a profile.

        Args:
          directory: where the trace goes.
          steps: first and last step, counted from 1; () for none.
          note: shows the user a line of text.
        """
        self._directory, self._note, self._active = directory, note, False
        self._first, self._last = steps or (math.inf, -math.inf)

    def start_before(self, step: int) -> None:
        """Starts the trace if this step, about to be dispatched, is in the range (a resumed run's may be)."""
        if not self._active and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self._active = True

    def ends_with(self, step: int) -> bool:
        """Returns whether this is the profile's last step; it must have ended before `stop` is called."""
        return self._active and step == self._last

    def stop(self) -> None:
        """Writes the trace."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
            self._note(f"profile: {self._directory}")

    close = stop  # a run that fails still leaves its trace


def progress_text(row: Mapping[str, Any]) -> str:
    """Returns what the progress line says of a row of `metrics.jsonl`."""
    loss = "nothing to predict" if row["loss"] is None else f"loss {row['loss']:.4f}"
    rate, speed = f"rate {row['learning_rate']:.2e}", f"{row['tokens_per_second']:,.0f} tokens/s"
    mfu = f"  mfu {100 * row['mfu']:.0f} %" if "mfu" in row else ""
    return f"{row['stage']}  {loss}  {rate}  {speed}{mfu}"


@dataclasses.dataclass(frozen=True)
class RunLog:
    """Everything that a run writes down besides its checkpoints."""

    metrics: JsonLines
    evaluations: JsonLines
    samples: JsonLines
    events: Events
    tensorboard: TensorBoard
    progress: ProgressLine
    profiler: Profiler

    def cut_back(self, step: int) -> None:
        """Drops the rows after a step, which the run does again."""
        for file in (self.metrics, self.evaluations, self.samples):
            file.cut_back(step)


def open_records(run, workdir, events: Events, first_step: int, writes: bool, stack) -> RunLog:
    """Opens the records, cut back to the step that the run goes on from; `stack` closes them."""

    def closing(record):
        return stack.enter_context(contextlib.closing(record))

    names = ("metrics", "eval", "samples")
    metrics, evaluations, samples = (closing(JsonLines(workdir / f"{name}.jsonl", writes)) for name in names)
    tensorboard = closing(TensorBoard(workdir / "tensorboard", writes))
    progress = closing(ProgressLine(run.total_steps, first_step, shows=writes))
    profiler = closing(Profiler(workdir / "profile", run.profile_steps, progress.note))
    records = RunLog(metrics, evaluations, samples, events, tensorboard, progress, profiler)
    records.cut_back(first_step)
    return records


class MetricsReader:
    """Reads the metrics of a step from the device one step late, and writes them down.

    Attributes:
      step: whose metrics were read last.
      skipped: how many consecutive steps, up to that one, changed nothing.
      stop, save_failed: whether any process was told to stop, or failed to save.
    """

    def __init__(self, records: RunLog, run, utilization: Callable[[str, float], float] | None):
        self.step = self.skipped = 0
        self.stop = self.save_failed = False
        self._pending: tuple[int, Stage, float, Mapping[str, Any], Any] | None = None
        self._records, self._run, self._utilization = records, run, utilization
        self._empty_stages: set[str] = set()  # of which a step had nothing to predict
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts the time of the next step now, so that evaluation and saving don't count for its speed."""
        self._clock, self._data_seconds, self._left_out = time.monotonic(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self):
        """Counts the block as waiting for data."""
        begin = time.monotonic()
        yield
        self._data_seconds += time.monotonic() - begin

    def leave_out(self, event: str, seconds: float, **fields) -> None:
        """Takes time out of the current step, and writes it as an event of its own."""
        self._left_out += seconds
        self._records.events.write(event, **fields, seconds=round(seconds, 4))

    def dispatched(self, step: int, stage: Stage, rate: float, metrics: Mapping[str, Any], flags) -> None:
        """Reads the previous step, and takes in the metrics and flags of one that was just dispatched."""
        self.read_previous()
        self._pending = step, stage, rate, metrics, flags

    def drop_pending(self) -> None:
        """Counts the flags of the last dispatched step but not its metrics: the run goes back before it."""
        if self._pending is not None:
            self._count(self._pending[-1])
            self._pending = None

    def _count(self, flags) -> None:
        stop, save_failed = (bool(flag) for flag in np.asarray(flags))
        self.stop, self.save_failed = self.stop or stop, self.save_failed or save_failed

    def read_previous(self) -> None:
        """Waits for the last dispatched step to end, and writes its metrics down, unless that is done."""
        if self._pending is None:
            return
        (self.step, stage, rate, metrics, flags), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}  # waits for that step to end
        self._count(flags)
        self.skipped = int(values["skipped"])
        seconds = time.monotonic() - self._clock - self._left_out
        data_seconds = self._data_seconds
        self.restart_clock()
        row = {
            "step": self.step,
            "stage": stage.name,
            "loss": values["loss"] if values["predicted"] else None,
            "learning_rate": rate,
            "grad_norm": values["grad_norm"],
            "tokens_per_second": values["tokens"] / max(seconds, 1e-9),
        }
        if self._utilization is not None:
            row["mfu"] = self._utilization(stage.objective, row["tokens_per_second"])
        if "content_loss" in values:
            row["content_loss"] = values["content_loss"] if values["predicted"] else None
        skipped = {"skipped": True} if self.skipped else {}
        records = self._records
        records.metrics.append(row | skipped)
        records.events.write(
            "step", step=self.step, seconds=round(seconds, 5), data_seconds=round(data_seconds, 5),
            tokens=int(values["tokens"]), **skipped,
        )  # fmt: skip
        due = self.step % self._run.log_every == 0 or self.step == self._run.total_steps
        records.progress.update(self.step, progress_text(row), due=due)
        if not values["predicted"] and stage.name not in self._empty_stages:
            self._empty_stages.add(stage.name)
            records.progress.note(
                f"warning: step {self.step} of stage {stage.name!r} has nothing to predict, so no loss, and "
                "changes nothing; it is the first such step here"
            )
        if skipped:
            records.progress.note(f"warning: step {self.step} has no finite loss and gradient: skipped")
        if self.step % self._run.log_every == 0:
            records.tensorboard.write(self.step, numbers(row, "train/"))


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numeric entries of a row, except its step."""
    return {
        prefix + name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def warn_once(sink, problem: str) -> None:
    """Prints one warning of what can't be written; the run goes on without it."""
    if not getattr(sink, "warned", False):
        print(f"warning: {problem}", file=sys.stderr)
        sink.warned = True


def _is_torn(path) -> bool:
    """Returns whether a file's last line has no end."""
    if not path.stat().length:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _without_nan(row):
    """Replaces NaN and infinity, which JSON doesn't have, by None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _process_seconds() -> float:
    """Returns the seconds since this process began; 0 if the system doesn't tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = float(stat.read().rsplit(")", 1)[1].split()[19])
            return max(0.0, float(uptime.read().split()[0]) - ticks / 100)
    except (OSError, ValueError, IndexError):
        return 0.0
