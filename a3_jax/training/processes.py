"""Several processes as one run: joining, agreeing, leaving together."""

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a3_jax.checkpoints.a3_format import software_versions
from a3_jax.checkpoints.agreement import agree
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PREEMPTED, InputError, RunError
from a3_jax.model.sharding import replicated
from a3_jax.training.pod_environment import find_pod

ADDRESS, NUMBER, ID = "JAX_COORDINATOR_ADDRESS", "A3_NUM_PROCESSES", "A3_PROCESS_ID"
JOIN_SECONDS = 300  # until all processes have come
HEARTBEAT_SECONDS = 60  # of silence, after which a process counts as lost
LEAVE_SECONDS = 30
_LAST_SECONDS = 2.0  # of the coordinator, in which the others hear what it has said last


def join() -> bool:
    """Joins the other processes of the run; False where there are none.

    Those that JAX_COORDINATOR_ADDRESS, A3_NUM_PROCESSES and A3_PROCESS_ID name, or else the hosts of the TPU
    pod that this one is in (`pod_environment`).

    Raises:
      InputError: an environment that can't be understood.
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
    except (RuntimeError, OSError) as error:  # the second: of the metadata server, which jax asks as well
        reason = str(error).splitlines()[0]
        raise RunError(EXIT_PREEMPTED, f"the other processes were not to be found: {reason}") from error
    ctypes.CDLL(None).signal(signal.SIGABRT, _leave_on_abort)
    return True


def coordinator_host() -> str:
    """Where process 0 is, as the others call it."""
    from jax._src.distributed import global_state  # nothing public says so

    return str(global_state.coordinator_address).rpartition(":")[0].strip("[]")


def part() -> None:
    """Waits for the other processes to come to their end too: the first to leave would look lost to them."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _leave_on_abort(_):
    # Where the coordinator is gone, jax's own thread aborts the process, and takes no callback from Python.
    os.write(2, b"a3: aborted; among several processes that is the coordinator's loss, unless said above\n")
    os._exit(EXIT_PREEMPTED)


def leave(status: int) -> NoReturn:
    """Ends this process at once: an orderly shutdown waits for processes that may be gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class PeerLost(RunError):
    """Another process of the run is gone: this one can't go on either."""


@contextlib.contextmanager
def leaving_together(before: Callable[[BaseException], None]) -> Iterator[None]:
    """Where the block fails and there are other processes, ends this one at once with its status.

    An exception that unwinds would wait for saves and shutdowns that the others no longer take part in.

    Args:
      before: called with the exception first; for a lost process that is a `PeerLost`.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            before(error)
            raise
        status, told = _status(error)
        with contextlib.suppress(Exception):
            before(told)
        if status == EXIT_FAILED or (isinstance(told, PeerLost) and "Gloo" not in str(told)):
            traceback.print_exception(error)
        print(f"a3: {told}", file=sys.stderr, flush=True)
        if is_first():
            time.sleep(_LAST_SECONDS)
        leave(status)


def _status(error: BaseException) -> tuple[int, BaseException]:
    """The exit status of a process that fails among others, and what is told of it."""
    if isinstance(error, InputError):
        return EXIT_BAD_INPUT, error
    if isinstance(error, RunError):
        return error.status, error
    text = " ".join(str(error).split())
    failed = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in text
    if failed or (isinstance(error, ValueError) and "Gloo" in text):  # where it fails while dispatched
        return EXIT_PREEMPTED, PeerLost(EXIT_PREEMPTED, f"another process is gone: {text[:200]}")
    return EXIT_FAILED, error


def is_first() -> bool:
    """Whether this is the process that writes down what all of them know."""
    return jax.process_index() == 0


def check_alike(facts: Mapping[str, Any]) -> None:
    """Whether all processes are about to do the same.

    Args:
      facts: JSON-able, by name.

    Raises:
      InputError: in every process, with every difference from process 0.
    """
    every = agree("facts", facts, lambda every: every)
    different = [
        f"process {process} has {difference}"
        for process, other in enumerate(every)
        for difference in differences("", every[0], other)
    ]
    if different:
        raise InputError(f"processes differ (process 0 -> other): {'; '.join(different)}")


def differences(name: str, old, new) -> list[str]:
    """`field: old -> new` for every leaf of two JSON-able values that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        stem, keys = f"{name}." if name else "", sorted(old.keys() | new)
        pairs = [(stem + key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{name}: {old!r} -> {new!r}"]
    return [difference for pair in pairs for difference in differences(*pair)]


def software() -> dict[str, str]:
    """What must be the same on all processes: versions, and the code itself, edited or not."""
    checksum, package = 0, pathlib.Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        checksum = zlib.crc32(str(path.relative_to(package)).encode(), checksum)
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return {"code": f"{checksum:08x}", **software_versions()}


class Votes:
    """What any process wants, known to all of them a step later, without waiting in between."""

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        here = jax.process_index()
        self._local_devices = sum(device.process_index == here for device in mesh.devices.flat)
        self._any = jax.jit(lambda wishes: wishes.max(axis=0), out_shardings=replicated(mesh))

    def cast(self, *wishes: bool) -> Any:
        """[wishes] on the devices (one process: NumPy), to be read later: whether any process had each.

        All processes vote in the same places.
        """
        mine = np.asarray([wishes], np.int32)
        if jax.process_count() == 1:
            return mine[0]
        rows = np.repeat(mine, self._local_devices, axis=0)
        return self._any(jax.make_array_from_process_local_data(self._sharding, rows))

    def decide(self, *wishes: bool) -> list[bool]:
        """`cast`, read at once."""
        return [bool(wish) for wish in np.asarray(self.cast(*wishes))]


def rows_of_process(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """Which part of each batch this process's devices hold, as (part, number of parts).

    Processes that share the tensor axis of the same rows have the same part. Where the rows are no such
    part, because the mesh deals them out to the processes in turn, each makes the whole batch: (0, 1).
    """
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    spans = {index[0].indices(batch_size)[:2] for index in indices if index is not None}
    first, last = min(spans)[0], max(spans)[1]
    rows = last - first
    if sum(end - begin for begin, end in spans) != rows or first % rows or batch_size % rows:
        return 0, 1
    return first // rows, batch_size // rows


def _named(address: str) -> dict[str, Any]:
    """The processes that the environment names, as `jax.distributed.initialize` takes them."""
    number, own = (_whole_number(name) for name in (NUMBER, ID))
    if own >= number:
        raise InputError(f"{own} is not below {NUMBER}={number}", field=ID)
    return {"coordinator_address": address, "num_processes": number, "process_id": own}


def _whole_number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise InputError(f"must be a whole number where {ADDRESS} is set, got {value!r}", field=name)
    return int(value)
