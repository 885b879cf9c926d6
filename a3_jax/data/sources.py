"""Which files a run reads, and their documents in memory, every one checked before any work starts.

Larger data goes through `a3 data prepare`, which holds no file whole; see `documents` for the kinds.
"""

import glob
from collections.abc import Sequence

from a3_jax.data.documents import TEXT_FIELD, BadRecord, Source, is_readable, text_of
from a3_jax.errors import InputError
from a3_jax.paths import as_path

_GLOB_LETTERS = set("*?[")


def find_files(data: str | Sequence[str]) -> list[str]:
    """The files that a path, a glob or a list of both names; sorted within each glob.

    Raises:
      InputError: nothing there, a directory, or a file of another kind.
    """
    if isinstance(data, str):
        data = [data]
    found = [name for entry in data for name in _expand(str(entry))]
    if not found:
        raise InputError("names no file", field="data")
    for name in found:
        if not is_readable(name):
            message = "not a .txt or .jsonl file, plain or as .gz or .zst, and no .parquet"
            raise InputError(message, file=name, field="data")
        if not as_path(name).exists():
            raise InputError("no such file", file=name, field="data")
    return found


def read_documents(name: str) -> tuple[str, ...]:
    """The documents of one file, empty ones left out.

    Raises:
      InputError: unreadable, empty, not UTF-8 or not JSON, with the file, the line and the field.
    """
    source, documents = Source(name), []
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


def _expand(entry: str) -> list[str]:
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
