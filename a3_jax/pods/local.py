"""`a3 launch local`: several processes on this machine, restarted for as long as that brings progress.

The supervisor computes nothing itself, so that it survives whatever ends a run. It knows its children by
their exit statuses (`a3_jax.errors`), and progress by the checkpoints in the run directory:

    all end with 0                      it ends with 0
    one ends with 75, 76 or 77, or is   it ends the others and restarts all; after `max_restarts` restarts in
    killed                              a row without a new checkpoint it ends with 78
    one ends with another status        it ends the others, and ends with that status
    one ends with 1 after another left  that is a consequence: the other one's status counts
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from a3_jax.errors import (
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_NO_PROGRESS,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_STORAGE,
    InputError,
    nearest,
)
from a3_jax.paths import check_parents, write_json
from a3_jax.pods.run_records import CONFIG, append_event, newest_step, position, read_events, read_object

REPORT = "no_progress.json"
PROGRAMS = "A3_COMPILATION_CACHE"  # an environment variable, see `runtime.compile_cache`
_RESTARTABLE = (EXIT_PREEMPTED, EXIT_HUNG, EXIT_STORAGE)
_POLL = 0.1  # seconds between two looks at the children
_LEAVE = 20.0  # seconds in which the others may leave by themselves after one has left
_END, _STOP = 5.0, 10.0  # seconds from SIGTERM to SIGKILL: before a restart, at the end
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a restart; doubled as long as there is no progress
_TAIL = 1 << 16  # bytes at the end of a log that are searched for a process's last message
_ATTEMPTS_SHOWN = 5
_IN_FLIGHT = 2  # a step is recorded only after the next one was dispatched
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Launch:
    """What to keep running.

    Attributes:
      arguments: those of `a3` in each process.
      workdir: the run's directory, local.
      processes: how many. devices: virtual CPU devices of each.
      max_restarts: restarts in a row that may bring no new checkpoint.
      command: the program that gets the arguments.
    """

    arguments: Sequence[str]
    workdir: str
    processes: int = 1
    devices: int = 1
    max_restarts: int = 3
    command: Sequence[str] = (sys.executable, "-m", "a3_jax.cli")


def run_local(args) -> int:
    """Runs `a3 launch local`; returns the exit status."""
    _check(args)
    arguments = ["train", f"--config={args.config}", f"--workdir={args.workdir}", *args.config_flags]
    return supervise(Launch(arguments, args.workdir, args.processes, args.devices, args.max_restarts))


def _check(args) -> None:
    """Checks what can be seen without JAX; the children check the rest."""
    for name, least in (("processes", 1), ("devices", 1), ("max_restarts", 0)):
        if (value := getattr(args, name)) < least:
            raise InputError(f"must be at least {least}, got {value}", field=f"--{name}", file="launch local")
    for argument in args.config_flags:
        if argument.startswith("--") and not argument.startswith(("--config.", "--noconfig.")):
            flags = ("--processes", "--devices", "--config", "--workdir", "--max_restarts")
            near = nearest(argument.split("=")[0], flags)
            raise InputError(f"unknown argument {argument!r}{near}", file="launch local")
    if not os.path.isfile(args.config.partition(":")[0]):  # a string after a colon is get_config's argument
        raise InputError("no such config file, or it can't be read", file=args.config)
    if "://" in args.workdir:
        raise InputError("must be a directory of this machine", file=args.workdir, field="--workdir")
    check_parents(args.workdir)
    if os.path.exists(args.workdir) and not os.path.isdir(args.workdir):
        raise InputError("is no directory", file=args.workdir, field="--workdir")


def supervise(launch: Launch) -> int:
    """Runs the processes to their end; must be called in the main thread.

    SIGTERM and SIGINT are passed on, after which nothing is restarted. If the supervisor is killed, its
    children receive SIGTERM.

    Returns:
      0, 78 or a child's status as in the table above; after a signal 75, or the worst status if none is
      75; 77 if this process itself can't go on.
    """
    try:
        os.makedirs(os.path.join(launch.workdir, "logs"), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(launch.workdir, REPORT))  # the last launch's
    except OSError as error:
        raise InputError(f"can't be written: {error.strerror or error}", file=launch.workdir) from error
    try:
        with _signals() as received, _programs() as programs:
            return _restart_while_useful(launch, received, programs)
    except OSError as error:  # no room for a log, or no process can be started
        _say(f"a3 launch: {error}")
        return EXIT_STORAGE


def _restart_while_useful(launch: Launch, received: list[int], programs: str) -> int:
    """Runs attempt after attempt; `received` grows with each signal, `programs` is their cache."""
    restarts, fruitless = 0, 0
    failures: list[list[int | None]] = []
    while True:
        newest = newest_step(launch.workdir)
        attempt = _Attempt(launch, restarts + 1, programs)
        try:
            left, fatal = _watch(attempt, received)
        finally:
            attempt.end(0)
        if received:
            return _status_after_signal(attempt.statuses().values())
        if fatal:
            return attempt.explain(*next(iter(fatal.items())))
        if not any(left.values()):
            return EXIT_OK
        process, status = _first_cause(left)
        failures.append([left.get(process) for process in range(launch.processes)])
        now = newest_step(launch.workdir)
        fruitless = 0 if now is not None and (newest is None or now > newest) else fruitless + 1
        if fruitless > launch.max_restarts:
            _say("\n".join(write_report(launch.workdir, restarts, launch.max_restarts, failures)))
            return EXIT_NO_PROGRESS
        pause = min(_FIRST_PAUSE * 2 ** max(0, fruitless - 1), _LONGEST_PAUSE)
        _say(f"a3 launch: process {process} {_in_words(status)}; all start again in {pause:g} s")
        end = time.monotonic() + pause
        while time.monotonic() < end and not received:
            time.sleep(min(_POLL, pause))
        if received:
            return EXIT_PREEMPTED
        restarts += 1
        event = {"time": round(time.time(), 3), "event": "restart", "exit_status": status, "process": process,
                 "restarts_without_progress": fruitless}  # fmt: skip
        try:
            append_event(launch.workdir, event)
        except OSError as error:
            _say(f"a3 launch: warning: the restart is not on record: {error}")


def _watch(attempt: "_Attempt", received: list[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Waits until an attempt is over, and ends what is left of it.

    Returns:
      {process: status} of those that left by themselves, in that order; those of them that are fatal.
    """
    left: dict[int, int] = {}
    fatal: dict[int, int] = {}
    passed_on, deadline = 0, None
    while True:
        new = {process: status for process, status in attempt.statuses().items() if process not in left}
        # A process that fails after another has left fails for want of it; a death by signal is a cause.
        is_consequence = any(left.values()) or min(new.values(), default=0) < 0
        for process, status in new.items():
            if _is_fatal(status) and not (is_consequence and status == EXIT_FAILED):
                fatal[process] = status
        left.update(new)
        attempt.relay()
        if len(left) == len(attempt.children):
            return left, fatal
        while passed_on < len(received):
            passed_on += 1
            attempt.signal(signal.SIGTERM)
            deadline = time.monotonic() + _STOP if passed_on > 1 else None
        if any(left.values()) or (received and left):
            deadline = deadline or time.monotonic() + _LEAVE
        is_late = deadline is not None and time.monotonic() > deadline
        if received:  # saving may take its time, unless this is the second signal or the others have left
            if is_late:
                attempt.end(0)
        elif fatal or is_late:
            attempt.end(_STOP if fatal else _END)
            return left, fatal
        time.sleep(_POLL)


