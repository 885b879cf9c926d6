"""How far a run is: a live line with the time left on a terminal, plain lines elsewhere."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SMOOTHING = 0.1  # weight of the newest step in the mean time of a step


class ProgressLine:
    """Progress on standard error.

    Args:
      first_step, total_steps: steps done at the start; steps in all.
      log_every: steps between plain lines, where standard error is no terminal.
      shows: False for nothing but notes: another process shows the rest.
    """

    def __init__(self, first_step: int, total_steps: int, log_every: int, shows: bool = True):
        self._total, self._log_every, self._shows = total_steps, log_every, shows
        self._last_time, self._step_seconds = None, None
        self._bar = None
        console = Console(stderr=True)
        if shows and console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)
            self._task = self._bar.add_task("starting", total=total_steps, completed=first_step)
            self._bar.start()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows a row of `metrics.jsonl`."""
        step = row["step"]
        self._measure()
        loss = "nothing to predict" if row["loss"] is None else f"loss {row['loss']:.4f}"
        text = (
            f"{row['stage']}  {loss}  rate {row['learning_rate']:.2e}"
            f"  {row['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in row:
            text += f"  mfu {100 * row['mfu']:.0f} %"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._shows and (step % self._log_every == 0 or step == self._total):
            self.note(f"step {step}/{self._total}  {text}  {self._time_left(step)}")

    def note(self, text: str) -> None:
        """One line of text, above the live line if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _measure(self):
        now = time.monotonic()
        if self._last_time is not None:
            seconds = now - self._last_time
            last = seconds if self._step_seconds is None else self._step_seconds
            self._step_seconds = last + _SMOOTHING * (seconds - last)
        self._last_time = now

    def _time_left(self, step):
        if self._step_seconds is None:
            return ""
        seconds = round(self._step_seconds * (self._total - step))
        return f"{datetime.timedelta(seconds=seconds)} left"
