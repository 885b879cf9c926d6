"""Records of files, one after the other, and what is wrong with those that are passed over.

    *.jsonl     a JSON object a line
    *.txt       paragraphs between blank lines; where there is no blank line, each line
    *.parquet   a row; only the columns asked for are read

`.jsonl` and `.txt` may be compressed (`.gz`, `.zst`). No file is held whole, and no record above
`MAX_BYTES`. A record is named by the line it starts at, or by its row; both count from 0 here and
from 1 in what the user reads. Of a damaged file the records before the damage are read.

`find_files` and `read_documents` give the files that a run reads and their documents in memory, every one
checked before any work starts. Larger data goes through `a3 data prepare`.
"""

import contextlib
import functools
import glob
import io
import json
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from a3_jax.data.decompression import decompressed
from a3_jax.errors import InputError, nearest
from a3_jax.paths import POINTER_BYTES, as_path, is_remote, refuse_pointer, snapshot_hint, without_mark

TEXT_FIELD = "text"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".jsonl", ".txt", ".parquet")
MAX_BYTES = 32 << 20  # of a record: no text is that long, but files with their line ends lost are

_BLOCK = 1 << 20  # bytes read at a time
_ROWS_AT_ONCE = 256
_BYTE_ORDER_MARK = "\ufeff"
DAMAGED = "damaged_file"


class BadRecord(InputError):
    """A record that gives no document.

    Attributes:
      reason: one word, what such records are counted by.
      source, number: the file's place among the sources, and the record's in it (see `DocumentSource`).
    """

    def __init__(self, reason: str, message: str, *, file=None, line=None, field=None):
        super().__init__(message, file=file, line=line, field=field)
        self.reason = reason
        self.source, self.number = 0, 0

    def at(self, source: "DocumentSource", number: int) -> "BadRecord":
        """Itself, told where it is."""
        self.source, self.number, self.file = source.index, number, source.name
        self.line = number + (self.line or 1)
        return self


