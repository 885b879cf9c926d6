"""Whether the process that a run's lease names still lives."""

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

FRESH = 60.0  # seconds since a lease was renewed in which another host's holder counts as alive


def is_alive(lease: Mapping[str, Any]) -> bool:
    """Whether the holder of a lease lives: on this host its process is looked for, elsewhere time tells.

    Args:
      lease: the fields of `lease.json`; none, or others, where it is absent or damaged: nobody holds it.
    """
    pid, renewed = lease.get("pid"), lease.get("renewed")
    is_here = lease.get("host") == socket.gethostname()
    if (
        is_here
        and lease.get("pid_namespace", pid_namespace()) == pid_namespace()
        and isinstance(pid, int)
        and 0 < pid < 2**31
    ):
        start = process_start(pid)
        return start is not None and start in ("", lease.get("process_start", start))
    return isinstance(renewed, int | float) and time.time() - renewed < FRESH


def process_start(pid: int) -> str | None:
    """When a process of this host started, in the kernel's ticks; None: it is gone; "": can't be told."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()  # the name before it may hold spaces
    except ProcessLookupError:
        return None
    except (OSError, ValueError):
        return ""
    return None if state in ("Z", "X") else fields[18]  # ended, if not collected yet


def pid_namespace() -> str:
    """Containers may share a host's name, but not its process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
