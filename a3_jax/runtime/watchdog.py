"""Ends a process in which nothing happens, after writing down the stacks of its threads.

The training loop names its phase; a thread checks how long that phase has taken. It needs the interpreter
lock, as all Python does: code that hangs while holding the lock isn't noticed.
"""

import contextlib
import dataclasses
import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from a3_jax.errors import EXIT_HUNG
from a3_jax.paths import absolute

PHASES = ("step", "compile", "evaluate", "sample", "save", "restore", "data")
_STEPS_KEPT, _STEPS_NEEDED = 50, 5
_FIRST_STEPS, _LEAST, _FACTOR = 1800.0, 120.0, 20  # seconds, seconds, times the median step
_PAUSE = 5.0  # seconds by which the thread's own wait may overrun; beyond that the process was suspended


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds that each phase may take; infinity for no limit.

    Attributes:
      step: 0 means the larger of 120 and 20 times the median of the last 50 steps, and 1800 until 5 steps
        have been seen.
      compile, other: for compiling, and for each of the other phases.
    """

    step: float = 0
    compile: float = 3600
    other: float = 1800


class Watchdog:
    """A thread that ends the process (status 76) once a phase takes too long; a context manager.

    Nothing is watched before the first `enter`.
    """

    def __init__(
        self,
        directory,
        process: int,
        limits: Limits,
        on_hang: Callable[[str, float, str], None] | None = None,
        exit: Callable[[int], object] = os._exit,
    ):
        """Starts watching.

        Args:
          directory: the run's; the stacks of all threads go to `stacks/PROCESS-UNIXTIME.txt` there.
          process: index of this process.
          on_hang: called before the end with phase, seconds and the name of that file, for 2 s at most;
            its errors are dropped.
          exit: ends the process.
        """
        self._directory, self._process = absolute(directory), process
        self._limits, self._on_hang, self._exit = limits, on_hang, exit
        self._present: tuple[str, float] | None = None  # phase and when its clock began, replaced as one
        self._durations, self._steps = [0.0] * _STEPS_KEPT, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="a3-watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Begins a phase, one of `PHASES`, or the next step."""
        if phase not in PHASES:
            raise ValueError(f"no phase: {phase!r}")
        now, before = time.monotonic(), self._present
        if before is not None and before[0] == "step":
            self._durations[self._steps % _STEPS_KEPT] = now - before[1]
            self._steps += 1
        self._present = (phase, now)

    def beat(self) -> None:
        """Restarts the clock of the present phase."""
        if self._present is not None:
            self.enter(self._present[0])

    def limit(self, phase: str) -> float:
        """Returns the seconds that a phase may take now."""
        if phase != "step":
            return self._limits.compile if phase == "compile" else self._limits.other
        if self._limits.step > 0:
            return self._limits.step
        if self._steps < _STEPS_NEEDED:
            return _FIRST_STEPS
        return max(_LEAST, _FACTOR * statistics.median(self._durations[: self._steps]))

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _watch(self) -> None:
        watched, suspended = None, 0.0
        while True:
            present = self._present
            limit = self.limit(present[0]) if present else 1.0
            wait, before = min(max(limit / 10, 0.01), 1.0), time.monotonic()
            if self._stop.wait(wait):
                return
            now, present = time.monotonic(), self._present
            if present is not watched:
                watched, suspended = present, 0.0
            if now - before - wait > _PAUSE:
                suspended += now - before - wait
            if present is not None and now - present[1] - suspended > self.limit(present[0]):
                self._end(present[0], now - present[1] - suspended)
                return

    def _end(self, phase: str, seconds: float) -> None:
        # Disk and terminal may be what hangs: nothing here is waited for without a limit.
        file = self._directory / "stacks" / f"{self._process}-{int(time.time())}.txt"
        told = f"a3: hung: '{phase}' has taken {seconds:.0f} s; stacks of all threads: {file}"
        briefly(10.0, lambda: _write_stacks(file))
        briefly(2.0, lambda: print(told, file=sys.stderr, flush=True))
        on_hang = self._on_hang
        if on_hang is not None:
            briefly(2.0, lambda: on_hang(phase, seconds, str(file)))
        self._exit(EXIT_HUNG)


def briefly(seconds: float, function: Callable[[], object]) -> None:
    """Calls a function for at most `seconds`, then goes on without it; drops its errors."""

    def call():
        with contextlib.suppress(Exception):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def _write_stacks(file) -> None:
    """Writes the stacks of all threads as text, to standard error if the file can't be written."""
    try:
        if "://" in str(file):  # faulthandler needs a file descriptor, which a bucket's file doesn't have
            with tempfile.TemporaryFile() as local:
                faulthandler.dump_traceback(local, all_threads=True)
                local.seek(0)
                file.write_bytes(local.read())
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w") as local:
                faulthandler.dump_traceback(local, all_threads=True)
    except Exception:  # a bucket's errors share no type
        faulthandler.dump_traceback(2, all_threads=True)
