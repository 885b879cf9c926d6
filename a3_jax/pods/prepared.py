"""Processes that start without imports, forked from one that has imported everything and used no device."""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker

_ROOMS = "training.run", "data.feature_converter", "data.prepared", "data.tasks"
PRELOAD = [f"a3_jax.{room}" for room in _ROOMS]
_PR_SET_NAME = 15
_OURS = {signal.SIGINT, signal.SIGTERM}  # not for the process that all are forked from

# Elsewhere than on Linux system libraries don't survive a fork: there each process imports for itself.
context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
context.set_forkserver_preload(PRELOAD)


def run_a3(arguments: Sequence[str]) -> int:
    """`a3 ARGUMENTS`, as its console script runs it."""
    sys.argv = ["a3", *arguments]
    return importlib.import_module("a3_jax.cli").console()  # a program to us: it imports us, not we it


class Prepared:
    """A function in a process of its own, with the methods of `subprocess.Popen` that a supervisor needs.

    Standard output and error go to the end of a log. It leads a session of its own: Ctrl-C in a terminal is
    not for it. When this process dies, it gets a SIGTERM.
    """

    def __init__(
        self,
        function: Callable[[Sequence[str]], int],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: str,
    ):
        """Starts it; the first start waits for the imports.

        Args:
          function: of a module, such as `run_a3`; returns the exit status.
          environment: instead of this process's. What a library reads when it is imported, such as
            JAX_PLATFORMS, has to be the same for all.

        Raises:
          OSError: what all are forked from has ended.
        """
        self._process = context.Process(target=_run, args=(function, list(arguments), dict(environment), log))
        try:
            with _as_parent(environment):
                self._process.start()
        except EOFError as error:
            raise OSError("the imports of `a3 train` ended, see above") from error

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        """The exit status, minus the signal's number for a death by signal; None while it lives."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """If it lives."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        """Its status, or None after so many seconds."""
        self._process.join(timeout)
        return self.poll()


@contextlib.contextmanager
def _as_parent(environment) -> Iterator[None]:
    """The first start makes what all are forked from: in this environment, deaf to signals of its group."""
    resource_tracker.ensure_running()  # at its own start it would unblock them
    before = dict(os.environ)
    os.environ.update(environment)
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        os.environ.clear()
        os.environ.update(before)


def _run(function, arguments, environment, log) -> None:
    """What a process does once it has been forked."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if sys.platform == "linux":  # the name in `ps`
        ctypes.CDLL(None).prctl(_PR_SET_NAME, " ".join(["a3", *arguments[:1]]).encode())
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    status = function(arguments)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk doesn't change the status
            stream.flush()
    os._exit(status)  # an orderly end waits for threads of libraries


def _end_with(parent) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
