"""Local and bucket paths (`gs://...`), through etils: the one place that opens files by name."""

import codecs
import contextlib
import json
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

from a3_jax.errors import InputError

POINTER_BYTES = 1024  # a Git LFS pointer is shorter
POINTER_MESSAGE = "is a Git LFS pointer, not the file itself: `git lfs pull` there fetches it"

_POINTER = b"version https://git-lfs.github.com/spec/"
_HUB_KINDS = ("models", "datasets")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def as_path(path) -> epath.Path:
    """Returns a path, local or in a bucket, from a name or URL; `~` and `~USER` are home directories."""
    if isinstance(path, str) and path.startswith("file:///"):
        path = path.removeprefix("file://")
    if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("~"):
        path = _expanded(os.fspath(path))
    try:
        return epath.Path(path)
    except KeyError as error:
        raise InputError(f"no kind of path that can be opened: {error.args[0]}", file=path) from error


def _expanded(path: str) -> str:
    expanded = os.path.expanduser(path)
    first = expanded.partition("/")[0]
    if first.startswith("~") and first != expanded and not os.path.isdir(first):
        raise InputError(f"there is no user {first[1:]!r}; ./{first} means a directory here", file=path)
    return expanded


def is_remote(path) -> bool:
    """Returns whether a path is a bucket's."""
    return "://" in str(as_path(path))


def local_path(path, reader: str) -> pathlib.Path:
    """Returns a path for what reads or writes this machine's own file system alone."""
    if is_remote(path):
        raise InputError(f"must be on this machine: {reader} opens it by itself", file=path)
    return pathlib.Path(as_path(path))


@contextlib.contextmanager
def local_copy(path) -> Iterator[str]:
    """A file on this machine: itself, or for as long as the block runs a copy of a bucket's."""
    if not is_remote(path):
        yield str(as_path(path))
        return
    text = read_text(path)
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory) / as_path(path).name
        copy.write_text(text, encoding="utf-8")
        yield str(copy)


def followed(path):
    """Returns where a link leads, so that writing there keeps the link; buckets have none."""
    return as_path(path) if is_remote(path) else as_path(os.path.realpath(as_path(path)))


def absolute(path) -> epath.Path:
    """Returns the path from the root; a bucket's is that already."""
    return as_path(path) if is_remote(path) else as_path(os.path.abspath(as_path(path)))


def read_text(path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark."""
    path = as_path(path)
    try:
        return decode_text(read_bytes(path), path)
    except ValueError as error:  # a zero byte in the name
        raise InputError(f"no file can have this name: {error}", file=repr(str(path))) from error


def read_bytes(path) -> bytes:
    """Returns all of a file."""
    path = as_path(path)
    with _storage_told(path):
        content = path.read_bytes()
    refuse_pointer(content, path)
    return content


def read_beginning(path) -> bytes:
    """Returns the first bytes of a file, as many as `refuse_pointer` and byte order marks need."""
    path = as_path(path)
    with _storage_told(path), path.open("rb") as file:
        return file.read(POINTER_BYTES)


def refuse_pointer(content: bytes, file) -> None:
    """Refuses what Git has in place of a file that Git LFS holds.

    Args:
      content: the file's first `POINTER_BYTES`, or more.
    """
    if is_pointer(content):
        raise InputError(POINTER_MESSAGE, file=file)


def is_pointer(content: bytes) -> bool:
    """Returns whether a file's first `POINTER_BYTES`, or more, are a Git LFS pointer."""
    return content.startswith(_POINTER) and b"\noid " in content[:POINTER_BYTES]


def without_mark(content: bytes, file) -> bytes:
    """Returns the beginning of a text without UTF-8's byte order mark."""
    refuse_pointer(content, file)
    if content.startswith(_UTF16_MARKS):
        message = "begins with the byte order mark of UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"
        raise InputError(message, file=file)
    return content.removeprefix(codecs.BOM_UTF8)


def decode_text(content: bytes, file) -> str:
    """Returns the text of all bytes of a file or stream."""
    try:
        return without_mark(content, file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, file) from error


def not_utf8(error: UnicodeDecodeError, file) -> InputError:
    """Names the line that holds the first bad byte."""
    before = error.object[: error.start]
    column = error.start - (before.rfind(b"\n") + 1) + 1
    return InputError(f"not UTF-8 text (byte {column} of the line)", file=file, line=before.count(b"\n") + 1)


def read_json(path) -> dict:
    """Returns the JSON object in a file.

    Raises:
      InputError: unreadable, not JSON, JSON of another kind, a key given twice, or text that no file could
        hold again.
    """
    text = read_text(path)

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError("the key is given twice in one object", file=path, field=twice)
        return found

    value = parse_json(text, path, unique)
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__}", file=path)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError("holds half of a surrogate pair, which is no character", file=path) from error
    return value


