"""Processes of a run that agree, over jax's coordination service.

Unlike a collective of the devices this may run in a background thread beside the training step, and
a process that has failed says so instead of leaving the others to wait. Every process makes the same
calls in the same order; a run of one process asks nobody.
"""

import collections
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from a3_jax.checkpoints.manifest import DamagedCheckpoint
from a3_jax.errors import InputError, RunError

TIMEOUT_SECONDS = 1200
_numbers = collections.defaultdict(itertools.count)


def agree(what: str, mine: Any, decide: Callable[[list[Any]], Any], alone: bool = False) -> Any:
    """Gives process 0 every process's value, and every process what it makes of them.

    Args:
      what: a name; calls of one name follow each other, those of different names may overlap.
      mine: this process's value, as JSON knows them.
      decide: called in process 0 with the values in the order of the processes; must not raise.
      alone: asks nobody, though there are others.

    Raises:
      jax.errors.JaxRuntimeError: another process is gone, or came to nothing in `TIMEOUT_SECONDS`.
    """
    if alone or jax.process_count() == 1:
        return decide([mine])
    from jax._src.distributed import global_state  # nothing public leads to the service

    client: Any = global_state.client
    number, milliseconds = next(_numbers[what]), TIMEOUT_SECONDS * 1000
    name = f"a3_jax/{what}/{number}"
    if jax.process_index():
        client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(mine))
        return json.loads(client.blocking_key_value_get(f"{name}/all", milliseconds))
    others = range(1, jax.process_count())
    texts = [client.blocking_key_value_get(f"{name}/{other}", milliseconds) for other in others]
    if number:  # who has come here has read what was decided before
        client.key_value_delete(f"a3_jax/{what}/{number - 1}")
    decision = decide([mine, *map(json.loads, texts)])
    client.key_value_set(f"{name}/all", json.dumps(decision))
    return decision


def together(what: str, action: Callable[[], Any], alone: bool = False) -> Any:
    """What `action` gives in each process; where it fails in one, it fails in all, for the same reason.

    Raises:
      InputError, RunError: that of the first process that has one.
    """
    result, problem, failure = None, None, None
    try:
        result = action()
    except (InputError, RunError) as error:
        problem = _pack(error)
    except Exception as error:  # the others must hear of it before it ends this process
        failure, problem = error, _pack(InputError(f"{type(error).__name__}: {error}"))
    first = agree(what, problem, lambda problems: next(filter(None, problems), None), alone)
    if failure is not None:
        raise failure
    if first is not None:
        raise _unpack(first)
    return result


def by_first(what: str, action: Callable[[], Any]) -> Any:
    """What `action`, called in process 0 alone, gives: something that JSON knows.

    Raises:
      Exception: what it raises there; an `InputError` in the other processes.
    """
    result = together(what, lambda: action() if jax.process_index() == 0 else None)
    return agree(what, result, lambda results: results[0])


def _pack(error: InputError | RunError) -> list:
    if isinstance(error, RunError):
        return [error.status, error.message]
    damaged = isinstance(error, DamagedCheckpoint)
    place = None if error.file is None else str(error.file)
    return [damaged, error.message, place, error.field, error.step if damaged else None]


def _unpack(packed: list) -> InputError | RunError:
    if len(packed) == 2:
        return RunError(*packed)
    damaged, message, file, field, step = packed
    if damaged:
        return DamagedCheckpoint(message, file=file, leaf=field, step=step)
    return InputError(message, file=file, field=field)
