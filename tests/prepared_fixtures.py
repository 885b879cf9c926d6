"""Prepared directories made row by row, without `a3 data prepare`."""

import dataclasses

import numpy as np

from a3_jax.data.prepared_manifest import HELDOUT, TRAIN, PreparedManifest, write_manifest
from a3_jax.data.shards import segment_dtype, token_dtype, write_shard
from a3_jax.data.table import GIVEN, PREDICTED, Table
from a3_jax.tokenizer import bytes_tokenizer


def rows(num_rows, seq_len=8, first=0, roles=False) -> Table:
    """Row r holds two documents and one column of padding; its tokens tell r apart from any other row."""
    numbers = np.arange(first, first + num_rows)[:, None]
    lengths = np.array([seq_len - 3, 2, 1])
    segments = np.tile(np.repeat([1, 2, 0], lengths), (num_rows, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (num_rows, 1)).astype(np.int32)
    tokens = np.where(segments == 0, 0, (numbers * 7 + np.arange(seq_len) * 31) % 250).astype(np.int32)
    tokens[:, 0], tokens[:, 1] = numbers[:, 0] % 250, numbers[:, 0] // 250
    kinds = np.where(positions < 2, GIVEN, PREDICTED).astype(np.uint8) if roles else None
    return Table(tokens, positions, segments, kinds)


def row_numbers(tokens):
    """Which rows these are, [B]."""
    return tokens[:, 0] + 250 * tokens[:, 1]


def part(table: Table, first, last) -> Table:
    fields = {name: getattr(table, name) for name in ("tokens", "positions", "segment_ids", "roles")}
    return Table(**{name: None if array is None else array[first:last] for name, array in fields.items()})


def make_prepared(directory, table: Table, *, rows_a_shard=5, heldout: Table | None = None, **changes):
    """Writes `table` in shards of a few rows, and a manifest; returns the directory as a string."""
    tokenizer = bytes_tokenizer()
    dtypes = {"tokens": token_dtype(tokenizer.vocab_size), "segments": segment_dtype(table.seq_len)}
    splits = {}
    for split, whole in ((TRAIN, table), (HELDOUT, heldout)):
        if whole is not None:
            firsts = range(0, whole.num_rows, rows_a_shard)
            splits[split] = [
                write_shard(
                    directory / f"{split}-{number:05}.array_record",
                    part(whole, first, first + rows_a_shard),
                    **dtypes,
                )
                for number, first in enumerate(firsts)
            ]
    (directory / "tokenizer").mkdir()
    for name, text in tokenizer.files().items():
        (directory / "tokenizer" / name).write_text(text)
    manifest = PreparedManifest(
        seq_len=table.seq_len, vocab_size=tokenizer.vocab_size, largest_id=table.largest_id,
        tokenizer=tokenizer.fingerprint, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        token_dtype=dtypes["tokens"], segment_dtype=dtypes["segments"], has_roles=table.has_roles,
        settings={}, sources=[], counts={}, splits=splits,
    )  # fmt: skip
    write_manifest(directory, dataclasses.replace(manifest, **changes))
    return str(directory)
