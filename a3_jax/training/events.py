"""What happened when: `events.jsonl`, which `a3 goodput` and `a3 status` read."""

import contextlib
import time
from collections.abc import Iterator

from a3_jax.paths import as_path
from a3_jax.training.metrics import JsonLines


class Events:
    """The events of a run, over all its attempts; nothing is ever taken back.

    Each is `{"time": seconds since 1970, "event": NAME, "attempt": n, ...}`; attempts count from 1.

        init      host, pid, processes, devices, first_step, total_steps, seconds since the process began
        restore   step, seconds                 damaged   step, problem: set aside
        compile   what, seconds                 step      step, seconds, data_seconds, tokens, skipped
        evaluate  step, seconds                 sample    step, seconds
        save      step, seconds: of waiting     saved     step, seconds, bytes: in the background
        save_failed  step, problem              rollback  from_step, to_step, skipped_steps
        preempt   step, if it was saved now     hang      phase, seconds, file
        peer_lost, failed  problem              finish    step

    The supervisor of `a3 launch local` adds `restart`. `seconds` of a step contain `data_seconds`; all
    others are disjoint, but for `saved`.
    """

    def __init__(self, path, writes: bool = True):
        """Opens the file; `writes` is true on process 0 alone."""
        before = as_path(path)
        content = before.read_bytes() if writes and before.exists() else b""
        self.attempt = 1 + content.count(b'"event": "init"')
        self._lines = JsonLines(path, writes)

    def write(self, event: str, **fields) -> None:
        self._lines.append({"time": round(time.time(), 3), "event": event, "attempt": self.attempt, **fields})

    @contextlib.contextmanager
    def timed(self, event: str, **fields) -> Iterator[None]:
        """Writes an event with the seconds that the block took, if it ends well."""
        begin = time.monotonic()
        yield
        self.write(event, **fields, seconds=round(time.monotonic() - begin, 4))

    def close(self) -> None:
        self._lines.close()


def process_seconds() -> float:
    """Seconds since this process began; 0 where the system doesn't tell."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = float(stat.read().rsplit(")", 1)[1].split()[19])
            return max(0.0, float(uptime.read().split()[0]) - ticks / 100)
    except (OSError, ValueError, IndexError):
        return 0.0