class _Attempt:
    """The processes of one attempt, each with a log."""

    def __init__(self, launch: Launch, number: int, programs: str):
        directory = os.path.join(launch.workdir, "logs")
        self.children: list[subprocess.Popen] = []
        self._logs = [os.path.join(directory, f"process-{n}.log") for n in range(launch.processes)]
        self._begins: list[int] = []  # byte of each log at which this attempt's lines begin
        self._relayed = 0  # bytes of process 0's log
        what = f"attempt {number}: {launch.processes} x {launch.devices} CPU devices"
        _say(f"a3 launch: {what}, logs in {directory}, process 0 also here:")
        began, port = time.strftime("%Y-%m-%d %H:%M:%S %z"), _free_port()
        try:
            for process, log in enumerate(self._logs):
                command = shlex.join(["a3", *launch.arguments])
                with open(log, "ab") as file:
                    file.write(f"=== attempt {number}, process {process}, {began}: {command}\n".encode())
                    file.flush()
                    self._begins.append(file.tell())
                    environment = child_environment(launch, process, port, programs)
                    self.children.append(start_child([*launch.command, *launch.arguments], environment, file))
        except BaseException:
            self.end(0)
            raise

    def statuses(self) -> dict[int, int]:
        """Returns {process: status} of those that have ended; -N after a death by signal N."""
        polled = {process: child.poll() for process, child in enumerate(self.children)}
        return {process: status for process, status in polled.items() if status is not None}

    def signal(self, number: int) -> None:
        """Sends a signal to all that are alive."""
        for child in self.children:
            child.send_signal(number)

    def end(self, seconds: float) -> None:
        """Ends all that are alive, by force after so many seconds."""
        if seconds:
            self.signal(signal.SIGTERM)
        end = time.monotonic() + seconds
        while len(self.statuses()) < len(self.children) and time.monotonic() < end:
            time.sleep(_POLL)
        self.signal(signal.SIGKILL)
        for child in self.children:
            child.wait()
        self.relay()

    def relay(self) -> None:
        """Prints what process 0 has written since the last call, in whole lines."""
        if not self._begins:  # it could not be started
            return
        lines = _read(self._logs[0], self._begins[0] + self._relayed)
        lines = lines[: lines.rfind(b"\n") + 1]
        self._relayed += len(lines)
        if lines:
            _say(lines.decode("utf-8", errors="replace").rstrip("\n"))

    def explain(self, process: int, status: int) -> int:
        """Prints why a process ended, with its own last message as the last line; returns the status."""
        log, begin = self._logs[process], self._begins[process]
        _say(f"a3 launch: process {process} {_in_words(status)}; its log: {log}")
        tail = _read(log, max(begin, os.path.getsize(log) - _TAIL)).decode("utf-8", errors="replace")
        lines = [line for line in tail.splitlines() if line.strip()]
        words = [line for line in lines if re.match("a3: (?!warning)", line, re.IGNORECASE)]
        _say((words or lines or ["a3: it printed nothing"])[-1])
        return status