class DocumentSource:
    """A file of records.

    Attributes:
      name: its path. index: its place among the sources.
      size: bytes. bytes_read: how many of them a reader has taken so far.
    """

    def __init__(self, name: str, index: int = 0):
        self.name, self.index = name, index
        self.bytes_read = 0
        self._path = as_path(name)
        self._told: set[str] = set()

    @functools.cached_property
    def size(self) -> int:
        return self._path.stat().length

    def records(self, columns: Sequence[str], first: int = 0) -> Iterator[tuple[int, Any]]:
        """(number, record) of all records from number `first` on.

        Args:
          columns: fields that are read, where a file keeps them apart; paragraphs are the first one.

        Yields:
          A dict with at least those of the columns that the record has, or the `BadRecord` in its place.
          A file that can't be read any further ends with one.
        """
        import pyarrow

        readers = {"jsonl": self._objects, "txt": self._paragraphs, "parquet": self._rows}
        number = first - 1
        try:
            for number, record in readers[_kind(self.name) or "txt"](columns, first):
                yield number, record.at(self, number) if isinstance(record, BadRecord) else record
        except (OSError, EOFError, pyarrow.ArrowException) as error:
            told = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
            failure = BadRecord(DAMAGED, f"can't be read any further: {told}")
            yield number + 1, failure.at(self, number + 1)

    def column_names(self) -> list[str]:
        """Returns the columns of a table, or the fields of a file's first object; [] if it can't be read."""
        import pyarrow

        kind = _kind(self.name)
        if kind == "txt":
            return [TEXT_FIELD]
        if kind == "jsonl":
            records = (record for _, record in self.records(()))
            return list(next((record for record in records if not isinstance(record, BadRecord)), ()))
        try:
            with _open(self._path) as file:
                return _open_table(file).schema_arrow.names
        except (OSError, pyarrow.ArrowException):
            return []  # whoever reads it will say so

    def check(self, columns: Sequence[str]) -> None:
        """Refuses, before any record is read, a file that is not what its name says, or lacks a column.

        Raises:
          InputError: a Git LFS pointer, text in UTF-16, or a table without one of the columns, or with two of
            that name.
        """
        if _kind(self.name) != "parquet":
            with contextlib.suppress(OSError):  # whoever reads it will say so
                next(self.text_blocks(), None)
            return
        names = self.column_names()
        for column in columns if names else ():
            if column not in names:
                message = f"no such column{nearest(column, names) or ': it has ' + ', '.join(names)}"
                raise InputError(message, file=self.name, field=column)
            check_single(column, names, self.name)

    def _objects(self, columns, first):
        del columns
        for number, line in enumerate(self._lines()):
            if number >= first and (line is None or line.strip()):
                yield number, _object(line)

    def _paragraphs(self, columns, first):
        (column,) = columns
        for number, block in self._blocks() if self._has_blocks() else enumerate(self._lines()):
            if number < first:
                continue
            if block is None:
                yield number, _too_long()
            elif block.strip():
                text = _decoded(block)
                yield number, text if isinstance(text, BadRecord) else {column: text}

    def _rows(self, columns, first):
        with _open(self._path) as file:
            table = _open_table(file)
            number, total = 0, max(table.metadata.num_rows, 1)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if number + rows > first:
                    yield from self._group_rows(table, group, columns, number, first)
                number += rows
                self.bytes_read = self.size * number // total

    def _group_rows(self, table, group, columns, number, first):
        batches = table.iter_batches(
            _ROWS_AT_ONCE, row_groups=[group], columns=list(columns), use_threads=False
        )
        for batch in batches:
            values = [_column_values(column) for column in batch.columns]
            names = batch.schema.names
            for row in zip(*values, strict=True):
                if number >= first:
                    bad = next((value for value in row if isinstance(value, BadRecord)), None)
                    yield number, bad or dict(zip(names, row))
                number += 1

    def _has_blocks(self) -> bool:
        """Returns whether a blank line stands between two lines with text: then paragraphs are documents."""
        seen_text = seen_blank = False
        with contextlib.suppress(OSError):  # whoever reads the records comes to the same place, and says so
            for line in self._lines():
                is_text = line is None or bool(line.strip())
                if is_text and seen_text and seen_blank:
                    return True
                seen_text, seen_blank = seen_text or is_text, seen_text and not is_text
        return False

    def _blocks(self) -> Iterator[tuple[int, bytes | None]]:
        """(number of its first line, lines between two blank ones); None above `MAX_BYTES`."""
        start, held, size = 0, [], 0
        for number, line in enumerate(self._lines()):
            if line is None or line.strip():
                start = start if size else number
                size += MAX_BYTES + 1 if line is None else len(line) + 1
                if size > MAX_BYTES:
                    held.clear()
                else:
                    held.append(line)
            elif size:
                yield start, b"\n".join(held) if size <= MAX_BYTES else None
                held, size = [], 0
        if size:
            yield start, b"\n".join(held) if size <= MAX_BYTES else None

    def _lines(self) -> Iterator[bytes | None]:
        """Lines without their ends; None in place of one above `MAX_BYTES`, which is never held."""
        held, size = [], 0
        for block in self.text_blocks():
            head, *others = block.split(b"\n")
            size += len(head)
            held = [*held, head] if size <= MAX_BYTES else []
            if others:
                yield None if size > MAX_BYTES else b"".join(held).rstrip(b"\r")
                *whole, last = others
                for line in whole:
                    yield line.rstrip(b"\r")
                held, size = [last], len(last)
        if size:
            yield None if size > MAX_BYTES else b"".join(held).rstrip(b"\r")

    def text_blocks(self) -> Iterator[bytes]:
        """Yields the file's bytes, decompressed, without a byte order mark.

        Raises:
          InputError: a Git LFS pointer, or text in UTF-16.
          OSError: damaged; what lies before has been given by then.
        """
        compression = next((kind for end, kind in COMPRESSIONS.items() if self.name.endswith(end)), None)
        with _open(self._path) as file:
            if compression:
                blocks = decompressed(file, compression, self._warn)
            else:
                blocks = iter(lambda: file.read(_BLOCK), b"")
            for number, block in enumerate(blocks):
                self.bytes_read = file.tell()
                yield block if number else without_mark(block, self.name)

    def _warn(self, message: str) -> None:
        if message not in self._told:  # a file may be read several times
            print(f"warning: {self.name}: {message}", file=sys.stderr)
            self._told.add(message)


