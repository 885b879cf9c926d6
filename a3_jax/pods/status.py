"""`a3 status RUN`: how far a run is, and whether it lives."""

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from a3_jax.checkpoints.manifest import find_damage, read_manifest
from a3_jax.console import duration, print_table
from a3_jax.errors import EXIT_OK, InputError
from a3_jax.paths import as_path
from a3_jax.pods.run_records import (
    CHECKPOINTS,
    CONFIG,
    LEASE,
    METRICS,
    Event,
    attempts,
    checkpoint_steps,
    last_row,
    position,
    read_events,
    read_object,
    sort_steps,
)
from a3_jax.runtime.lease import is_alive

_ENDS = {
    "finish": "finished",
    "preempt": "preempted",
    "hang": "hung",
    "failed": "failed",
    "peer_lost": "stopped",
}
_STEPS_TIMED = 20


def run_status(args) -> int:
    """`a3 status`: the exit status."""
    report = read_status(args.run_directory)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return EXIT_OK


def read_status(workdir) -> dict[str, Any]:
    """Returns what the files of a run say about it. All keys are always there; None: not known.

    Returns:
      run: its directory.
      state: "running"; "finished"; "preempted", "hung" or "failed", as it said itself at the end; or
        "stopped": there is no process, and it said nothing.
      step, total_steps: steps done, of how many. stage, loss: of the last row of `metrics.jsonl`.
      steps_per_second, tokens_per_second: medians of the last 20 steps of this attempt.
      seconds_left: at that speed, of a running run; without evaluations and saving.
      checkpoint: step of the newest one that is whole: its manifest, the sizes of all files and the bytes of
        the small ones as they were written.
      damaged_checkpoints: names of those that are not, or were set aside.
      attempts: openings of the run. restarts: those of them by a supervisor.
      skipped_steps: steps that changed nothing, for want of a finite gradient.
      last_event: its name. last_event_seconds: how long ago it was.
      skipped_lines: of `events.jsonl`, unreadable.
    """
    workdir = as_path(workdir)
    events, skipped_lines = read_events(workdir)
    attempt = attempts(events)[-1]
    row = last_row(workdir / METRICS)
    checkpoint, damaged = _checkpoints(workdir)
    kept, _ = sort_steps(events)
    state = _state(attempt, read_object(workdir / LEASE))
    step = row["step"] if isinstance(row.get("step"), int) else position(events)[0]
    total = _total_steps(read_object(workdir / CONFIG), events)
    steps_per_second, tokens_per_second = _speed(attempt)
    seconds_left = None
    if state == "running" and steps_per_second and step is not None and total is not None:
        seconds_left = max(0, total - step) / steps_per_second
    return {
        "run": str(workdir),
        "state": state,
        "step": step,
        "total_steps": total,
        "stage": row.get("stage"),
        "loss": row.get("loss"),
        "steps_per_second": steps_per_second,
        "tokens_per_second": tokens_per_second,
        "seconds_left": seconds_left,
        "checkpoint": checkpoint,
        "damaged_checkpoints": damaged,
        "attempts": len(attempts(events)),
        "restarts": sum(event["event"] == "restart" for event in events),
        "skipped_steps": sum(bool(event.get("skipped")) for event in kept.values()),
        "last_event": events[-1]["event"],
        "last_event_seconds": max(0.0, time.time() - events[-1]["time"]),
        "skipped_lines": skipped_lines,
    }


def _state(attempt: Sequence[Event], lease: dict[str, Any]) -> str:
    """See `read_status`; what a run says at its end stands above a lease that it may have left behind."""
    ends = [event["event"] for event in attempt if event["event"] in _ENDS]
    if ends:
        return _ENDS[ends[-1]]
    return "running" if is_alive(lease) else "stopped"


def _total_steps(config: dict[str, Any], events: Sequence[Event]) -> int | None:
    """Returns the steps of the config's stages; where it can't be read, what the last attempt said."""
    try:
        return sum(int(stage["steps"]) for stage in config["stages"])
    except (KeyError, TypeError, ValueError):
        return next(
            (event.get("total_steps") for event in reversed(events) if event["event"] == "init"), None
        )


def _speed(attempt: Sequence[Event]) -> tuple[float | None, float | None]:
    """Returns steps and tokens per second."""
    steps = [event for event in attempt if event["event"] == "step" and event["seconds"] > 0][-_STEPS_TIMED:]
    if not steps:
        return None, None
    rates = [event["tokens"] / event["seconds"] for event in steps if event.get("tokens") is not None]
    seconds = statistics.median(event["seconds"] for event in steps)
    return 1 / seconds, statistics.median(rates) if rates else None


def _checkpoints(workdir) -> tuple[int | None, list[str]]:
    """Returns the newest whole checkpoint, and the names of damaged ones; older ones are not looked at."""
    directory = workdir / CHECKPOINTS
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    damaged = sorted(name for name in names if ".damaged" in name)
    for step in reversed(checkpoint_steps(workdir)):
        try:
            if not find_damage(directory / str(step), read_manifest(directory / str(step))):
                return step, damaged
        except InputError:
            pass
        damaged.append(str(step))
    return None, damaged


def show(report: dict[str, Any]) -> None:
    """Prints the table."""
    print_table(f"{report['run']}: {report['state']}", _lines(report))


def _lines(report):
    """(name, value) for people; what is not known is left out."""
    of = "" if report["total_steps"] is None else f" of {report['total_steps']}"
    yield "step", f"{report['step']}{of}"
    if report["stage"] is not None:
        yield "stage", str(report["stage"])
    if isinstance(report["loss"], int | float):
        yield "loss", f"{report['loss']:.4f}"
    if report["steps_per_second"] is not None:
        tokens = report["tokens_per_second"]
        told = "" if tokens is None else f", {tokens:,.0f} tokens/s"
        yield "speed", f"{report['steps_per_second']:.3g} steps/s{told}"
    if report["seconds_left"] is not None:
        yield "time left", duration(report["seconds_left"])
    yield "checkpoint", "none" if report["checkpoint"] is None else f"step {report['checkpoint']}"
    if report["damaged_checkpoints"]:
        yield "damaged", ", ".join(report["damaged_checkpoints"])
    yield "attempts", f"{report['attempts']}, {report['restarts']} restarts by a supervisor"
    yield "skipped steps", str(report["skipped_steps"])
    yield "last event", f"{report['last_event']}, {duration(report['last_event_seconds'])} ago"
    if report["skipped_lines"]:
        yield "unreadable", f"{report['skipped_lines']} lines of events.jsonl"
