"""A directory that appears whole or not at all, on a disk with room for it."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

from a3_jax.errors import InputError
from a3_jax.paths import absolute, as_path
from a3_jax.runtime.coordination import run_on_all, run_on_process_zero

_TEMPORARY, _LOCK = ".tmp", ".lock"
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


@contextlib.contextmanager
def new_directory(path) -> Iterator[Any]:
    """Gives a temporary sibling to fill; it becomes `path` at the end, or vanishes with an exception.

    The sibling, `.NAME.DIGITS.tmp`, does not exist yet, its parent does. Siblings that killed processes
    left of the same `path` are removed.
    """
    path = _followed(absolute(path))
    check_free(path)
    temporary = path.parent / f"{_beginning(path)}{uuid.uuid4().hex[:12]}{_TEMPORARY}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't be made: {error.strerror or error}", file=path.parent) from error
    with _locked(temporary):
        _remove_leftovers(path, temporary)
        try:
            yield temporary
            if path.exists():
                path.rmdir()  # empty, or it fails
            temporary.rename(path)
        except BaseException as error:
            _remove(temporary)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise InputError(f"can't be written: {os.strerror(error.errno)}", file=path) from error
            raise


@contextlib.contextmanager
def shared_directory(path) -> Iterator[Any]:
    """Gives all processes of a run the same `new_directory`; every process makes the call."""
    with contextlib.ExitStack() as stack:
        name = run_on_process_zero("directory", lambda: str(stack.enter_context(new_directory(path))))
        yield as_path(name)
        run_on_all("directory", stack.close)


def check_space(path, nbytes: int) -> None:
    """Checks that the disk of `path` has room; a bucket always has."""
    path = absolute(path)
    if "://" in str(path):
        return
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise InputError(
            f"the disk is too small: {nbytes:,} bytes are to be written, {free:,} are free", file=path
        )


def check_free(path) -> None:
    """Checks that `path` can be made without destroying something."""
    path = as_path(path)
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError("the directory exists and is not empty", file=path)
        if os.path.ismount(path):  # nothing can be renamed to it
            raise InputError("something is mounted here, name a directory inside it", file=path)
    elif path.exists():
        raise InputError("exists and is a file, a directory is to be made there", file=path)


def _followed(path):
    """Returns the target of a link, since nothing can be renamed to a link; any other path as it is."""
    return as_path(os.path.realpath(path)) if os.path.islink(path) else path


def _beginning(path) -> str:
    return f".{path.name[:40]}."  # at most 4 bytes each: names may have 255


@contextlib.contextmanager
def _locked(temporary) -> Iterator[None]:
    """Holds a lock beside a directory: as long as the process lives, and no longer."""
    lock = f"{temporary}{_LOCK}"
    if "://" in lock:
        yield
        return
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"can't be written: {error.strerror}", file=temporary.parent) from error
    with contextlib.suppress(OSError):  # no locks on this file system: nobody will remove what we leave
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)


def _remove_leftovers(path, own) -> None:
    """Removes temporary siblings of `path` whose process is dead; others, and those without a lock, stay."""
    for lock in path.parent.iterdir():
        name = lock.name.removesuffix(_LOCK)
        if name == lock.name or not name.startswith(_beginning(path)) or not name.endswith(_TEMPORARY):
            continue
        if name == own.name:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path.parent / name)
                os.unlink(lock)
            finally:
                os.close(descriptor)


def _remove(temporary) -> None:
    for path in temporary.parent.iterdir():  # writers may have temporaries of their own beside it
        if path.name.startswith(temporary.name) and path.is_dir():
            path.rmtree()
