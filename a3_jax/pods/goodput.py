"""`a3 goodput RUN`: where the wall time went."""

import json
from collections.abc import Sequence
from typing import Any

from a3_jax.console import duration, print_table
from a3_jax.errors import EXIT_OK
from a3_jax.pods.run_records import Event, attempts, read_events, sort_steps

CATEGORIES = {
    "step": "steps that count: productive",
    "init": "start of the processes, up to the first event",
    "restore": "reading checkpoints",
    "compile": "compiling",
    "data_wait": "steps that count: waiting for rows",
    "redone": "steps lost to a restart or a rollback",
    "skipped": "steps without an update: no finite gradient",
    "evaluate": "held-out losses",
    "sample": "infillings to read",
    "save": "saving, as far as steps waited for it",
    "down": "between two attempts",
    "other": "all else",
}
_TIMED = ("init", "restore", "compile", "evaluate", "sample", "save")  # events whose seconds are a category


def run_goodput(args) -> int:
    """`a3 goodput`: the exit status."""
    events, skipped_lines = read_events(args.run_directory)
    report = {"run": str(args.run_directory), **account(events), "skipped_lines": skipped_lines}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return EXIT_OK


def account(events: Sequence[Event]) -> dict[str, Any]:
    """Shares of a run's wall time.

    Wall time goes from the start of the first process to the last event. A step's seconds include the wait
    for its rows; all other events are disjoint. A lost or skipped step counts whole, its wait included.

    Args:
      events: of `read_events`.

    Returns:
      {"wall_seconds", "goodput": productive share, 0 to 1, "seconds": {category: seconds, which add up to
      wall_seconds}, "attempts", "restarts": those of a supervisor, "steps": those that count}.
    """
    kept, lost = sort_steps(events)
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for event in kept.values():
        wait = min(event.get("data_seconds") or 0.0, event["seconds"])
        if event.get("skipped"):
            seconds["skipped"] += event["seconds"]
        else:
            seconds["data_wait"] += wait
            seconds["step"] += event["seconds"] - wait
    for event in lost:
        seconds["skipped" if event.get("skipped") else "redone"] += event["seconds"]
    for event in events:
        if event["event"] in _TIMED:
            seconds[event["event"]] += event["seconds"]
    found = attempts(events)
    seconds["down"], wall = _down_and_wall(events, found)
    # Clocks are set and may jump: never more than the whole.
    wall = max(wall, sum(seconds.values()))
    seconds["other"] = max(0.0, wall - sum(seconds.values()))
    return {
        "wall_seconds": wall,
        "goodput": seconds["step"] / wall if wall else 0.0,
        "seconds": seconds,
        "attempts": len(found),
        "restarts": sum(event["event"] == "restart" for event in events),
        "steps": sum(not event.get("skipped") for event in kept.values()),
    }


def _down_and_wall(events, found) -> tuple[float, float]:
    """Seconds without a process, and seconds in all; a supervisor's last word is part of the run."""
    began = [_began(attempt) for attempt in found]
    ended = [max(event["time"] for event in attempt) for attempt in found]
    last = max(event["time"] for event in events)
    down = sum(max(0.0, begin - end) for begin, end in zip(began[1:], ended[:-1], strict=True))
    return down + max(0.0, last - max(ended)), last - began[0]


def _began(attempt) -> float:
    """Returns when the process of an attempt was started; init may be written before or after restoring."""
    first = next((event for event in attempt if event["event"] == "init"), attempt[0])
    began = first["time"] - (first["seconds"] if first["event"] in _TIMED else 0.0)
    restored = [event["time"] - event["seconds"] for event in attempt if event["event"] == "restore"]
    return began - max(0.0, first["time"] - min(restored, default=first["time"]))


def show(report: dict[str, Any]) -> None:
    """Prints the table."""
    wall = report["wall_seconds"]
    counts = f"steps {report['steps']}, attempts {report['attempts']}, restarts {report['restarts']}"
    if report["skipped_lines"]:
        counts += f", unreadable lines passed over {report['skipped_lines']}"
    rows = [
        (category.replace("_", " "), duration(spent), f"{spent / (wall or 1):.2%}", CATEGORIES[category])
        for category, spent in report["seconds"].items()
        if spent or category == "step"
    ]
    title = f"{report['run']}: goodput {report['goodput']:.1%} of {duration(wall)}"
    print_table(title, rows, ("", "time", "share", ""), counts)
