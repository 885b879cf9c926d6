"""`a3 launch local`: several processes on this machine, started again as long as that leads anywhere.

The supervisor knows its children by exit status alone (`a3_jax.errors`), and progress by the checkpoints
in the run directory. It computes nothing itself, so that whatever ends a run leaves it standing. What makes
the next attempt quick outlives this one: imports in the process that all are forked from, and compiled
programs in a directory that lasts as long as the supervisor.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

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
from a3_jax.paths import check_parents
from a3_jax.pods.no_progress import clear_report, write_report
from a3_jax.pods.prepared import Prepared, run_a3
from a3_jax.pods.records import append_event, newest_step

_RESTARTABLE = (EXIT_PREEMPTED, EXIT_HUNG, EXIT_STORAGE)
_POLL = 0.1  # seconds between two looks at the children
_LEAVE = 20.0  # seconds in which the others leave by themselves when one has left to be started again
_END, _STOP = 5.0, 10.0  # seconds from SIGTERM to SIGKILL: before a restart, at the end
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a restart; doubled while nothing comes of it
PROGRAMS = "A3_COMPILATION_CACHE"  # an environment variable, of `training.compilation`
_TAIL = 1 << 16  # bytes of a log in which a process's last word is looked for


@dataclasses.dataclass(frozen=True)
class Launch:
    """What to keep running.

    Attributes:
      arguments: of each process's function.
      workdir: the run's directory, local.
      processes: how many. devices: virtual CPU devices of each.
      max_restarts: restarts in a row that may bring no new checkpoint.
      function: what each process runs: `a3`.
    """

    arguments: Sequence[str]
    workdir: str
    processes: int = 1
    devices: int = 1
    max_restarts: int = 3
    function: Callable[[Sequence[str]], int] = run_a3


def run_local(args) -> int:
    """`a3 launch local`: the exit status."""
    _check(args)
    arguments = ["train", f"--config={args.config}", f"--workdir={args.workdir}", *args.config_flags]
    return supervise(Launch(arguments, args.workdir, args.processes, args.devices, args.max_restarts))


def _check(args) -> None:
    """What is cheap to see here; the rest is the children's to say."""
    for name, least in (("processes", 1), ("devices", 1), ("max_restarts", 0)):
        if (value := getattr(args, name)) < least:
            raise InputError(f"must be at least {least}, got {value}", field=f"--{name}", file="launch local")
    for argument in args.config_flags:
        if argument.startswith("--") and not argument.startswith(("--config.", "--noconfig.")):
            flags = ("--processes", "--devices", "--config", "--workdir", "--max_restarts")
            near = nearest(argument.split("=")[0], flags)
            raise InputError(f"unknown argument {argument!r}{near}", file="launch local")
    if not os.path.isfile(args.config.partition(":")[0]):  # a string behind a colon is get_config's
        raise InputError("no such config file, or it can't be read", file=args.config)
    if "://" in args.workdir:
        raise InputError("must be a directory of this machine", file=args.workdir, field="--workdir")
    check_parents(args.workdir)
    if os.path.exists(args.workdir) and not os.path.isdir(args.workdir):
        raise InputError("is no directory", file=args.workdir, field="--workdir")


def supervise(launch: Launch) -> int:
    """Runs the processes to their end; to be called in the main thread.

    SIGTERM and SIGINT are passed on, and then nothing is started any more. If the supervisor is killed,
    its children send themselves a SIGTERM.

    Returns:
      0 when all have ended well; the status of the one that must not be started again; 75 or the worst
      status after a signal; 78 after `max_restarts` restarts without a new checkpoint; 77 when this process
      itself can't go on.

    Raises:
      InputError: the run's directory can't be written.
    """
    try:
        os.makedirs(os.path.join(launch.workdir, "logs"), exist_ok=True)
        clear_report(launch.workdir)
    except OSError as error:
        raise InputError(f"can't be written: {error.strerror or error}", file=launch.workdir) from error
    try:
        with _signals() as received, _programs() as programs:
            return _Supervisor(launch, received, programs).run()
    except OSError as error:  # no room for a log, no process to be had
        _say(f"a3 launch: {error}")
        return EXIT_STORAGE


