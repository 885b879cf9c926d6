"""Packed rows: what a source becomes once, and what every example is read from."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from a3_jax.errors import InputError

OPEN_ROWS = 512  # rows that first fit looks at; an older, nearly full one is closed


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of packed documents, in reading order.

    Two documents, of three and two tokens, in a row of six:

        tokens        7  8  9  4  5  0
        positions     0  1  2  0  1  0
        segment_ids   1  1  1  2  2  0     0 = padding, whatever the token there

    Attributes:
      tokens, positions, segment_ids: [R, T] int32.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(np.count_nonzero(self.segment_ids))


def pack(documents: Sequence[np.ndarray], seq_len: int, packing: bool = True) -> Table:
    """A table of documents.

    A document longer than a row is cut into chunks, each with positions from 0: neither sees the
    other. Chunks go, in order, into the first row with room for them (of the last `OPEN_ROWS`).

    Args:
      documents: [n] int token ids each; empty ones are left out.
      seq_len: T, tokens in a row.
      packing: False gives each document a row of its own and drops what is beyond `seq_len`.

    Raises:
      InputError: `seq_len` below 1.
    """
    if seq_len < 1:
        raise InputError(f"must be at least 1, got {seq_len}", field="seq_len")
    chunks = [
        document[first : first + seq_len]
        for document in documents
        for first in range(0, len(document) if packing else min(len(document), 1), seq_len)
    ]
    lengths = np.array([len(chunk) for chunk in chunks], np.int64)
    if packing:
        rows, offsets, segments = first_fit(lengths, seq_len)
    else:
        rows, offsets, segments = np.arange(len(chunks)), np.zeros_like(lengths), np.ones_like(lengths)
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target = np.repeat(rows * seq_len + offsets, lengths) + inside

    def spread(values) -> np.ndarray:
        flat = np.zeros(num_rows * seq_len, np.int32)
        flat[target] = values
        return flat.reshape(num_rows, seq_len)

    tokens = np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
    return Table(
        tokens=spread(tokens), positions=spread(inside), segment_ids=spread(np.repeat(segments, lengths))
    )


def first_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts chunks into rows: each into the first open row with room, or into a new one.

    Args:
      lengths: [n] int, each from 1 to `seq_len`.
      seq_len: tokens in a row.

    Returns:
      [n] int64 each: the chunk's row, its offset there, and its segment number (from 1).
    """
    placed = np.zeros((3, len(lengths)), np.int64)
    free = np.zeros(OPEN_ROWS, np.int64)  # of row r at r % OPEN_ROWS: opening a row closes an old one
    segments = np.zeros(OPEN_ROWS, np.int64)
    num_rows = 0
    for chunk, length in enumerate(lengths.tolist()):
        oldest = num_rows % OPEN_ROWS
        fitting = np.flatnonzero(free >= length)
        if fitting.size:
            slot = int(fitting[np.searchsorted(fitting, oldest) % fitting.size])
        else:
            slot = oldest
            free[slot], segments[slot] = seq_len, 0
            num_rows += 1
        row = slot + (num_rows - 1 - slot) // OPEN_ROWS * OPEN_ROWS
        segments[slot] += 1
        placed[:, chunk] = row, seq_len - free[slot], segments[slot]
        free[slot] -= length
    return placed[0], placed[1], placed[2]