def start_child(command: Sequence[str], environment: dict[str, str], log) -> subprocess.Popen:
    """Starts a process that writes into an open log and, on Linux, receives SIGTERM when this one dies."""
    return subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
        preexec_fn=_bound_to_this_process() if sys.platform == "linux" else None,
        start_new_session=True,  # Ctrl-C in a terminal is for the supervisor, which passes it on once
    )  # fmt: skip


def _bound_to_this_process() -> Callable[[], None]:
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def bind():
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os._exit(EXIT_PREEMPTED)

    return bind


def child_environment(launch: Launch, process: int, port: int, programs: str) -> dict[str, str]:
    """Returns the environment of a process.

    Args:
      launch: what to run.
      process: its index.
      port: the coordinator's.
      programs: directory for compiled programs, unless the config names one.
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
    environment[PROGRAMS] = programs
    for name in ("JAX_COORDINATOR_ADDRESS", "A3_NUM_PROCESSES", "A3_PROCESS_ID"):
        environment.pop(name, None)
    flag = f"--xla_force_host_platform_device_count={launch.devices}"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
    if launch.processes > 1:
        environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        environment["A3_NUM_PROCESSES"] = str(launch.processes)
        environment["A3_PROCESS_ID"] = str(process)
    return environment


@contextlib.contextmanager
def _programs() -> Iterator[str]:
    """Gives a directory for compiled programs, unless the user has named one; "off" if there is no room."""
    if os.environ.get(PROGRAMS):
        yield os.path.expanduser(os.environ[PROGRAMS])
        return
    try:
        own = tempfile.TemporaryDirectory(prefix="a3-programs-", ignore_cleanup_errors=True)
    except OSError:
        own = contextlib.nullcontext("off")
    with own as directory:
        yield directory


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Gives the list to which SIGTERM and SIGINT are added as they arrive."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_fatal(status: int) -> bool:
    """Returns whether a restart would only fail in the same way."""
    return status > 0 and status not in _RESTARTABLE


def _first_cause(left: dict[int, int]) -> tuple[int, int]:
    """Returns the (process, status) to blame: 75 and 1 are mostly consequences of another one's end."""
    failed = [(process, status) for process, status in left.items() if status]
    return next((pair for pair in failed if pair[1] not in (EXIT_PREEMPTED, EXIT_FAILED)), failed[0])


