"""How far a conversion is, on standard error: a live line on a terminal, plain lines elsewhere."""

import datetime
import sys
import time

_SECONDS_BETWEEN_LINES = 10


class ConversionProgress:
    """Bytes done of a total; a context manager.

    Args:
      what: is done, in a word.
      total: bytes.
    """

    def __init__(self, what: str, total: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self._what, self._total, self._done = what, max(total, 1), 0
        self._began = self._told = time.monotonic()
        self._bar = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), TaskProgressColumn(), BarColumn(bar_width=20))
            speed = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, *speed, console=console, transient=True)
            self._task = self._bar.add_task(what, total=self._total)

    def add(self, nbytes: int) -> None:
        """So many bytes more are done."""
        self._done += nbytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif now - self._told > _SECONDS_BETWEEN_LINES and self._done:
            self._told = now
            rate = self._done / (now - self._began)
            left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
            done = (
                f"{100 * self._done / self._total:.0f} %  {self._what}  {rate / 1e6:,.1f} MB/s  {left} left"
            )
            print(done, file=sys.stderr, flush=True)

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()
