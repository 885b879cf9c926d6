"""Local and bucket paths (`gs://...`), through etils: the one place that opens files by name."""

import contextlib
import json
import os
import uuid

from etils import epath

from a3_jax.errors import InputError


def as_path(path) -> epath.Path:
    """A local path, a `file:///` URL of one, or a bucket's URL.

    Raises:
      InputError: a URL of another kind.
    """
    if isinstance(path, str) and path.startswith("file:///"):
        path = path.removeprefix("file://")
    try:
        return epath.Path(path)
    except KeyError as error:
        raise InputError(f"no kind of path that can be opened: {error.args[0]}", file=path) from error


def absolute(path) -> epath.Path:
    """The path from the root; a bucket's is that already."""
    return as_path(path if "://" in str(path) else os.path.abspath(path))


def read_text(path) -> str:
    """The text of a UTF-8 file.

    Raises:
      InputError: absent, a directory, unreadable, or not UTF-8.
    """
    path = as_path(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, path) from error
    except OSError as error:
        raise InputError(_reason(path, error), file=path) from error
    except ValueError as error:  # a zero byte in the name
        raise InputError(f"no file can have this name: {error}", file=repr(str(path))) from error


def not_utf8(error: UnicodeDecodeError, file) -> InputError:
    """Names the line that holds the first bad byte."""
    before = error.object[: error.start]
    column = error.start - (before.rfind(b"\n") + 1) + 1
    return InputError(f"not UTF-8 text (byte {column} of the line)", file=file, line=before.count(b"\n") + 1)


def read_json(path) -> dict:
    """The JSON object in a file.

    Raises:
      InputError: unreadable, not JSON, JSON of another kind, or text that no file could hold again.
    """
    text = read_text(path)
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__}", file=path)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError("holds half of a surrogate pair, which is no character", file=path) from error
    return value


def parse_json(text: str, file=None):
    """The value of a JSON text.

    Raises:
      InputError: not JSON, nested too deeply, or a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", file=file, line=error.lineno) from error
    except RecursionError as error:
        raise InputError("not JSON: nested too deeply", file=file) from error
    except ValueError as error:  # Python converts no longer numbers
        raise InputError("not JSON: a number has too many digits", file=file) from error


def is_file_name(name) -> bool:
    """Whether a name from outside means a file in the directory where it is looked for."""
    if not isinstance(name, str) or not name.isprintable():  # no zero bytes, no halves of surrogate pairs
        return False
    return "/" not in name and name not in ("", ".", "..") and len(name.encode("utf-8")) <= 255


def check_parents(path) -> None:
    """Refuses a path below something that is no directory, and a name that is too long.

    Raises:
      InputError: as said.
    """
    path = absolute(path)
    try:
        existing = next(parent for parent in path.parents if parent.exists())
        path.exists()
    except OSError as error:
        raise InputError(_reason(path, error), file=path) from error
    if not existing.is_dir():
        raise InputError(f"{existing} is no directory", file=path)


def write_text(path, text: str) -> None:
    """Writes a file whole or not at all: a temporary sibling, then a rename.

    Raises:
      InputError: `path` exists as a directory, or its directory can't be written.
    """
    path = as_path(path)
    if path.is_dir():
        raise InputError("is a directory, a file is to be written there", file=path)
    temporary = path.parent / f".{uuid.uuid4().hex[:12]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode("utf-8"))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the same trouble again
            temporary.unlink(missing_ok=True)
        raise InputError(_reason(path, error), file=path) from error


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _reason(path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a directory, expected a file"
    return os.strerror(error.errno) if error.errno else str(error)
