"""`manifest.json`, the contents of a checkpoint: written last; a directory without it is not a checkpoint.

    files    path, size in bytes and CRC-32 of every other file
    leaves   `params/...` and `train/...`: shape, dtype, fingerprint
    crc32    of the manifest's own text without this number

The text is the only one that says the same: one that parses but is written otherwise is damaged too.
"""

import concurrent.futures
import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name bfloat16
import numpy as np

from a3_jax.errors import EXIT_STORAGE, DamagedCheckpoint, InputError, RunError
from a3_jax.paths import POINTER_BYTES, POINTER_MESSAGE, as_path, is_pointer, write_text

MANIFEST_FILE = "manifest.json"
ITEMS = PARAMS, TRAIN = "params", "train"  # of arrays
FORMAT_VERSION = 2
SMALL = 1 << 20  # bytes of a file that every reader checks whole
_READ_AT_ONCE, _THREADS = 1 << 22, 8
# Other errors are the file system's, and say nothing of the file.
_NO_SUCH_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclasses.dataclass(frozen=True)
class File:
    bytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Leaf:
    shape: tuple[int, ...]
    dtype: str
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint directory, by path in it and by leaf."""

    files: Mapping[str, File]
    leaves: Mapping[str, Leaf]

    def text(self) -> str:
        fields = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return _text(fields | {"crc32": zlib.crc32(_text(fields).encode())})

    def item(self, name: str) -> dict[str, Leaf]:
        """Returns the leaves of `params` or `train`, without that prefix."""
        prefix = f"{name}/"
        return {leaf[len(prefix) :]: it for leaf, it in self.leaves.items() if leaf.startswith(prefix)}


def write_manifest(directory, manifest: Manifest) -> None:
    """Makes a directory that is otherwise complete a checkpoint."""
    write_text(as_path(directory) / MANIFEST_FILE, manifest.text())


def read_manifest(directory) -> Manifest:
    """Reads the manifest of a checkpoint directory.

    Raises:
      DamagedCheckpoint: it is absent, not what was written, or a Git LFS pointer.
      InputError: it was written by a newer format.
      RunError: the file system fails; another attempt may succeed.
    """
    file = as_path(directory) / MANIFEST_FILE
    try:
        return parse_manifest(file.read_bytes(), file)
    except _NO_SUCH_FILE as error:
        missing = isinstance(error, FileNotFoundError)
        message = "is missing: unfinished or damaged" if missing else f"can't be read: {error.strerror}"
        raise DamagedCheckpoint(message, file=file, step=step_of(directory)) from error
    except OSError as error:
        raise _failing(file, error) from error


def parse_manifest(data: bytes, file) -> Manifest:
    """Parses a manifest's text; `file` is for the error, as in `read_manifest`."""
    try:
        fields = json.loads(data)
        version, crc32 = fields["format_version"], fields.pop("crc32")
        if crc32 != zlib.crc32(_text(fields).encode()):
            raise ValueError
        if version != FORMAT_VERSION:
            raise InputError(
                f"written by another format: version {version}, this a3_jax reads {FORMAT_VERSION}",
                file=file, field="format_version",
            )  # fmt: skip
        files = {name: File(**it) for name, it in fields["files"].items()}
        leaves = {
            name: Leaf(tuple(it["shape"]), it["dtype"], it["fingerprint"])
            for name, it in fields["leaves"].items()
        }
        manifest = Manifest(files, leaves)
        if manifest.text().encode() != data:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = POINTER_MESSAGE if is_pointer(data) else "is damaged: not the text that was written"
        raise DamagedCheckpoint(message, file=file, step=step_of(file.parent)) from error
    for name in files:
        if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise InputError(f"names a file outside of the checkpoint: {name!r}", file=file)
    return manifest


def step_of(directory) -> int | None:
    """Returns the step that a directory is named after; None for any other name."""
    name = as_path(directory).name
    return int(name) if name.isascii() and name.isdigit() and name == str(int(name)) else None


def list_files(directory) -> list[str]:
    """Returns the paths of all files but the manifest below a directory, sorted."""
    found, waiting = [], [(as_path(directory), "")]
    while waiting:
        folder, prefix = waiting.pop()
        for path in folder.iterdir():
            if path.is_dir():
                waiting.append((path, f"{prefix}{path.name}/"))
            elif prefix + path.name != MANIFEST_FILE:
                found.append(prefix + path.name)
    return sorted(found)


def read_checksums(directory, names: Iterable[str]) -> dict[str, File]:
    """Computes sizes and CRC-32s of files, in several threads.

    Raises:
      OSError: a file can't be read.
    """
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(as_path(directory) / name), names)))


def find_damage(directory, manifest: Manifest, deep: bool = False, only: str = ""):
    """Compares the files of a checkpoint with its manifest.

    Args:
      deep: checksums of all files, not of small ones alone beside all sizes.
      only: start of the paths that are looked at.

    Returns:
      A list of `DamagedCheckpoint`, one per file that is missing, of another size or of other bytes.

    Raises:
      RunError: the file system fails; another attempt may succeed.
    """

    def check(entry) -> str | None:
        name, wanted = entry
        path = as_path(directory) / name
        try:
            size = path.stat().length
            if size != wanted.bytes:
                with path.open("rb") as file:
                    if is_pointer(file.read(POINTER_BYTES)):
                        return POINTER_MESSAGE
                return f"has {size} bytes, was written with {wanted.bytes}"
            if (deep or size <= SMALL) and _checksum(path) != wanted:
                return "is damaged: its checksum is not that of what was written"
        except FileNotFoundError:
            return "is missing"
        except _NO_SUCH_FILE as error:
            return f"can't be read: {error.strerror}"
        except OSError as error:
            raise _failing(path, error) from error

    entries = [entry for entry in manifest.files.items() if entry[0].startswith(only)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        problems = list(pool.map(check, entries))
    step = step_of(directory)
    return [
        DamagedCheckpoint(problem, file=as_path(directory) / name, step=step)
        for (name, _), problem in zip(entries, problems)
        if problem
    ]


def raise_damage(directory, manifest: Manifest, deep: bool = False, only: str = "") -> None:
    """Raises the first thing that `find_damage` finds.

    Raises:
      DamagedCheckpoint: of that file.
    """
    for damage in find_damage(directory, manifest, deep, only):
        raise damage


def _failing(file, error: OSError) -> RunError:
    return RunError(EXIT_STORAGE, f"{file}: can't be read: {error.strerror or error}")


def _checksum(path) -> File:
    size = crc32 = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_AT_ONCE):
            size, crc32 = size + len(piece), zlib.crc32(piece, crc32)
    return File(size, crc32)


def _text(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=1, sort_keys=True) + "\n"
