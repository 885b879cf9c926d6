"""What is known when a run has been started again and again and comes no further."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from a3_jax.errors import InputError
from a3_jax.paths import write_json
from a3_jax.pods.records import CONFIG, newest_step, position, read_events, read_object

REPORT = "no_progress.json"
_ATTEMPTS_TOLD = 5
_IN_FLIGHT = 2  # a step is on record only once the next one was dispatched


def clear_report(workdir) -> None:
    """A new launch begins without the last one's report."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(workdir, REPORT))


def write_report(
    workdir, restarts: int, fruitless: int, failures: Sequence[Sequence[int | None]]
) -> list[str]:
    """Writes `no_progress.json` and tells the same in lines.

    Examples are numbered in the order the run reads them: step n has those from (n - 1) * batch_size on,
    and as many more as a rollback passed over.

    Args:
      restarts: in all. fruitless: the last ones, without a new checkpoint.
      failures: exit status of each process, of each attempt; None: ended by the supervisor.

    Returns:
      Lines for people; the last one by itself says what happened.
    """
    step, ahead = _position(workdir)
    newest = newest_step(workdir)
    in_flight = _in_flight(step, ahead, read_object(os.path.join(workdir, CONFIG)).get("batch_size"))
    last = list(failures)[-_ATTEMPTS_TOLD:]
    report = {
        "restarts": restarts,
        "restarts_without_progress": fruitless,
        "exit_statuses": [list(statuses) for statuses in last],
        "newest_checkpoint": newest,
        "last_step": step,
        "in_flight": in_flight,
    }
    lines = [f"a3 launch: exit statuses by process, of the last attempts: {'; '.join(map(_listed, last))}"]
    if step is not None:
        lines.append(f"a3 launch: the step after {step} was in flight")
    for entry in in_flight:
        if "first_example" in entry:
            lines.append(
                f"a3 launch: step {entry['step']} has the examples {entry['first_example']} to"
                f" {entry['last_example']} (running numbers)"
            )
    try:
        write_json(os.path.join(workdir, REPORT), report)
    except InputError as error:  # a full disk may be why we are here
        lines.append(f"a3 launch: warning: {error}")
    told = "no checkpoint" if newest is None else f"no checkpoint after step {newest}"
    return [*lines, f"a3: {workdir}: no progress: {told} in {fruitless} restarts in a row"]


def _position(workdir) -> tuple[int | None, int]:
    try:
        return position(read_events(workdir)[0])
    except (InputError, OSError):
        return None, 0


def _in_flight(step, ahead, batch_size) -> list[dict[str, Any]]:
    """The steps that may have been running, with their examples where the batch size is known."""
    if step is None:
        return []
    entries = [{"step": number} for number in range(step + 1, step + 1 + _IN_FLIGHT)]
    if isinstance(batch_size, int):
        for entry in entries:
            end = (entry["step"] + ahead) * batch_size
            entry |= {"first_example": end - batch_size, "last_example": end - 1}
    return entries


def _listed(statuses: Sequence[int | None]) -> str:
    return ", ".join("ended from here" if status is None else str(status) for status in statuses)
