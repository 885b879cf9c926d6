"""What a run wrote into its directory, read without JAX."""

import json
import math
import os
from collections.abc import Iterable
from typing import Any

from a3_jax.checkpoints.manifest import MANIFEST_FILE
from a3_jax.errors import InputError
from a3_jax.paths import as_path

EVENTS, CONFIG, METRICS, LEASE, CHECKPOINTS = (
    "events.jsonl", "config.json", "metrics.jsonl", "lease.json", "checkpoints",
)  # fmt: skip

Event = dict[str, Any]

ENDS = ("finish", "preempt", "hang", "failed", "peer_lost")  # what a process says last

# The numbers that an event can't do without; a line that lacks one is as good as torn.
_NUMBERS = {
    "init": ("seconds", "first_step"),
    "restore": ("step", "seconds"),
    "compile": ("seconds",),
    "step": ("step", "seconds"),
    "evaluate": ("seconds",),
    "sample": ("seconds",),
    "save": ("seconds",),
    "rollback": ("from_step", "to_step"),
}
_OPTIONAL_NUMBERS = ("attempt", "data_seconds", "tokens", "total_steps")
_TAIL_BYTES = 1 << 16


def read_events(workdir) -> tuple[list[Event], int]:
    """Returns the events of a run in the order they were written.

    Returns:
      (events, lines passed over: torn by a death in the middle of writing, or otherwise unreadable).
    """
    workdir = as_path(workdir)
    if not workdir.is_dir():
        raise InputError("no such directory", file=workdir)
    if not (workdir / EVENTS).exists():
        raise InputError("no such file: no run has begun here", file=workdir / EVENTS)
    lines = [line for line in (workdir / EVENTS).read_bytes().split(b"\n") if line.strip()]
    read = [_event(line) for line in lines]
    skipped_lines = read.count(None)
    # What was written behind a torn line is whole all the same.
    read = [event or _event(line[line.rfind(b'{"time"') :]) for event, line in zip(read, lines, strict=True)]
    events = [event for event in read if event is not None]
    if not any(event["event"] == "init" for event in events):
        raise InputError("holds no init event: no run has begun here", file=workdir / EVENTS)
    return events, skipped_lines


def append_event(workdir, event: Event) -> None:
    """Adds a line, on a line of its own even where the last one is torn.

    Raises:
      OSError: the file can't be written.
    """
    path = os.path.join(workdir, EVENTS)
    with open(path, "ab+") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(event).encode() + b"\n")


def attempts(events: Iterable[Event]) -> list[list[Event]]:
    """Returns the events of each opening of the run; what the supervisor wrote belongs to none."""
    found: list[list[Event]] = []
    for event in events:
        if event["event"] == "restart":
            continue
        last = found[-1] if found else []
        again = event["event"] == "init" and any(other["event"] in ("init", *ENDS) for other in last)
        if not last or again or event.get("attempt") != last[0].get("attempt"):
            found.append([])
        found[-1].append(event)
    return found


def sort_steps(events: Iterable[Event]) -> tuple[dict[int, Event], list[Event]]:
    """Separates the step events that count from those that were lost.

    A step is lost when the run goes back to before it: another attempt restores an older checkpoint (or
    finds none), or the run itself rolls back.

    Returns:
      ({step: its event} in the order of the steps, lost events).
    """
    kept: dict[int, Event] = {}
    lost: list[Event] = []

    def go_back(step):
        while kept and next(reversed(kept)) > step:  # they are in order
            lost.append(kept.popitem()[1])

    for attempt in attempts(events):
        restores = any(event["event"] == "restore" for event in attempt)
        for event in attempt:
            if event["event"] == "init" and not restores:
                go_back(event["first_step"])
            elif event["event"] == "restore":
                go_back(event["step"])
            elif event["event"] == "rollback":
                go_back(event["to_step"])
            elif event["event"] == "step":
                go_back(event["step"] - 1)
                kept[event["step"]] = event
    return kept, lost


def position(events: Iterable[Event]) -> tuple[int | None, int]:
    """Returns where the newest attempt is.

    Returns:
      (the last step on record, or where the attempt began; None before any,
       batches that a rollback passed over for good: step n reads batch n + those).
    """
    name = {"init": "first_step", "restore": "step", "step": "step", "rollback": "to_step"}
    step, skipped_batches, rolled_back_to = None, 0, -1
    for event in events:
        if event["event"] not in name:
            continue
        step = event[name[event["event"]]]
        if event["event"] == "rollback":
            skipped_batches, rolled_back_to = event["from_step"] - step, step
        elif event["event"] == "init" and step <= rolled_back_to:
            skipped_batches = 0  # from a checkpoint that knows nothing of it
    return step, skipped_batches


def checkpoint_steps(workdir) -> list[int]:
    """Returns the steps with a finished checkpoint (one with its last file), oldest first."""
    directory = as_path(workdir) / CHECKPOINTS
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if entry.name.isascii() and entry.name.isdigit()]
    return sorted(int(name) for name in names if (directory / name / MANIFEST_FILE).exists())


def newest_step(workdir) -> int | None:
    """Returns the newest step with a finished checkpoint; None without any."""
    return max(checkpoint_steps(workdir), default=None)


def read_object(path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty where there is none, or one that is just being written."""
    try:
        value = json.loads(as_path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def last_row(path) -> dict[str, Any]:
    """Returns the last whole row of a file of JSON lines; empty without one. Reads the file's end alone."""
    try:
        with as_path(path).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # torn, not JSON, not UTF-8
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    needed = ("time", *_NUMBERS.get(event["event"], ()))
    optional = [name for name in _OPTIONAL_NUMBERS if event.get(name) is not None]
    return event if all(_is_count(event.get(name)) for name in (*needed, *optional)) else None


def _is_count(value) -> bool:
    """Returns whether it is a number from 0 on."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
