"""One writer per run directory: `WORKDIR/lease.json`, renewed for as long as the run lives.

Whether a holder on this host is alive is known at once from its process id and start time. A holder on
another host is watched: if it is alive, it renews its lease within two of its renewal intervals. Clocks of
different hosts are never compared. A lease that can't be read counts as another host's.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from a3_jax.errors import InputError
from a3_jax.paths import absolute, write_text

LEASE_FILE = "lease.json"
_MAX_BYTES = 1 << 16  # of the file, which has a few hundred
_MAX_RENEW = 600.0  # seconds; a damaged file must not make anyone wait for days
_FRESH = 60.0  # seconds since its renewal during which another host's lease counts as held


def is_alive(lease: Mapping[str, Any]) -> bool:
    """Returns whether the holder of a lease is alive, without waiting.

    Args:
      lease: the fields of `lease.json`; empty, or arbitrary, if it is absent or damaged: nobody holds it.
    """
    here = _is_alive_here(lease)
    if here is not None:
        return here
    renewed = lease.get("renewed")
    return isinstance(renewed, int | float) and time.time() - renewed < _FRESH


def process_start(pid: int) -> str | None:
    """Returns when a process of this host started, in the kernel's ticks; None if gone, "" if unknown."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()  # the name before it may hold spaces
    except ProcessLookupError:
        return None
    except (OSError, ValueError):
        return ""
    return None if state in ("Z", "X") else fields[18]  # Z, X: it has ended but wasn't collected


def pid_namespace() -> str:
    """Returns this process's PID namespace: containers may share a host's name, but not its process ids."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Lease:
    """The right to write into a run directory, as a context manager.

    Attributes:
      file: the path of `lease.json`.
      lost: whether another run took over because this one hadn't renewed for too long; see `check`.
    """

    def __init__(self, workdir, renew_seconds: float = 20.0):
        """Prepares a lease on `workdir`, local or in a bucket, which is made on entering."""
        self._directory = absolute(workdir)
        self.file = self._directory / LEASE_FILE
        self.renew_seconds, self.lost = renew_seconds, False
        self._owner, self._since = uuid.uuid4().hex, time.time()
        self._is_remote = "://" in str(self.file)
        self._confirmed = -math.inf
        self._stop, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._keep, name="a3-lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Takes the lease, at once or after watching another host's for two renewal intervals."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise InputError(f"can't be written: {error.strerror or error}", file=self.file) from error
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lease back: removes the file, unless it is another run's by now."""
        self._stop.set()
        self._thread.join(5.0)  # it may hang in a write
        with contextlib.suppress(OSError):
            if _fields(self._read()).get("owner") == self._owner:
                self.file.unlink(missing_ok=True)

    def check(self) -> None:
        """Must be called before anything of the run is written."""
        if time.monotonic() - self._confirmed > 1.5 * self.renew_seconds:  # this process was stopped, say
            with contextlib.suppress(OSError):
                self._look()
        if self.lost:
            raise InputError("another run took over", file=self.file)

    def _take(self) -> None:
        found = self._read()
        alive = False if found is None else _is_alive_here(_fields(found))
        if alive:
            raise self._refusal(_fields(found))
        is_foreign = alive is None
        if found is not None and is_foreign:
            found = self._watched(found)
        with _locked(None if self._is_remote else self._directory):
            now = self._read()
            if now != found:  # another starter was faster
                raise self._refusal(_fields(now))
            if found is None and not self._is_remote:
                try:
                    with open(self.file, "x", encoding="utf-8") as file:
                        file.write(self._text())
                except FileExistsError:  # another host was faster: locks may be this host's alone
                    raise self._refusal(_fields(self._read())) from None
            else:
                write_text(self.file, self._text())
        if is_foreign or self._is_remote:  # two hosts may both have written: the last one has it
            time.sleep(min(1.0, self.renew_seconds / 4))
        self._look()
        if self.lost:
            raise self._refusal(_fields(self._read()))

    def _watched(self, found: bytes) -> bytes | None:
        """Returns the content after two intervals without a renewal; None if the lease was given back."""
        owner = _fields(found)
        renew: Any = owner.get("renew_seconds")
        if type(renew) not in (int, float) or not 0 < renew <= _MAX_RENEW:
            renew = self.renew_seconds
        seconds = 2 * renew
        print(
            f"a3: {self.file}: held by {_named(owner)}; waiting {seconds:.0f} s to see if it is alive",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0, seconds / 20))
            now = self._read()
            if now is None:
                return None
            if now != found:
                raise self._refusal(_fields(now))
        return found

    def _refusal(self, owner: dict[str, Any]) -> InputError:
        return InputError(f"another run writes here: {_named(owner)}", file=self.file)

    def _keep(self) -> None:
        while not self._stop.wait(self.renew_seconds) and not self.lost:
            try:
                self._renew()
            except Exception as error:  # a bucket's errors share no type, and none of them ends the run
                if not self._warned:
                    print(f"a3: warning: {self.file}: can't be renewed: {error}", file=sys.stderr, flush=True)
                self._warned = True

    def _renew(self) -> None:
        self._look()
        if not self.lost and self._directory.exists():  # whoever removed it doesn't want it back
            write_text(self.file, self._text())

    def _look(self) -> None:
        """Sets `lost` if the file is another run's. An absent or damaged one is nobody's."""
        self.lost |= _fields(self._read()).get("owner", self._owner) != self._owner
        self._confirmed = time.monotonic()

    def _read(self) -> bytes | None:
        try:
            with self.file.open("rb") as file:
                return file.read(_MAX_BYTES)
        except FileNotFoundError:
            return None

    def _text(self) -> str:
        fields = {
            "owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(),
            "process_start": process_start(os.getpid()) or "", "pid_namespace": pid_namespace(),
            "since": self._since, "renewed": time.time(), "renew_seconds": self.renew_seconds,
        }  # fmt: skip
        return json.dumps(fields) + "\n"


def _fields(content: bytes | None) -> dict[str, Any]:
    """Returns the lease's fields; empty if it is absent or damaged."""
    try:
        fields = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _is_alive_here(lease: Mapping[str, Any]) -> bool | None:
    """Returns whether the holder's process on this host is alive; None if the holder is on another host."""
    pid = lease.get("pid")
    is_here = lease.get("host") == socket.gethostname()
    is_here &= lease.get("pid_namespace", pid_namespace()) == pid_namespace()
    if not is_here or type(pid) is not int or not 0 < pid < 2**31:
        return None
    start = process_start(pid)
    return start is not None and start in ("", lease.get("process_start", start))


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "unknown (damaged lease)"
    since = owner.get("since")
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since))
    except (TypeError, ValueError, OverflowError, OSError):
        since = "unknown"
    return f"host {str(owner.get('host'))[:80]}, pid {str(owner.get('pid'))[:12]}, since {since}"


@contextlib.contextmanager
def _locked(directory):
    """Locks out other starters on this host. Without file locks, `_take` reads again after it has written."""
    if directory is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
