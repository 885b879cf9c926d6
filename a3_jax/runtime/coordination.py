"""Agreement between the processes of a run, over jax's coordination service.

Unlike a collective of the devices, these calls may run in a background thread beside the training step,
and a process that fails reports it instead of leaving the others waiting. Every process makes the same
calls in the same order. In a run of one process they return at once.
"""

import collections
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from a3_jax.errors import DamagedCheckpoint, InputError, RunError

TIMEOUT_SECONDS = 1200
_numbers = collections.defaultdict(itertools.count)


def is_process_zero() -> bool:
    """Returns whether this is the process that writes what all of them know."""
    return jax.process_index() == 0


def gather_and_decide(what: str, mine: Any, decide: Callable[[list[Any]], Any], alone: bool = False) -> Any:
    """Gathers every process's value in process 0, and returns its decision in every process.

    Args:
      what: a name. Calls with the same name run one after the other; those with different names may overlap.
      mine: this process's value, JSON-able.
      decide: called in process 0 with the values in the order of the processes; must not raise.
      alone: decides without the other processes.

    Raises:
      jax.errors.JaxRuntimeError: another process is gone, or didn't answer within `TIMEOUT_SECONDS`.
    """
    if alone or jax.process_count() == 1:
        return decide([mine])
    from jax._src.distributed import global_state  # jax has no public access to the service

    client: Any = global_state.client
    number, milliseconds = next(_numbers[what]), TIMEOUT_SECONDS * 1000
    name = f"a3_jax/{what}/{number}"
    if jax.process_index():
        client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(mine))
        return json.loads(client.blocking_key_value_get(f"{name}/all", milliseconds))
    others = range(1, jax.process_count())
    texts = [client.blocking_key_value_get(f"{name}/{other}", milliseconds) for other in others]
    if number:  # all others have read the previous decision, or they would not have got here
        client.key_value_delete(f"a3_jax/{what}/{number - 1}")
    decision = decide([mine, *map(json.loads, texts)])
    client.key_value_set(f"{name}/all", json.dumps(decision))
    return decision


def barrier(what: str) -> None:
    """Waits until every process has got here."""
    gather_and_decide(what, None, lambda _: None)


def run_on_all(what: str, action: Callable[[], Any], alone: bool = False) -> Any:
    """Returns the result of `action` in each process. If it fails in one, it fails in all, for that reason.

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
    first = gather_and_decide(what, problem, lambda problems: next(filter(None, problems), None), alone)
    if failure is not None:
        raise failure
    if first is not None:
        raise _unpack(first)
    return result


def run_on_process_zero(what: str, action: Callable[[], Any]) -> Any:
    """Runs `action` in process 0 alone, and returns its JSON-able result in every process.

    Raises:
      Exception: the action's own, in process 0; an `InputError` in the other processes.
    """
    result = run_on_all(what, lambda: action() if is_process_zero() else None)
    return gather_and_decide(what, result, lambda results: results[0])


def assert_same_on_all_processes(facts: Mapping[str, Any]) -> None:
    """Checks that all processes are about to do the same.

    Args:
      facts: JSON-able values by name.
    """
    every = gather_and_decide("facts", facts, lambda every: every)
    different = [
        f"process {process} has {difference}"
        for process, other in enumerate(every)
        for difference in differences("", every[0], other)
    ]
    if different:
        raise InputError(f"processes differ (process 0 -> other): {'; '.join(different)}")


def differences(name: str, old, new) -> list[str]:
    """Returns `field: old -> new` for every leaf in which two JSON-able values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        stem, keys = f"{name}." if name else "", sorted(old.keys() | new)
        pairs = [(stem + key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{name}: {old!r} -> {new!r}"]
    return [difference for pair in pairs for difference in differences(*pair)]


def _pack(error: InputError | RunError) -> list:
    if isinstance(error, RunError):
        return [error.status, error.message]
    damaged = isinstance(error, DamagedCheckpoint)
    file = None if error.file is None else str(error.file)
    return [damaged, error.message, file, error.field, error.step if damaged else None]


def _unpack(packed: list) -> InputError | RunError:
    if len(packed) == 2:
        return RunError(*packed)
    damaged, message, file, field, step = packed
    if damaged:
        return DamagedCheckpoint(message, file=file, leaf=field, step=step)
    return InputError(message, file=file, field=field)