class _Supervisor:
    """Attempt after attempt.

    Attributes:
      received: signals so far, in the order they came; grows by itself.
    """

    def __init__(self, launch: Launch, received: list[int], programs: str):
        self._launch, self.received, self._programs = launch, received, programs

    def run(self) -> int:
        launch, restarts, fruitless = self._launch, 0, 0
        failures: list[list[int | None]] = []
        while True:
            newest = self._newest()
            group = _Group(launch, restarts + 1, self._programs)
            try:
                left, fatal = self._watch(group)
            finally:
                group.end(0)
            statuses = group.statuses()
            if self.received:
                return _status_after_signal(statuses.values())
            if fatal:
                return group.tell(*next(iter(fatal.items())))
            if not any(left.values()):
                return EXIT_OK
            process, status = _first_cause(left)
            failures.append([left.get(process) for process in range(launch.processes)])
            fruitless = 0 if self._newest() > newest else fruitless + 1
            if fruitless > launch.max_restarts:
                report = write_report(launch.workdir, restarts, launch.max_restarts, failures)
                _say("\n".join(report))
                return EXIT_NO_PROGRESS
            self._pause(min(_FIRST_PAUSE * 2 ** max(0, fruitless - 1), _LONGEST_PAUSE), process, status)
            if self.received:
                return EXIT_PREEMPTED
            restarts += 1
            self._record(status, process, fruitless)

    def _newest(self) -> int:
        newest = newest_step(self._launch.workdir)
        return -1 if newest is None else newest

    def _watch(self, group: "_Group") -> tuple[dict[int, int], dict[int, int]]:
        """Waits until an attempt is over, and sees to its end.

        Returns:
          {process: status} of those that left by themselves, in that order; those of them that end it all.
        """
        left: dict[int, int] = {}
        fatal: dict[int, int] = {}
        passed_on, deadline = 0, None
        while True:
            new = {process: status for process, status in group.statuses().items() if process not in left}
            # One that fails when another has gone, fails for that; a death by signal is nobody's echo.
            is_echo = any(left.values()) or min(new.values(), default=0) < 0
            for process, status in new.items():
                if _is_fatal(status) and not (is_echo and status == EXIT_FAILED):
                    fatal[process] = status
            left.update(new)
            group.relay()
            if len(left) == self._launch.processes:
                return left, fatal
            while passed_on < len(self.received):
                passed_on += 1
                group.signal(signal.SIGTERM)
                deadline = time.monotonic() + _STOP if passed_on > 1 else None
            if self.received:  # one that saves takes its time; told twice, or alone, it has had it
                if left:
                    deadline = deadline or time.monotonic() + _LEAVE
                if deadline is not None and time.monotonic() > deadline:
                    group.end(0)
            elif fatal:
                group.end(_STOP)
                return left, fatal
            elif any(left.values()):
                deadline = deadline or time.monotonic() + _LEAVE
                if time.monotonic() > deadline:
                    group.end(_END)
                    return left, fatal
            time.sleep(_POLL)

    def _pause(self, seconds: float, process: int, status: int) -> None:
        _say(f"a3 launch: process {process} {_in_words(status)}; all start again in {seconds:g} s")
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.received:
            time.sleep(min(_POLL, seconds))

    def _record(self, status: int, process: int, fruitless: int) -> None:
        event = {"time": round(time.time(), 3), "event": "restart", "exit_status": status, "process": process,
                 "restarts_without_progress": fruitless}  # fmt: skip
        try:
            append_event(self._launch.workdir, event)
        except OSError as error:
            _say(f"a3 launch: warning: the restart is not on record: {error}")


