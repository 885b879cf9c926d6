"""Packing that leaves next to no padding: for a whole shard of documents at a time."""

import numpy as np


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
