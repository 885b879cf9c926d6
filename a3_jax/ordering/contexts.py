"""Tokens that an example gives beforehand, and those it leaves out: drawn for each document by itself.

Of the n tokens of a document that are free (present, and not given anyway), a context of c = 3:

    free tokens   0  1  2  3  4  5  6
    prefix        x  x  x  .  .  .  .
    suffix        .  .  .  .  x  x  x
    both          x  .  .  .  .  x  x      c split evenly at random, one end may get all of it
    scattered     .  x  .  x  .  .  x      any c tokens
    blocks        x  x  x  .  .  .  x      every other block of c tokens, here those from the first on
    none          .  .  .  .  .  .  .

c is log-uniform in 1..n-1, or in 1..n/2 as the size of blocks: some token is always left to predict.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from a3_jax.ordering.segments import count, fractions, log_uniform, ordinals, shuffle, uniform

_LEAST_MASKED = 1e-3


class _Tokens(NamedTuple):
    """Free tokens of all documents, [T] each: the input of a shape.

    Attributes:
      ordinal: index among the free tokens of its document.
      count: n, the number of them.
      size: c, tokens of the context.
      block: tokens per block.
      part: random word of the document.
      scatter: index in a random order of its free tokens.
    """

    ordinal: np.ndarray
    count: np.ndarray
    size: np.ndarray
    block: np.ndarray
    part: np.ndarray
    scatter: np.ndarray


def _both(of: _Tokens):
    # 0 to c of the c tokens at the beginning, the others at the end.
    left = uniform(of.size + 1, of.part)
    return (of.ordinal < left) | (of.ordinal >= of.count - of.size + left)


_SHAPES = {
    "none": lambda of: np.zeros(of.ordinal.shape, bool),
    "prefix": lambda of: of.ordinal < of.size,
    "suffix": lambda of: of.ordinal >= of.count - of.size,
    "both": _both,
    "scattered": lambda of: of.scatter < of.size,
    "blocks": lambda of: (of.ordinal // of.block + uniform(2, of.part)) % 2 == 0,
}
CONTEXT_SHAPES = tuple(_SHAPES)


def draw_context(shapes: Sequence[str], free, segment_ids, bits: np.random.Philox) -> np.ndarray:
    """Draws the free tokens that are given: one shape per document, equally likely, and one size.

    Args:
      shapes: names in `CONTEXT_SHAPES`, at least one.
      free: [T] bool.
      segment_ids: [T] int, packed document, 0 = padding.
      bits: random source.

    Returns:
      [T] bool; nothing in documents of one free token.
    """
    counts = count(free, segment_ids)
    shape_words, size_words, part_words = bits.random_raw(3 * counts.size).reshape(3, -1)
    shape = uniform(len(shapes), shape_words)[segment_ids]
    tokens = _Tokens(
        ordinal=ordinals(free, segment_ids),
        count=counts[segment_ids],
        size=log_uniform(np.maximum(counts - 1, 0), size_words)[segment_ids],
        block=np.maximum(log_uniform(counts // 2, size_words), 1)[segment_ids],
        part=part_words[segment_ids],
        scatter=shuffle(np.where(free, segment_ids, 0), bits.random_raw(free.size)),
    )
    # Every shape is made for all tokens and read where a document drew it: no loop over documents.
    context = np.zeros(free.shape, bool)
    for number, name in enumerate(shapes):
        context |= (shape == number) & _SHAPES[name](tokens)
    return context & free & (tokens.count > 1)


def draw_masked(free, segment_ids, bits: np.random.Philox) -> np.ndarray:
    """Masks free tokens, each with the probability t that its document drew from (0.001, 1).

    Args:
      free: [T] bool, tokens that may be masked.
      segment_ids: [T] int, packed document, 0 = padding.
      bits: random source.

    Returns:
      [T] float32: 1/t where masked, -1 at the other free tokens, 0 elsewhere. The sum over t of a
      document's masked tokens is n in the mean: their losses so weighted bound that of all n.
    """
    # t is bounded from below, and so are the weights 1/t from above.
    drawn = fractions(bits.random_raw(int(segment_ids.max(initial=0)) + 1))
    share = (_LEAST_MASKED + (1 - _LEAST_MASKED) * drawn)[segment_ids]
    masked = fractions(bits.random_raw(free.size)) < share
    return (free * np.where(masked, 1 / share, -1.0)).astype(np.float32)


def draw_absent(share: float, free, segment_ids, bits: np.random.Philox) -> np.ndarray:
    """Draws the free tokens that are left out: in a share of the examples one span per document.

    A span of n free tokens holds 1 to n / 2 of them, log-uniform, anywhere; given tokens between them
    stay.

    Args:
      share: probability that the example has any.
      free: [T] bool.
      segment_ids: [T] int, packed document, 0 = padding.
      bits: random source; always consumes the same number of words.

    Returns:
      [T] bool; nothing in documents of one free token.
    """
    counts = count(free, segment_ids)
    # One word for the example, a length and a beginning per document; decided by the first, all are drawn.
    words = bits.random_raw(1 + 2 * counts.size)
    lengths = log_uniform(counts // 2, words[1 : 1 + counts.size])
    firsts = uniform(counts - lengths + 1, words[1 + counts.size :])
    index = ordinals(free, segment_ids) - firsts[segment_ids]
    return free & (index >= 0) & (index < lengths[segment_ids]) & (fractions(words[0]) < share)
