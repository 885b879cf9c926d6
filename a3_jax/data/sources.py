"""Which files a run reads, and their documents in memory, every one checked before any work starts.

Larger data goes through `a3 data prepare`, which holds no file whole; see `documents` for the kinds.
"""

import glob
import os
import sys
from collections.abc import Hashable, Sequence

from a3_jax.data.documents import TEXT_FIELD, BadRecord, DocumentSource, is_readable, text_of
from a3_jax.errors import InputError
from a3_jax.paths import as_path, is_remote, snapshot_hint

_GLOB_LETTERS = set("*?[")


def find_files(data: str | Sequence[str]) -> list[str]:
    """Returns the files that a path, a glob or a list of both names; sorted within each glob.

    A file that is named more than once, in whatever way, is there once, with a warning.
    """
    if isinstance(data, str):
        data = [data]
    found = [name for entry in data for name in _expand(str(entry))]
    if not found:
        raise InputError("names no file", field="data")
    for name in found:
        if not is_readable(name):
            message = "not a .txt or .jsonl file, plain or as .gz or .zst, and no .parquet"
            raise InputError(message + snapshot_hint(name), file=name, field="data")
        if not as_path(name).exists():
            raise InputError("no such file", file=name, field="data")
    return _once(found)


def read_documents(name: str) -> tuple[str, ...]:
    """Returns the documents of one file, empty ones left out."""
    source, documents = DocumentSource(name), []
    for number, record in source.records((TEXT_FIELD,)):
        if isinstance(record, BadRecord):
            raise record
        try:
            documents.append(text_of(record, TEXT_FIELD))
        except BadRecord as error:
            if error.reason != "empty":
                raise error.at(source, number) from None
    if not documents:
        raise InputError("holds no text", file=name)
    return tuple(documents)


def _once(names: list[str]) -> list[str]:
    """Returns the names without further ones of the same file."""
    first: dict[Hashable, str] = {}
    for name in names:
        path = as_path(name)
        if is_remote(path):
            identity: Hashable = str(path)
        else:
            status = os.stat(path)  # links of either kind lead to one file
            identity = status.st_dev, status.st_ino
        if identity in first:
            other = "" if name == first[identity] else f" (as {first[identity]})"
            print(f"warning: {name}: is named more than once{other}, and is read once", file=sys.stderr)
        first.setdefault(identity, name)
    return list(first.values())


def _expand(entry: str) -> list[str]:
    entry = str(as_path(entry)) if entry.startswith("~") else entry
    if not _GLOB_LETTERS & set(entry) or as_path(entry).exists():
        return [entry]
    if "://" in entry:
        root = entry.rsplit("/", 1)[0]
        if _GLOB_LETTERS & set(root):
            raise InputError(
                "a bucket glob may have wildcards in its last part only", file=entry, field="data"
            )
        names = [str(path) for path in as_path(root).glob(entry.rsplit("/", 1)[1])]
    else:
        names = glob.glob(entry, recursive=True)
    if not names:
        raise InputError("no file matches", file=entry, field="data")
    return sorted(names)
