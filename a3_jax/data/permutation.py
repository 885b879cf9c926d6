"""A keyed permutation of row numbers: any place of any epoch is found without those before it."""

import numpy as np

_FEISTEL_ROUNDS = 8
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def permute(places, num_rows: int, seed: int, epochs) -> np.ndarray:
    """Returns a keyed bijection of 0..num_rows-1, another for each (seed, epoch).

    A Feistel network over the smallest even number of bits that holds them all; what falls outside
    goes through again until it falls inside.

    Args:
      places: [n] int, each in 0..num_rows-1.
      num_rows: R.
      seed: the run's.
      epochs: [n] int.

    Returns:
      [n] int64, rows.
    """
    half_bits = np.uint64(max(1, (int(num_rows - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = _mix(_mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF)) ^ np.asarray(epochs).astype(np.uint64))
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right, key = values[outside] >> half_bits, values[outside] & mask, keys[outside]
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key + np.uint64(turn)) ^ right) & mask)
        values[outside] = left << half_bits | right
        outside = values >= num_rows
    return values.astype(np.int64)


def _mix(words):
    """SplitMix64's finaliser: a bijection of 64-bit words in which every bit depends on every other."""
    with np.errstate(over="ignore"):
        words = words + _GOLDEN_RATIO
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))
