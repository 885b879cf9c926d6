"""Packed rows: what a source becomes once, and what every example is read from."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from a3_jax.checks import one_of
from a3_jax.errors import InputError

GIVEN, PREDICTED, FILLER = range(3)  # roles of tokens: known beforehand; scored; follow, but not scored
PACKINGS = ("first_fit", "concat", "none")
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
      roles: [R, T] uint8, `GIVEN`, `PREDICTED` or `FILLER`; None: all tokens are predicted.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    roles: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def has_roles(self) -> bool:
        return self.roles is not None

    @property
    def largest_id(self) -> int:
        return int(self.tokens.max())

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(np.count_nonzero(self.segment_ids))

    def take(self, rows) -> dict[str, np.ndarray]:
        """Returns rows by number, [B] int: tokens, positions, segment_ids and, if any, roles, [B, T]."""
        arrays = {"tokens": self.tokens, "positions": self.positions, "segment_ids": self.segment_ids}
        arrays |= {} if self.roles is None else {"roles": self.roles}
        return {name: array[rows] for name, array in arrays.items()}


def pack(
    documents: Sequence[np.ndarray],
    seq_len: int,
    packing: str | bool = "first_fit",
    roles: Sequence[np.ndarray] | None = None,
    *,
    first_fit_by: Callable | None = None,
) -> Table:
    """Returns a table of documents.

    Pieces of documents share rows, each with positions from 0: none sees another. Documents of three,
    two and five tokens in rows of four:

        first_fit   a a a c | b b . . | c c c c     a document longer than a row is cut; each piece goes
                                                    into the first row with room (of the last `OPEN_ROWS`)
        concat      a a a b | b c c c | c c . .     one after the other, cut where a row ends
        none        a a a . | b b . . | c c c c     a row each, what is beyond `seq_len` is dropped

    Args:
      documents: [n] int token ids each; empty ones are left out.
      seq_len: T, tokens in a row.
      packing: one of `PACKINGS`; True and False mean "first_fit" and "none".
      roles: [n] uint8 for each document; None: the table has none.
      first_fit_by: what "first_fit" places pieces with, in place of the function of that name.
    """
    if isinstance(packing, bool):
        packing = "first_fit" if packing else "none"
    if seq_len < 1:
        raise InputError(f"must be at least 1, got {seq_len}", field="seq_len")
    one_of("packing", packing, PACKINGS)
    pieces = _cut(documents, seq_len, packing)
    lengths = np.array([stop - start for _, start, stop in pieces], np.int64)
    pack_by = first_fit_by if first_fit_by and packing == "first_fit" else _PLACES[packing]
    rows, offsets, segments = pack_by(lengths, seq_len)
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    table = Table(
        *(np.zeros((num_rows, seq_len), np.int32) for _ in range(3)),
        roles=None if roles is None else np.zeros((num_rows, seq_len), np.uint8),
    )
    ramp = np.arange(seq_len, dtype=np.int32)
    for (document, start, stop), row, offset, segment in zip(pieces, rows, offsets, segments, strict=True):
        here = slice(offset, offset + stop - start)
        table.tokens[row, here] = documents[document][start:stop]
        table.positions[row, here] = ramp[: stop - start]
        table.segment_ids[row, here] = segment
        if roles is not None and table.roles is not None:
            table.roles[row, here] = roles[document][start:stop]
    return table


def _cut(documents: Sequence[np.ndarray], seq_len: int, packing: str) -> list[tuple[int, int, int]]:
    """(document, start, stop) of every piece, in order."""
    pieces, used = [], 0  # used: tokens in the last row of "concat"
    for index, document in enumerate(documents):
        start, end = 0, len(document)
        while start < end:
            stop = min(end, start + seq_len - used)
            pieces.append((index, start, stop))
            if packing == "concat":
                used = (used + stop - start) % seq_len
            start = end if packing == "none" else stop
    return pieces


def _one_a_row(lengths, seq_len):
    """`first_fit`'s result for pieces that share no row."""
    del seq_len
    return np.arange(len(lengths)), np.zeros_like(lengths), np.ones_like(lengths)


def _concatenated(lengths, seq_len):
    """`first_fit`'s result for pieces one after the other, cut where rows end."""
    rows, offsets = np.divmod(np.cumsum(lengths) - lengths, seq_len)
    firsts = np.searchsorted(rows, rows)  # the first piece of the same row
    return rows, offsets, np.arange(len(lengths)) - firsts + 1


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


_PLACES = {"first_fit": first_fit, "concat": _concatenated, "none": _one_a_row}


def long_first_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `first_fit`, but longest first, each piece into the row that it fills best; none is ever closed."""
    placed = np.zeros((3, len(lengths)), np.int64)
    open_rows: list[list[tuple[int, int]]] = [[] for _ in range(seq_len + 1)]  # (row, segments) by room
    rooms, num_rows = 0, 0  # bit r: there is an open row with room for r
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row, segments = open_rows[room].pop()
            rooms ^= 0 if open_rows[room] else 1 << room
        else:
            room, row, segments = seq_len, num_rows, 0
            num_rows += 1
        placed[:, piece] = row, seq_len - room, segments + 1
        if room > length:
            open_rows[room - length].append((row, segments + 1))
            rooms |= 1 << (room - length)
    _, first_pieces = np.unique(placed[0], return_index=True)
    numbers = np.argsort(np.argsort(first_pieces))  # rows by their first piece, not by length
    return numbers[placed[0]] if num_rows else placed[0], placed[1], placed[2]
