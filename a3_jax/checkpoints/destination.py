"""Where a conversion writes: with room, and the same for all processes."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from a3_jax.checkpoints.directories import new_directory
from a3_jax.errors import InputError
from a3_jax.paths import absolute, as_path
from a3_jax.runtime.coordination import run_on_all, run_on_process_zero


@contextlib.contextmanager
def shared_directory(path) -> Iterator[Any]:
    """As `new_directory`, of which all processes of a run get the same; every process makes the call."""
    with contextlib.ExitStack() as stack:
        place = run_on_process_zero("directory", lambda: str(stack.enter_context(new_directory(path))))
        yield as_path(place)
        run_on_all("directory", stack.close)


def check_space(path, nbytes: int) -> None:
    """Whether the disk that `path` will lie on has room; nothing is known of buckets.

    Raises:
      InputError: it has not, with both numbers.
    """
    path = absolute(path)
    if "://" in str(path):
        return
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise InputError(
            f"the disk is too small: {nbytes:,} bytes are to be written, {free:,} are free", file=path
        )
