"""The sums of `fingerprint`, of parts of an array on the host."""

import numpy as np

from a3_jax.checkpoints.fingerprint import SEEDS

_TILE = 1 << 15  # words in hand, so that they stay in a core's cache


def sums_of_part(part: np.ndarray, begin: tuple[int, ...]) -> np.ndarray:
    """The sums over a part of a leaf, by NumPy alone; those of its parts, added modulo 2^32, are the leaf's.

    Args:
      part: of a dtype of 2 or 4 bytes, at least one axis, any strides.
      begin: the global index of its first element.

    Returns:
      [2] uint32
    """
    if not part.size:
        return np.zeros(2, np.uint32)
    bits = part.view(f"u{part.dtype.itemsize}")
    axes = sorted(range(bits.ndim), key=lambda axis: -bits.strides[axis])  # as it lies in memory
    hashes = [[_host_axis_hash(bits.shape[axis], begin[axis], axis, seed) for axis in axes] for seed in SEEDS]
    inner, columns = len(axes) - 1, bits.shape[axes[-1]]
    while inner and columns < _TILE // 16:  # short rows would cost NumPy a call each
        inner -= 1
        columns *= bits.shape[axes[inner]]
    bits = bits.transpose(axes).reshape(-1, columns)
    (key, key_inner), (weight, weight_inner) = (
        (_outer_sum(of_axes[:inner]), _outer_sum(of_axes[inner:])) for of_axes in hashes
    )
    sums, rows = [0, 0], max(1, _TILE // columns)
    for row in range(0, len(bits), rows):
        here = slice(row, row + rows)
        words = key[here, None] + key_inner
        words ^= bits[here]
        _mix_in_place(words)
        sums[0] += int(words.sum(dtype=np.uint64))
        words *= (weight[here, None] + weight_inner) | np.uint32(1)
        sums[1] += int(words.sum(dtype=np.uint64))
    return np.array([total % 2**32 for total in sums], np.uint32)


def _host_axis_hash(size, begin, axis, seed) -> np.ndarray:
    """`_axis_hash` of the indices from `begin`, [size] uint32."""
    hashes = (np.arange(begin, begin + size, dtype=np.uint64) + seed * (2 * axis + 1)).astype(np.uint32)
    _mix_in_place(hashes)
    return hashes


def _outer_sum(hashes) -> np.ndarray:
    """The sum of hashes, one of each axis, at every index: flat, the last axis fastest."""
    total = np.zeros(1, np.uint32)
    for one in hashes:
        total = (total[:, None] + one).reshape(-1)
    return total


def _mix_in_place(words: np.ndarray) -> None:
    """`_mix` on the host."""
    shifted = np.empty_like(words)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(words, shift, out=shifted)
        words ^= shifted
        words *= np.uint32(factor)
    np.right_shift(words, 16, out=shifted)
    words ^= shifted
