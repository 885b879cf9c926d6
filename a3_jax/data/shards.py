"""Packed rows on disk: one ArrayRecord entry a row, read at random.

    entry   tokens [T] token_dtype | segment_ids [T] segment_dtype | roles [T] uint8, where rows have them

Positions are not stored: in each piece of a document they count from 0. ArrayRecord keeps a checksum
of each block, so that a flipped bit is an error and never another token.
"""

import collections
import contextlib
import hashlib
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator

import numpy as np

from a3_jax.data.prepared_manifest import PreparedManifest, ShardInfo, file_crc32
from a3_jax.data.table import Table
from a3_jax.errors import InputError
from a3_jax.paths import as_path

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPEN_SHARDS = 64  # readers held open at a time, so that memory stays flat however many shards there are
_STORED = ("tokens", "segment_ids", "roles")


class ShardTable:
    """The rows of one split of a prepared directory, read when they are asked for.

    Safe to use from several threads.

    Attributes:
      num_rows: R. seq_len: T.
      has_roles: whether rows say which tokens are given. largest_id: of any token.
    """

    def __init__(self, directory, manifest: PreparedManifest, split: str):
        self._directory, self._manifest = as_path(directory), manifest
        self._shards = manifest.splits[split]
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._readers: collections.OrderedDict[int, _Reader] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.num_rows, self.seq_len = int(self._ends[-1]), manifest.seq_len
        self.has_roles, self.largest_id = manifest.has_roles, manifest.largest_id

    def take(self, rows) -> dict[str, np.ndarray]:
        """Returns the rows of these numbers.

        Args:
          rows: [B] int, each from 0 to R - 1.

        Returns:
          tokens, positions, segment_ids: [B, T] int32; roles: [B, T] uint8, where rows have them.
        """
        rows = np.asarray(rows)
        entries = np.empty(rows.shape, object)
        shards = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            first = int(self._ends[shard]) - self._shards[shard].rows
            entries[places] = self._reader(int(shard)).read((rows[places] - first).tolist())
        return _decoded(entries.tolist(), self._manifest, self._directory)

    def _reader(self, shard: int) -> "_Reader":
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None:
                reader = _Reader(self._directory / self._shards[shard].file, self._shards[shard].rows)
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader


class _Reader:
    """An open shard, used by one thread at a time."""

    def __init__(self, path, rows: int):
        from array_record.python.array_record_module import ArrayRecordReader

        self._path, self._lock = path, threading.Lock()
        with _naming(path):
            self._reader = ArrayRecordReader(_local_copy(path), _READER_OPTIONS)
            found = self._reader.num_records()
        if found != rows:
            raise InputError(f"is damaged: {found} rows, the manifest says {rows}", file=path)

    def read(self, indices: list[int]) -> list[bytes]:
        with self._lock, _naming(self._path):
            return self._reader.read(indices)


@contextlib.contextmanager
def _naming(path):
    """Turns what ArrayRecord finds wrong into a complaint about the file."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(f"is damaged: {str(error).splitlines()[0]}", file=path) from error


def _decoded(entries: list[bytes], manifest: PreparedManifest, directory) -> dict[str, np.ndarray]:
    """Entries as rows, [B, T] each; the directory is named where they are none."""
    dtypes = [manifest.token_dtype, manifest.segment_dtype, *["uint8"] * manifest.has_roles]
    fields = [(name, dtype, (manifest.seq_len,)) for name, dtype in zip(_STORED, dtypes)]
    row = np.dtype(fields)
    if any(len(entry) != row.itemsize for entry in entries):
        raise InputError("is damaged: a row is not as long as the manifest says", file=directory)
    rows = np.frombuffer(b"".join(entries), row)
    segment_ids = rows["segment_ids"].astype(np.int32)
    decoded = {
        "tokens": rows["tokens"].astype(np.int32),
        "positions": _positions(segment_ids),
        "segment_ids": segment_ids,
    }
    return decoded | ({"roles": rows["roles"].copy()} if manifest.has_roles else {})


def _positions(segment_ids) -> np.ndarray:
    """[B, T] int32: places counted from where each segment begins; 0 at padding."""
    columns = np.arange(segment_ids.shape[1], dtype=np.int32)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return np.where(segment_ids == 0, 0, columns - first)


def _local_copy(path) -> str:
    """Returns the path of a file that can be read at random: of one in a bucket, a copy made once.

    Copies lie in `~/.cache/a3_jax/data` (or `$XDG_CACHE_HOME`), by path, size and time of the original.
    """
    if not is_remote(path):
        return os.fspath(path)
    stat = path.stat()
    key = hashlib.blake2b(f"{path} {stat.length} {stat.mtime}".encode(), digest_size=16).hexdigest()
    root = as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    copy = root / "a3_jax" / "data" / key
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        temporary = copy.parent / f".{uuid.uuid4().hex[:12]}.tmp"
        path.copy(temporary)
        temporary.replace(copy)
    return os.fspath(copy)


def is_remote(path) -> bool:
    return "://" in str(path)


_WRITER_OPTIONS = "group_size:1,zstd:1"  # a row is read without its neighbours


def token_dtype(vocab_size: int) -> str:
    """Returns the narrowest dtype that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def segment_dtype(seq_len: int) -> str:
    """Returns the narrowest dtype that holds every segment number of a row."""
    return "uint16" if seq_len < 1 << 16 else "uint32"


def write_shard(path, table: Table, *, tokens: str, segments: str) -> ShardInfo:
    """Writes a table as a shard: whole or not at all.

    Args:
      path: of the file, local or in a bucket.
      table: its rows.
      tokens, segments: dtypes, see `token_dtype` and `segment_dtype`.

    Raises:
      OSError: it can't be written, such as on a full disk.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = as_path(path)
    temporary = _local_temporary(path)
    try:
        try:
            writer = ArrayRecordWriter(temporary, _WRITER_OPTIONS)
            for entry in _entries(table, tokens, segments):
                writer.write(entry)
            writer.close()
        except (RuntimeError, ValueError) as error:  # ArrayRecord's own kinds
            raise OSError(f"can't be written: {str(error).splitlines()[0]}") from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        info = ShardInfo(path.name, table.num_rows, table.num_tokens, size, file_crc32(temporary))
        _publish(temporary, path)
        return info
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _entries(table: Table, tokens: str, segments: str) -> Iterator[bytes]:
    parts = [table.tokens.astype(tokens), table.segment_ids.astype(segments)]
    parts += [] if table.roles is None else [table.roles]
    for row in zip(*parts, strict=True):
        yield b"".join(part.tobytes() for part in row)


def _local_temporary(path) -> str:
    """Returns where a shard is written before it has its name: beside it, or on this machine for a bucket."""
    name = f".{uuid.uuid4().hex[:12]}.tmp"
    if is_remote(path):
        return os.path.join(tempfile.gettempdir(), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fspath(path.parent / name)


def _publish(temporary: str, path) -> None:
    """Gives a finished file its name."""
    if is_remote(path):
        as_path(temporary).copy(path, overwrite=True)
    else:
        os.replace(temporary, path)