class _Group:
    """The processes of one attempt, each with a log."""

    def __init__(self, launch: Launch, attempt: int, programs: str):
        directory = os.path.join(launch.workdir, "logs")
        self._logs = [os.path.join(directory, f"process-{n}.log") for n in range(launch.processes)]
        self._children: list[Prepared] = []
        self._begins: list[int] = []  # byte of each log where this attempt's lines begin
        self._relayed = 0  # bytes of process 0's
        what = f"attempt {attempt}: {launch.processes} x {launch.devices} CPU devices"
        _say(f"a3 launch: {what}, logs in {directory}, process 0 also here:")
        began, port = time.strftime("%Y-%m-%d %H:%M:%S %z"), _free_port()
        command = shlex.join(["a3", *launch.arguments])
        try:
            for process, log in enumerate(self._logs):
                heading = f"=== attempt {attempt}, process {process}, {began}: {command}\n"
                with open(log, "ab") as file:
                    file.write(heading.encode())
                    self._begins.append(file.tell())
                environment = child_environment(launch, process, port, programs)
                self._children.append(Prepared(launch.function, launch.arguments, environment, log))
        except BaseException:
            self.end(0)
            raise

    def statuses(self) -> dict[int, int]:
        """{process: status} of those that have ended; minus the signal's number for a death by signal."""
        polled = {process: child.poll() for process, child in enumerate(self._children)}
        return {process: status for process, status in polled.items() if status is not None}

    def signal(self, number: int) -> None:
        """To all that live."""
        for child in self._children:
            child.send_signal(number)  # looks first whether it lives

    def end(self, seconds: float) -> None:
        """Ends all that live, by force after so many seconds."""
        if seconds:
            self.signal(signal.SIGTERM)
        end = time.monotonic() + seconds
        while len(self.statuses()) < len(self._children) and time.monotonic() < end:
            time.sleep(_POLL)
        self.signal(signal.SIGKILL)
        for child in self._children:
            child.wait()
        self.relay()

    def relay(self) -> None:
        """Passes on what process 0 has written since, in whole lines."""
        if not self._begins:  # it could not be started
            return
        lines = _read(self._logs[0], self._begins[0] + self._relayed)
        lines = lines[: lines.rfind(b"\n") + 1]
        self._relayed += len(lines)
        if lines:
            _say(lines.decode("utf-8", errors="replace").rstrip("\n"))

    def tell(self, process: int, status: int) -> int:
        """Says why a process ended, its own last word as the last line; the status."""
        log, begin = self._logs[process], self._begins[process]
        _say(f"a3 launch: process {process} {_in_words(status)}; its log: {log}")
        tail = _read(log, max(begin, os.path.getsize(log) - _TAIL)).decode("utf-8", errors="replace")
        lines = [line for line in tail.splitlines() if line.strip()]
        words = [line for line in lines if re.match("a3: (?!warning)", line, re.IGNORECASE)]
        _say((words or lines or ["a3: it said nothing"])[-1])
        return status


def child_environment(launch: Launch, process: int, port: int, programs: str) -> dict[str, str]:
    """The variables that tell a process its place.

    Args:
      port: the coordinator's.
      programs: directory for compiled programs, unless the config names one.
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
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
    """A directory for compiled programs, unless the user has named one; "off" where there is no room."""
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
    """The list that SIGTERM and SIGINT are added to as they come."""
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
    """Whether starting again would only lead there again."""
    return status > 0 and status not in _RESTARTABLE


def _first_cause(left: dict[int, int]) -> tuple[int, int]:
    """The (process, status) to blame: 75 and 1 are mostly what the others say after one has gone."""
    failed = [(process, status) for process, status in left.items() if status]
    return next((pair for pair in failed if pair[1] not in (EXIT_PREEMPTED, EXIT_FAILED)), failed[0])


def _status_after_signal(statuses) -> int:
    """75 if any says so; else the worst, where a death by signal is one that can be started again."""
    statuses = [EXIT_PREEMPTED if status < 0 else status for status in statuses]
    if EXIT_PREEMPTED in statuses:
        return EXIT_PREEMPTED
    return max(statuses, key=lambda status: (_is_fatal(status), status))


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
    """The bytes of a file from one on; none if it has gone."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(begin)
        return file.read()
    return b""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read along has left: no reason to end a run
        print(text, file=sys.stderr, flush=True)
