"""How far a preparation is, on standard error, and what it made, on standard output."""

import datetime
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from a3_jax.data.prepared_manifest import HELDOUT, TRAIN, PreparedManifest

_SECONDS_BETWEEN_LINES = 10
_NAMES_SHOWN = 10


class ReadingLine:
    """A live line on a terminal, plain lines elsewhere.

    Args:
      what: is done, in a word.
      total: bytes of all files.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total = what, max(total, 1)
        self._began = self._told = time.monotonic()
        self._first: tuple[int, int] | None = None
        self._bar = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TaskProgressColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)
            self._task = self._bar.add_task(what, total=self._total)
            self._bar.start()

    def update(self, bytes_read: int, tokens: int) -> None:
        """Shows how many bytes of the files are read, and the tokens so far."""
        now = time.monotonic()
        if self._first is None:  # what an earlier process did is not our rate
            self._first = (bytes_read, tokens)
            self._began = now
        done, made, seconds = bytes_read - self._first[0], tokens - self._first[1], now - self._began
        text = self._what
        if seconds > 0:
            text += f"  {done / seconds / 1e6:,.1f} MB/s"
            text += f"  {made / seconds:,.0f} tokens/s" if made else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=bytes_read, description=text)
        elif now - self._told > _SECONDS_BETWEEN_LINES:
            self._told = now
            left = round(seconds * (self._total - bytes_read) / done) if done else 0
            told = f"  {datetime.timedelta(seconds=left)} left" if done else ""
            self.note(f"{100 * bytes_read / self._total:.0f} %  {text}{told}")

    def note(self, text: str) -> None:
        """One line of text, above the live line if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def summary(manifest: PreparedManifest) -> list[str]:
    """Lines that say what a prepared directory holds."""
    counts, settings = manifest.counts, manifest.settings
    heldout = manifest.splits.get(HELDOUT, [])
    documents = f"{counts['documents']:,}"
    if heldout:
        documents += f", {counts['heldout_documents']:,} of them held out"
    if counts["cut"]:
        documents += f", {counts['cut']:,} cut at the end of their row"
    share = counts["padding"] / max(counts["rows"] * manifest.seq_len, 1)
    shards = f"{TRAIN} {len(manifest.splits[TRAIN])}" + (f", {HELDOUT} {len(heldout)}" if heldout else "")
    lines = [
        f"documents  {documents}",
        f"tokens     {counts['tokens']:,}, {_framing(settings)}",
        f"rows       {counts['rows']:,} of {manifest.seq_len} ({settings['packing']}), padding {share:.2%}",
        f"shards     {shards}, {sum(shard.bytes for shard in manifest.shards):,} bytes",
    ]
    for reason, count in counts["passed_over"].items():
        lines.append(f"passed over {count:,} {reason}, first {counts['first_passed_over'][reason]}")
    if ignored := counts.get("ignored_fields"):
        most = sorted(ignored, key=ignored.get, reverse=True)[:_NAMES_SHOWN]
        told = ", ".join(f"{name} (in {ignored[name]:,})" for name in most)
        more = f" and {len(ignored) - len(most)} more" if len(ignored) > len(most) else ""
        lines.append(f"ignored    fields that nothing reads: {told}{more}")
    return lines


def _framing(settings) -> str:
    """What stands around each document."""
    names = [name for name, there in (("BOS", settings["adds_bos"]), ("EOS", settings["adds_eos"])) if there]
    return f"{' and '.join(names)} added to each document" if names else "neither BOS nor EOS added"
