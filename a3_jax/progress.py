"""The progress line on standard error: live, with the time left, on a terminal; plain lines elsewhere."""

import contextlib
import datetime
import sys
import time

_SECONDS_BETWEEN_LINES = 10


class ProgressLine(contextlib.AbstractContextManager):
    """How far some work is; closed at its end."""

    def __init__(self, total: int, done: int = 0, *, unit: str = "", shows: bool = True):
        """Starts the line.

        Args:
          total, done: amounts in all and at the start.
          unit: "bytes" shows a share and a rate, "" the two amounts.
          shows: false for notes alone, as in all processes but the first.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Left

        self._total, self._done, self._unit, self._shows = max(total, 1), done, unit, shows
        self._first: tuple[int, float, dict[str, int]] | None = (
            None  # what an earlier process did is not our rate
        )
        self._last_line = time.monotonic()
        self._bar = None
        console = Console(stderr=True)
        if shows and console.is_terminal:
            amount = TaskProgressColumn() if unit else MofNCompleteColumn()
            columns = (amount, BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, Left(), TextColumn("left"), console=console)
            self._task = self._bar.add_task("starting", total=self._total, completed=done)
            self._bar.start()

    def update(self, done: int, text: str, *, due: bool | None = None, **amounts: int) -> None:
        """Shows how far the work is.

        Args:
          done: of the total.
          text: what the line says besides.
          due: whether a plain line is written; None: every ten seconds.
          amounts: so far, such as `tokens`, shown per second.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now, amounts)
        new, seconds = done - self._first[0], now - self._first[1]
        if self._unit and seconds > 0:
            text += f"  {new / seconds / 1e6:,.1f} MB/s"
        for name, amount in amounts.items():
            made = amount - self._first[2].get(name, 0)
            text += f"  {made / seconds:,.0f} {name}/s" if made and seconds > 0 else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif self._shows and (now - self._last_line > _SECONDS_BETWEEN_LINES if due is None else due):
            self._last_line = now
            left = round(seconds * (self._total - done) / new) if new else None
            amount = f"{100 * done / self._total:.0f} %" if self._unit else f"step {done}/{self._total}"
            ending = "" if left is None else f"  {datetime.timedelta(seconds=left)} left"
            self.note(f"{amount}  {text}{ending}")

    def add(self, amount: int, text: str) -> None:
        """Counts more of the total as done, and shows it."""
        self._done += amount
        self.update(self._done, text)

    def note(self, text: str) -> None:
        """Shows a line of text, above the live line if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the live line."""
        if self._bar is not None:
            self._bar.stop()

    def __exit__(self, *_):
        self.close()
