"""A directory that appears whole or not at all."""

import contextlib
import uuid

from a3_jax.errors import InputError
from a3_jax.paths import absolute, as_path


@contextlib.contextmanager
def new_directory(path):
    """Gives a temporary sibling to fill; it becomes `path` at the end, or vanishes with an exception.

    The sibling does not exist yet, its parent does.

    Raises:
      InputError: `path` is a file or a directory with something in it, or can't be made.
    """
    path = absolute(path)
    check_free(path)
    temporary = path.parent / f".{uuid.uuid4().hex[:12]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't be made: {error.strerror or error}", file=path.parent) from error
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # empty, or it fails
        temporary.rename(path)
    except BaseException:
        for leftover in path.parent.glob(f"{temporary.name}*"):  # writers may have temporaries of their own
            leftover.rmtree()
        raise


def check_free(path) -> None:
    """Whether `path` can be made without destroying something.

    Raises:
      InputError: it is a file, or a directory with something in it.
    """
    path = as_path(path)
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError("the directory exists and is not empty", file=path)
    elif path.exists():
        raise InputError("exists and is a file, a directory is to be made there", file=path)
