"""Rows to a shard file, whole or not at all."""

import os
import tempfile
import uuid
from collections.abc import Iterator

from a3_jax.data.prepared_manifest import ShardInfo, file_crc32
from a3_jax.data.shards import is_remote
from a3_jax.data.table import Table
from a3_jax.paths import as_path

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