class _RawFile(io.RawIOBase):
    """What etils opens in a bucket, which lacks some of what pyarrow asks of a Python file."""

    def __init__(self, file):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self.tell()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def is_readable(name: str) -> bool:
    """Returns whether the name's end is one of those that are read."""
    return _kind(name) is not None


def check_single(column: str, names: Sequence[str], file) -> None:
    """Refuses a table with several columns of the name of one that is to be read."""
    if names.count(column) > 1:
        message = f"the table has {names.count(column)} columns of this name; rename all but one"
        raise InputError(message, file=file, field=column)


def text_of(record: dict, field: str) -> str:
    """Returns the text in a field of a record.

    Raises:
      BadRecord: absent, no text, empty, or no characters.
    """
    text = record.get(field)
    if not isinstance(text, str):
        if field not in record:
            raise BadRecord("missing", "is missing", field=field)
        raise BadRecord("not_text", f"must be a text, got {type(text).__name__}", field=field)
    if not text or text.isspace():
        raise BadRecord("empty", "holds no text", field=field)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        message = "holds half of a surrogate pair, which is no character"
        raise BadRecord("surrogate", message, field=field) from error
    if size > MAX_BYTES:
        raise _too_long()
    return text


def _kind(name: str) -> str | None:
    for end in COMPRESSIONS:
        name = name.removesuffix(end) if not name.endswith(f".parquet{end}") else name
    return next((end[1:] for end in SUFFIXES if name.endswith(end)), None)


def _object(line: bytes | None) -> dict | BadRecord:
    """Returns the JSON object of a line."""
    if line is None:
        return _too_long()
    text = _decoded(line)
    if isinstance(text, BadRecord):
        return text
    try:
        value = json.loads(text.removeprefix(_BYTE_ORDER_MARK))  # files with one may have been joined
    except (ValueError, RecursionError) as error:
        return BadRecord("not_json", f"not JSON: {error}")
    if not isinstance(value, dict):
        return BadRecord("not_object", f"expected a JSON object, got {type(value).__name__}")
    return value


def _decoded(content: bytes) -> str | BadRecord:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        message = f"not UTF-8 text (byte {column} of the line)"
        return BadRecord("not_utf8", message, line=before.count(b"\n") + 1)


def _too_long() -> BadRecord:
    return BadRecord("too_long", f"is longer than {MAX_BYTES >> 20} MiB")


def _open(path):
    """Returns the file, if it is one and no Git LFS pointer."""
    file = path.open("rb")
    if "://" in str(path):
        file = io.BufferedReader(_RawFile(file), _BLOCK)
    try:
        refuse_pointer(file.read(POINTER_BYTES), path)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _open_table(file):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def _column_values(column) -> list:
    """Python values of an Arrow column; a `BadRecord` in place of those that hold no UTF-8."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_cell(cell) for cell in column]
    return [_cell_text(value) if isinstance(value, bytes) else value for value in values]


def _cell(cell):
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return _bad_cell(error)


def _cell_text(content: bytes) -> str | BadRecord:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return _bad_cell(error)


def _bad_cell(error: UnicodeDecodeError) -> BadRecord:
    return BadRecord("not_utf8", f"not UTF-8 text (byte {error.start + 1})")


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