def _status_after_signal(statuses) -> int:
    """Returns 75 if any status is that, else the worst one; a death by signal counts as 75."""
    statuses = [EXIT_PREEMPTED if status < 0 else status for status in statuses]
    if EXIT_PREEMPTED in statuses:
        return EXIT_PREEMPTED
    return max(statuses, key=lambda status: (_is_fatal(status), status))


def write_report(
    workdir, restarts: int, fruitless: int, failures: Sequence[Sequence[int | None]]
) -> list[str]:
    """Writes `no_progress.json`, and returns the same as lines of text; the last one is the summary.

    Examples are numbered in the order in which the run reads them: step n reads `batch_size` of them from
    (n - 1) * batch_size on, shifted by those that a rollback skipped.

    Args:
      workdir: the run's directory.
      restarts: number of restarts in all. fruitless: of the last ones, without a new checkpoint.
      failures: exit status of each process, for each attempt; None: ended by the supervisor.
    """
    try:
        step, skipped = position(read_events(workdir)[0])
    except (InputError, OSError):
        step, skipped = None, 0
    newest = newest_step(workdir)
    size: Any = read_object(os.path.join(workdir, CONFIG)).get("batch_size")
    last, in_flight = list(failures)[-_ATTEMPTS_SHOWN:], []
    shown = [", ".join("ended from here" if s is None else str(s) for s in statuses) for statuses in last]
    lines = [f"a3 launch: exit statuses by process, of the last attempts: {'; '.join(shown)}"]
    if step is not None:
        lines.append(f"a3 launch: the step after {step} was in flight")
        in_flight = [{"step": number} for number in range(step + 1, step + 1 + _IN_FLIGHT)]
    for entry in in_flight if isinstance(size, int) else ():
        first = (entry["step"] + skipped - 1) * size
        entry |= {"first_example": first, "last_example": first + size - 1}
        examples = f"{first} to {first + size - 1} (running numbers)"
        lines.append(f"a3 launch: step {entry['step']} has the examples {examples}")
    report = {
        "restarts": restarts, "restarts_without_progress": fruitless,
        "exit_statuses": [list(statuses) for statuses in last],
        "newest_checkpoint": newest, "last_step": step, "in_flight": in_flight,
    }  # fmt: skip
    try:
        write_json(os.path.join(workdir, REPORT), report)
    except InputError as error:  # a full disk may be the cause of all this
        lines.append(f"a3 launch: warning: {error}")
    since = "no checkpoint" if newest is None else f"no checkpoint after step {newest}"
    return [*lines, f"a3: {workdir}: no progress: {since} in {fruitless} restarts in a row"]


def _in_words(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _read(path, begin: int) -> bytes:
    """Returns the bytes of a file from one on; empty if the file is gone."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(begin)
        return file.read()
    return b""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a reader that has left is no reason to end a run
        print(text, file=sys.stderr, flush=True)