def parse_json(text: str, file=None, make_object=None):
    """Returns the value of a JSON text.

    Args:
      make_object: makes an object of its (key, value) pairs; None: a dict, in which the last of a key counts.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", file=file, line=error.lineno) from error
    except RecursionError as error:
        raise InputError("not JSON: nested too deeply", file=file) from error
    except ValueError as error:  # Python converts no longer numbers
        raise InputError("not JSON: a number has too many digits", file=file) from error


def read_json_lines(path) -> list[dict]:
    """Returns the objects of a file with one per line, without lines that a writer's death has torn."""
    rows = []
    for line in as_path(path).read_bytes().splitlines() if as_path(path).exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def snapshot_hint(directory) -> str:
    """`: it is the Hub's cache, name SNAPSHOT` for a directory of the cache above a snapshot, or nothing."""
    directory = as_path(directory)
    if is_remote(directory) or not directory.is_dir():
        return ""
    if directory.name == "snapshots":
        repositories = [directory.parent]
    elif (directory / "snapshots").is_dir():
        repositories = [directory]
    else:
        patterns = [f"{above}{kind}--*" for above in ("", "hub/") for kind in _HUB_KINDS]
        repositories = [path for pattern in patterns for path in sorted(directory.glob(pattern))]
    snapshots = [snapshot for repository in repositories if (snapshot := _snapshot(repository))]
    if not snapshots:
        return ""
    others = f" (or one of {len(snapshots) - 1} others)" if len(snapshots) > 1 else ""
    return f": it is the Hub's cache, name {snapshots[0]}{others}"


def _snapshot(repository):
    """Returns the snapshot that a repository's main branch is at, or any; None without one."""
    snapshots = sorted(path for path in (repository / "snapshots").glob("*") if path.is_dir())
    main = repository / "refs" / "main"
    newest = main.read_bytes().decode("utf-8", "replace").strip() if main.is_file() else ""
    return next((path for path in snapshots if path.name == newest), next(iter(snapshots), None))


def is_file_name(name) -> bool:
    """Returns whether a name from outside means a file in the directory where it is looked for."""
    if not isinstance(name, str) or not name.isprintable():  # no zero bytes, no halves of surrogate pairs
        return False
    return "/" not in name and name not in ("", ".", "..") and len(name.encode("utf-8")) <= 255


def check_parents(path) -> None:
    """Refuses a path below something that is no directory, and a name that is too long."""
    path = absolute(path)
    with _storage_told(path):
        existing = next((parent for parent in path.parents if parent.exists()), None)
        path.exists()
    if existing is not None and not existing.is_dir():  # none of a bucket need exist
        raise InputError(f"{existing} is no directory", file=path)


def write_text(path, text: str) -> None:
    """Writes a file whole or not at all: a temporary sibling, then a rename."""
    path = as_path(path)
    with _storage_told(path):
        if path.is_dir():
            raise InputError("is a directory, a file is to be written there", file=path)
        temporary = path.parent / f".{uuid.uuid4().hex[:12]}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(text.encode("utf-8"))
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(Exception):  # the same trouble again
                temporary.unlink(missing_ok=True)
            raise


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class GrowingFile(contextlib.AbstractContextManager):
    """A file that grows by whole pieces; each outlives the process and the machine once `append` returns.

    Objects in buckets can't grow: there all of it is written anew with every piece, whole or not at all.
    """

    def __init__(self, path, kept: bytes = b""):
        """Opens the file, or begins it.

        Args:
          path: of it; its directory is made.
          kept: what the file begins with; anything behind that is cut off.
        """
        self._path, self._kept, self._file = as_path(path), kept, None
        with _storage_told(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not is_remote(self._path):
                self._file = pathlib.Path(self._path).open("ab")  # noqa: SIM115  # until __exit__
                self._file.truncate(len(kept))

    def append(self, piece: bytes) -> None:
        """Adds to the end."""
        with _storage_told(self._path):
            if self._file is None:
                self._path.write_bytes(self._kept + piece)
                self._kept += piece
            else:
                self._file.write(piece)
                self._file.flush()
                os.fsync(self._file.fileno())

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def _storage_told(path) -> Iterator[None]:
    """Trouble with a file as an `InputError`; the clients of buckets raise kinds of their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_remote(path):
            raise
        raise InputError(_reason(error), file=path) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a directory, expected a file"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return (str(error).strip() or type(error).__name__).splitlines()[0]
