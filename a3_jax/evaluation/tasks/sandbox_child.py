"""The child process of `code_sandbox`: a script in an interpreter of its own; imports nothing of ours.

    python -I -S -B sandbox_child.py SECONDS MEMORY SECRET < program

Writes "started" to its standard output, then the secret if the program ran to its end, or "failed " and the
exception. The program itself has no standard streams.
"""

import contextlib
import os
import sys

# Prefixes of audit events: what the program of a task never needs.
REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "shutil.", "ftplib.", "smtplib.", "urllib.", "http."),
    *("sqlite3.", "syslog.", "webbrowser.", "resource.", "signal.pthread_kill", "sys.addaudithook"),
    *("os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.chflags", "os.setxattr", "os.removexattr", "os.utime"),
)
REFUSED_MODULES = frozenset({"_posixsubprocess", "_ctypes"})  # they start programs without an audit event
STARTED = b"started\n"

_NO_NEW_PRIVILEGES = 38
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x00020000 | 0x08000000  # user, network, mounts, IPC
_MOUNT_SETATTR, _HERE, _RECURSIVE = 442, -100, 0x8000


def leave_the_rest() -> bool:
    """Enters namespaces of its own, without network and with every file system read-only.

    Returns:
      Whether the system allows it; limits and the audit hook hold in either case.
    """
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if library.unshare(_NEW_NAMESPACES):
            return False
        read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)
        size = ctypes.sizeof(read_only)
        return library.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, ctypes.byref(read_only), size) == 0
    except (OSError, AttributeError):  # a system without these calls
        return False


def set_limits(seconds: float, memory: int) -> None:
    """Sets hard limits of this process; those that the system doesn't know are left out."""
    import resource

    limits = {
        "RLIMIT_CPU": int(seconds) + 2,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": 0,
    }
    for name, value in limits.items():
        what = getattr(resource, name, None)
        if what is None:
            continue
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))


def refuse(event: str, arguments: tuple) -> None:
    """Refuses what a program must not do: the audit hook, which once added stays."""
    if event.startswith(REFUSED):
        raise PermissionError(f"refused: {event}")
    if event == "import" and arguments[0] in REFUSED_MODULES:
        raise PermissionError(f"refused: to import {arguments[0]}")
    if event == "open":
        mode, flags = arguments[1] or "", arguments[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            raise PermissionError("refused: to open a file for writing")


def run(program: str, answers: int, secret: str) -> None:
    """Runs the program, writes how it ended to the descriptor `answers`, and ends the process."""
    write, leave = os.write, os._exit  # the program may replace them
    write(answers, STARTED)
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        answer = secret
    except BaseException as error:  # SystemExit too: it left before its tests ended
        try:
            answer = f"failed {type(error).__name__}: {error}"
        except BaseException:  # an exception without a text
            answer = f"failed {type(error).__name__}"
    write(answers, answer[:500].encode("utf-8", "replace"))
    leave(0)


def main() -> None:
    seconds, memory, secret = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    del sys.argv[1:]
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    answers, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    leave_the_rest()
    set_limits(seconds, memory)
    for name in ("ctypes", "_ctypes"):  # so that importing them is an audit event
        sys.modules.pop(name, None)
    sys.addaudithook(refuse)
    run(program, answers, secret)


if __name__ == "__main__":
    main()
