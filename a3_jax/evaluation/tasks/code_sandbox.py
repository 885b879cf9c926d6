"""Runs programs that a model wrote, in isolation, and only where the user explicitly allows it.

Each runs in a fresh interpreter without environment, site packages or standard input, in a directory of its
own that is deleted afterwards, with limits on time, memory, files and processes, in a process group that
is killed as a whole. Inside, an audit hook refuses to open files for writing, to start programs and to
use the network; where the kernel allows it, the process also enters a user namespace without network, in
which every mounted file system is read-only. That contains mistakes. It does not stop malice: run untrusted
models in a container.
"""

import contextlib
import dataclasses
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks import sandbox_child
from a3_jax.evaluation.tasks.catalogue import CODE, Task

SECONDS = 3.0  # per program, as in human-eval-infilling
MEMORY_BYTES = 1 << 30

_START_SECONDS = 60.0  # for the interpreter, on a busy machine; the program's own time begins after it
_MOST_MESSAGE = 2000


@dataclasses.dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
      passed: whether it ran to its end in time.
      result: "passed", "timed out", or "failed: " and the exception.
    """

    passed: bool
    result: str


def check_execution(tasks: Iterable[Task], allow: bool) -> None:
    """Refuses tasks that run programs unless the user allowed it; called before anything is opened."""
    names = [task.name for task in tasks if task.kind == CODE]
    if names and not allow:
        message = "runs programs that the model wrote; give --allow_code_execution if that is all right here"
        raise InputError(f"{names[0]} {message}", field="tasks")
    if names and not hasattr(os, "killpg"):
        raise InputError(f"{names[0]} runs programs, which needs a POSIX system", field="tasks")


def check_program(program: str, seconds: float = SECONDS) -> ProgramResult:
    """Runs a program with its tests in isolation and tells whether it passed.

    A program that leaves early (`sys.exit`, `os._exit`) has not passed its tests.
    """
    secret = secrets.token_hex(16)
    arguments = [str(seconds), str(MEMORY_BYTES), secret]
    with tempfile.TemporaryDirectory(prefix="a3-program-") as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sandbox_child.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            answer = _run(process, program, seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout:
                process.stdout.close()
    if answer is None:
        return ProgramResult(False, "timed out")
    if answer == secret.encode():
        return ProgramResult(True, "passed")
    text = answer.decode("utf-8", "replace")
    if text.startswith("failed "):
        return ProgramResult(False, "failed: " + text.removeprefix("failed "))
    return ProgramResult(False, "failed: ended before its tests did")


def _run(process: subprocess.Popen, program: str, seconds: float) -> bytes | None:
    """Returns what the child writes after its start; None if time ran out."""
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # it died at once
        process.stdin.write(program.encode("utf-8", "surrogatepass"))
        process.stdin.close()
    answer, end = b"", time.monotonic() + _START_SECONDS
    has_started = False
    while (wait := end - time.monotonic()) > 0 and len(answer) < _MOST_MESSAGE:
        if not select.select([process.stdout], [], [], wait)[0]:
            break
        block = os.read(process.stdout.fileno(), _MOST_MESSAGE)
        if not block:
            return answer.removeprefix(sandbox_child.STARTED)
        answer += block
        if not has_started and answer.startswith(sandbox_child.STARTED):
            has_started, end = True, time.monotonic() + seconds
    return None
