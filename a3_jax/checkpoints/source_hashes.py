"""The files that a conversion reads, by their SHA-256."""

import concurrent.futures
import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from a3_jax.errors import InputError
from a3_jax.paths import as_path, read_text

_READ_AT_ONCE, _THREADS = 1 << 22, 2
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Hashing:
    """SHA-256 of files, computed in threads beside other work; a context manager.

    Args:
      files: in the order in which they will be read otherwise.
    """

    def __init__(self, files: Sequence[Any]):
        self._stopped = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "a3_sha256")
        self._sums = {as_path(file).name: self._pool.submit(self._sha256, file) for file in files}

    def result(self) -> dict[str, str]:
        """Name -> 64 hexadecimal digits, of all files.

        Raises:
          InputError: a file can't be read.
        """
        return {name: sum_.result() for name, sum_ in self._sums.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _sha256(self, file) -> str:
        digest = hashlib.sha256()
        try:
            with as_path(file).open("rb") as opened:
                while not self._stopped.is_set() and (piece := opened.read(_READ_AT_ONCE)):
                    digest.update(piece)
        except OSError as error:
            raise InputError(f"can't be read: {error.strerror or error}", file=file) from error
        return digest.hexdigest()


def sha256_of(files: Sequence[Any]) -> dict[str, str]:
    """As `Hashing.result`, with nothing beside it."""
    with Hashing(files) as hashing:
        return hashing.result()


def read_sha256_list(file) -> dict[str, str]:
    """What `sha256sum FILE...` printed, by the last part of each name.

    Raises:
      InputError: a line of another form, or a name with two sums.
    """
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            why = "not a line of sha256sum: 64 hexadecimal digits, two spaces, a name"
            raise InputError(why, file=file, line=number)
        digits, name = match[1].lower(), match[2].rsplit("/", 1)[-1]
        if sums.setdefault(name, digits) != digits:
            raise InputError(f"{name} has another sum in an earlier line", file=file, line=number)
    return sums


def compare_sha256(directory, found: Mapping[str, str], wanted: Mapping[str, str], listed_in) -> None:
    """Every file that is read must be in a list, with its sum.

    Args:
      found, wanted: by file name; `wanted` may have more.

    Raises:
      InputError: naming the first file that is not.
    """
    for name, digits in found.items():
        if name not in wanted:
            raise InputError(f"is not listed in {listed_in}", file=as_path(directory) / name)
        if wanted[name] != digits:
            raise InputError(
                f"its SHA-256 is {digits}, {listed_in} says {wanted[name]}", file=as_path(directory) / name
            )
