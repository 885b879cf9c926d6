"""Arithmetic over the documents of one packed row, all of them at once; NumPy, no loop over tokens.

Documents follow each other, each in reading order; `segment_ids` says whose a slot is, 0 = padding.
Values per document are arrays [D + 1], to be indexed by segment: entry 0, padding's, means nothing.
Randomness comes in as 64-bit words, so that the caller decides which words decide what.
"""

import numpy as np

_FRACTION = 2.0**-53  # of the top 53 bits of a word: a number in [0, 1)


def fractions(words):
    """Returns [...] float64, uniform in [0, 1), from random words of the same shape (uint64)."""
    return (words >> np.uint64(11)) * _FRACTION


def uniform(counts, words) -> np.ndarray:
    """Draws [...] int64: whole numbers in 0..count-1, each equally likely; counts are at least 1."""
    return (fractions(words) * counts).astype(np.int64)


def log_uniform(most, words) -> np.ndarray:
    """Draws [...] int64: whole numbers in 1..most; 0 where `most` is 0.

    k has probability log(1 + 1/k) / log(1 + most): 1, 2 to 3, 4 to 7, ... are equally likely.
    """
    drawn = np.exp(fractions(words) * np.log1p(most)).astype(np.int64)
    return np.minimum(drawn, most)


def count(mask, segment_ids) -> np.ndarray:
    """Counts the slots of a mask ([T] bool) in each document: [D + 1] int64."""
    return np.bincount(segment_ids[mask], minlength=int(segment_ids.max(initial=0)) + 1)


def ordinals(mask, segment_ids) -> np.ndarray:
    """Counts the slots of a mask before each slot in its own document: [T] int64.

    segment_ids   1  1  1  1  2  2
    mask          1  0  1  1  0  1
    ordinals      0  1  1  2  0  0
    """
    first = np.zeros(int(segment_ids.max(initial=0)) + 1, np.intp)
    first[segment_ids[::-1]] = np.arange(segment_ids.size)[::-1]
    before = np.cumsum(mask) - mask
    return before - before[first[segment_ids]]


def shuffle(segment_ids, words) -> np.ndarray:
    """Returns each slot's index in a random permutation of its own segment: [T] int32.

    One sort of 64-bit words (segment, random bits, slot): no two are equal, so every sorting
    algorithm gives the same answer, and the slot is read back from the sorted word.

    Args:
      segment_ids: [T] int, 0 and up; slots of a segment may be anywhere.
      words: [T] uint64.
    """
    length = segment_ids.size
    if length == 0:
        return np.zeros(0, np.int32)
    slot_bits = length.bit_length()
    segment_bits = int(segment_ids.max()).bit_length()
    random_bits = 64 - segment_bits - slot_bits
    words = (words >> np.uint64(64 - random_bits)) << np.uint64(slot_bits)
    if segment_bits:
        words |= segment_ids.astype(np.uint64) << np.uint64(64 - segment_bits)
    words |= np.arange(length, dtype=np.uint64)
    words.sort()
    slots = (words & np.uint64((1 << slot_bits) - 1)).astype(np.intp)
    # Sorted, segment s begins after all smaller ones: taken off, an index counts within its own segment.
    sizes = np.bincount(segment_ids)
    first = np.cumsum(sizes) - sizes
    index = np.empty(length, np.int32)
    index[slots] = np.arange(length, dtype=np.int32)
    return index - first.astype(np.int32)[segment_ids]
