"""Several processes as one run: joining, sharing flags and batches, leaving together."""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a3_jax.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED, InputError, RunError
from a3_jax.model.sharding import replicated
from a3_jax.runtime.coordination import is_process_zero
from a3_jax.runtime.tpu_hosts import find_pod

ADDRESS, NUMBER, ID = "JAX_COORDINATOR_ADDRESS", "A3_NUM_PROCESSES", "A3_PROCESS_ID"
JOIN_SECONDS = 300  # for all processes to arrive
HEARTBEAT_SECONDS = 20  # of silence, after which a process counts as lost and all others end
LEAVE_SECONDS = 30
_FAREWELL_SECONDS = 2.0  # for which the coordinator stays, so that the others get its last message


def join() -> bool:
    """Joins the other processes of the run; returns False if there are none.

    These are the processes that JAX_COORDINATOR_ADDRESS, A3_NUM_PROCESSES and A3_PROCESS_ID name, or else
    the hosts of the TPU pod that this host belongs to (`tpu_hosts`). From here on a process that dies ends
    all others: jax aborts them once its heartbeats stop, which `_leave_on_abort` turns into status 75.

    Raises:
      InputError: the environment makes no sense.
      RunError: the others didn't come in time.
    """
    if jax.distributed.is_initialized():
        return True
    address = os.environ.get(ADDRESS)
    is_named = bool(address) and (NUMBER in os.environ or ID in os.environ)
    where = None if is_named else find_pod(address)  # a manifest may name the address alone
    if where is None and address:
        where = _named(address)
    if not where:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM from ours
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except ValueError as error:
        raise InputError(f"jax finds no pod where {where} says that there is one: {error}") from error
    except (RuntimeError, OSError) as error:  # OSError: from the metadata server, which jax asks as well
        reason = str(error).splitlines()[0]
        raise RunError(EXIT_PREEMPTED, f"the other processes could not be found: {reason}") from error
    ctypes.CDLL(None).signal(signal.SIGABRT, _leave_on_abort)
    return True


def shutdown() -> None:
    """Waits for the other processes to finish too: one that left earlier would look lost to them."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _leave_on_abort(_):
    # jax aborts the process in a thread of its own when another process is lost. It offers no callback.
    os.write(2, b"a3: aborted; among several processes: another one is gone, unless a cause is given above\n")
    os._exit(EXIT_PREEMPTED)


def leave(status: int) -> NoReturn:
    """Ends this process at once: an orderly shutdown waits for processes that may be gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class PeerLost(RunError):
    """Another process of the run is gone, so this one can't go on."""


@contextlib.contextmanager
def exit_on_failure(before: Callable[[BaseException], None]) -> Iterator[None]:
    """Ends this process at once, with its exit status, if the block fails and there are other processes.

    An exception that unwinds would wait for saves and shutdowns that the others no longer take part in.

    Args:
      before: called first with the exception, or with a `PeerLost` if that is its cause.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            before(error)
            raise
        status, cause = _status(error)
        with contextlib.suppress(Exception):
            before(cause)
        if status == EXIT_FAILED or (isinstance(cause, PeerLost) and "Gloo" not in str(cause)):
            traceback.print_exception(error)
        print(f"a3: {cause}", file=sys.stderr, flush=True)
        if is_process_zero():
            time.sleep(_FAREWELL_SECONDS)
        leave(status)


def _status(error: BaseException) -> tuple[int, BaseException]:
    """Returns the exit status of a process that fails among others, and the error to report."""
    if isinstance(error, InputError):
        return EXIT_BAD_INPUT, error
    if isinstance(error, RunError):
        return error.status, error
    text = " ".join(str(error).split())
    failed = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
    if failed or (isinstance(error, ValueError) and "Gloo" in text):  # a ValueError: it failed at dispatch
        return EXIT_PREEMPTED, PeerLost(EXIT_PREEMPTED, f"another process is gone: {text[:200]}")
    return EXIT_FAILED, error


class ProcessFlags:
    """Per-process flags reduced across processes; read one step later, so the step never blocks."""

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        here = jax.process_index()
        self._local_devices = sum(device.process_index == here for device in mesh.devices.flat)
        self._any = jax.jit(lambda flags: flags.max(axis=0), out_shardings=replicated(mesh))

    def any(self, *flags: bool) -> Any:
        """Returns, for each flag, whether any process has set it: [flags] int32 on the devices.

        With one process it is a NumPy array. All processes call this at the same points.
        """
        mine = np.asarray([flags], np.int32)
        if jax.process_count() == 1:
            return mine[0]
        rows = np.repeat(mine, self._local_devices, axis=0)
        return self._any(jax.make_array_from_process_local_data(self._sharding, rows))

    def any_now(self, *flags: bool) -> list[bool]:
        """Returns `any` as Python values, waiting for the other processes."""
        return [bool(flag) for flag in np.asarray(self.any(*flags))]


def rows_of_process(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """Returns the part of each batch that this process's devices hold, as (part, number of parts).

    Processes that share the tensor axis of the same rows have the same part. If the mesh deals the rows
    out to the processes in turn, their rows are no such part, and each makes the whole batch: (0, 1).
    """
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    spans = {index[0].indices(batch_size)[:2] for index in indices if index is not None}
    first, last = min(spans)[0], max(spans)[1]
    rows = last - first
    if sum(end - begin for begin, end in spans) != rows or first % rows or batch_size % rows:
        return 0, 1
    return first // rows, batch_size // rows


def _named(address: str) -> dict[str, Any]:
    """Returns the processes that the environment names, as `jax.distributed.initialize` takes them."""
    number, own = (_whole_number(name) for name in (NUMBER, ID))
    if own >= number:
        raise InputError(f"{own} is not below {NUMBER}={number}", field=ID)
    return {"coordinator_address": address, "num_processes": number, "process_id": own}


def _whole_number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise InputError(f"must be a whole number where {ADDRESS} is set, got {value!r}", field=name)
    return int(value)
