"""Group ranks: which tokens come when. NumPy on the host, no loop over tokens.

A rank is per document, 0 for its earliest group, without gaps; tokens of equal rank are one group,
predicted in parallel. For a document of seven tokens and groups of three:

    position        0  1  2  3  4  5  6
    l2r             0  1  2  3  4  5  6
    contiguous(3)   0  0  0  1  1  1  2
    random(3)       1  0  2  0  1  1  0     a random permutation, cut into groups
    spread(1)       0  4  2  5  1  6  3     halving strides: 0, then 4, then 2 and 6, then the odd ones

In training, `draw` is a function of (seed, running number of the example over all epochs): an
example has the same order on every host and after every restart, and a new one each epoch. It also
draws what is given beforehand (`contexts`), which comes before all of this.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from a3_jax.checks import one_of
from a3_jax.errors import InputError
from a3_jax.ordering.contexts import draw_absent, draw_context, draw_masked
from a3_jax.ordering.segments import count, fractions, ordinals, shuffle

ORDERS = ("l2r", "random", "spread", "block")  # of generation and scoring
INNER_ORDERS = ("l2r", "random", "spread")  # inside a block
TRAINING_ORDERS = ("l2r", "contiguous", "random", "spread")
CONTEXTS = ("flat", "l2r")
TRAINING_CONTEXTS = ("flat", "l2r", "group")

_WORD = (1 << 64) - 1


def l2r(length: int) -> np.ndarray:
    """Ranks one token per group, in reading order: [T] int32."""
    return np.arange(length, dtype=np.int32)


def contiguous(length: int, size: int) -> np.ndarray:
    """Ranks neighbours in groups of `size` (the last may be smaller), in reading order: [T] int32."""
    return l2r(length) // np.int32(size)


def random(length: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a uniformly random permutation into groups of `size` (the last may be smaller): [T] int32."""
    bits = rng.bit_generator.random_raw(length)
    return shuffle(np.ones(length, np.int32), bits) // np.int32(size)


def spread(length: int, size: int) -> np.ndarray:
    """Ranks by halving strides, so that the tokens of a group are far apart (arXiv 2506.19037): [T] int32.

    Index 0 is level 0; the other indices of level l are the odd multiples of 2^(L - l), midway between
    indices of lower levels, where L = ceil(log2 T). Levels come one after the other, each left to
    right, in groups of up to `size` that never cross a level and never hold more tokens than come
    before them.
    """
    index = np.arange(length)
    levels = max(length - 1, 0).bit_length()
    # index & -index is the lowest set bit. The more often 2 divides an index, the earlier is its level.
    trailing = np.log2(np.maximum(index & -index, 1)).astype(np.int32)
    level = np.where(index == 0, 0, levels - trailing)
    ranks, rank, placed = np.zeros(length, np.int32), 0, 0
    for wanted in range(levels + 1):
        # The first groups double with what is placed, until they reach `size`; the rest is cut at once.
        members = np.flatnonzero(level == wanted)
        while len(members) and placed < size:  # the first few groups, each as large as what is placed
            group, members = np.split(members, [min(max(placed, 1), len(members))])
            ranks[group] = rank
            rank, placed = rank + 1, placed + len(group)
        ranks[members] = rank + np.arange(len(members)) // size
        rank, placed = rank + -(-len(members) // size), placed + len(members)
    return ranks


def block(length: int, size: int, block_size: int, inner: str, rng: np.random.Generator) -> np.ndarray:
    """Ranks blocks of `block_size` left to right, each by `inner` order in groups of `size`: [T] int32."""
    ranks, before = np.zeros(length, np.int32), 0
    for first in range(0, length, block_size):
        count = min(block_size, length - first)
        own = order_ranks(inner, count, min(size, count), rng)
        # Every group of a block comes after all groups of the blocks to its left.
        ranks[first : first + count] = before + own
        before += int(own.max()) + 1
    return ranks


def order_ranks(
    order: str,
    length: int,
    group_size: int,
    rng: np.random.Generator,
    *,
    block_size: int = 32,
    block_order: str = "random",
) -> np.ndarray:
    """Returns the ranks that `order` and `group_size` mean when generating or scoring: [T] int32.

    Args:
      order: "l2r" (contiguous groups where `group_size` > 1), "random", "spread" or "block".
      length: number of tokens to rank: all of a text, or its blanks alone.
      group_size: tokens per group.
      rng: read by random orders only.
      block_size, block_order: of "block": tokens a block, and the order inside.
    """
    one_of("order", order, ORDERS)
    if group_size < 1:
        raise InputError(f"must be at least 1, got {group_size}", field="group_size")
    if order == "block":
        return block(length, group_size, block_size, block_order, rng)
    if order == "spread":
        return spread(length, group_size)
    return random(length, group_size, rng) if order == "random" else contiguous(length, group_size)


def context_first(ranks, given, mode: str = "flat") -> np.ndarray:
    """Ranks the given tokens first and the rest after them, without gaps.

        ranks   0  0  1  2  2        given   1  0  0  1  0
        flat    0  1  2  0  3        one group of all given tokens
        l2r     0  2  3  1  4        given tokens one by one, in reading order

    Args:
      ranks: [T] int, of which only the order among tokens that are not given matters.
      given: [T] bool.
      mode: "flat" or "l2r".

    Returns:
      [T] int32.
    """
    one_of("context", mode, CONTEXTS)
    ranks, given = np.asarray(ranks), np.asarray(given, bool)
    count = int(given.sum())
    result = np.zeros(ranks.shape, np.int32)
    if mode == "l2r":
        result[given] = l2r(count)
    # The inverse of `unique` numbers distinct ranks 0, 1, ...: gaps close, the order stays.
    groups_before = count if mode == "l2r" else min(count, 1)
    result[~given] = groups_before + np.unique(ranks[~given], return_inverse=True)[1]
    return result


class Drawn(NamedTuple):
    """Training targets of one packed row, [T] each, in the order given.

    Attributes:
      ranks: int32, 0.. within each document; 0 at padding.
      segment_ids: int, packed document; 0 = padding, or absent: its position is kept, but it has no row.
      predicted: bool, tokens that are neither given nor padding; of masked diffusion float32, 1/t at
        masked tokens and -1 at those that might have been.
    """

    ranks: np.ndarray
    segment_ids: np.ndarray
    predicted: np.ndarray


def draw(stage: Any, positions, segment_ids, seed: int, index: int, given=None) -> Drawn:
    """Draws the ranks of one packed row in training, and which of its tokens are predicted.

    The row draws one of the stage's orders (by weight) and one of its group sizes (uniformly); each
    document is then ranked by itself. Rows drawn with the same index share one permutation of their
    slots, of which a shorter row uses the part it has.

    Given tokens come first, ranked as the order's `context` says; the rest follows, in the order over
    its own tokens alone. A document of seven, of which three are given, in contiguous groups of two:

        given            1  0  0  1  1  0  0
        context flat     0  1  1  0  0  2  2        one group
        context l2r      0  3  3  1  2  4  4        one token per group, in reading order
        context group    0  2  2  0  1  3  3        contiguous groups of the example's size

    Args:
      stage: a `curriculum.Stage`, of which only `objective`, `orders` and `absent` are read; objective
        "ar" is always left to right, "masked_diffusion" one group, in reading order.
      positions: [T] int, 0.. within each document.
      segment_ids: [T] int, packed document, 0 = padding; a document's slots are next to each other.
      seed: the run's.
      index: running number of the example over all epochs.
      given: [T] bool, tokens that are known beforehand; None for none.
    """
    positions, segment_ids = np.asarray(positions), np.asarray(segment_ids)
    given = None if given is None else np.asarray(given, bool)
    if stage.objective == "ar":
        return _drawn(positions, segment_ids, given)
    bits = np.random.Philox(key=np.array([seed & _WORD, index & _WORD], np.uint64))
    if stage.objective == "masked_diffusion":
        ranks, segment_ids, free = _drawn(np.zeros_like(positions), segment_ids, given)
        return Drawn(ranks, segment_ids, draw_masked(free, segment_ids, bits))
    # One word for the order, one for the size, one per slot, read or not: what one example draws can't shift
    # the words of what comes after.
    words = bits.random_raw(2 + positions.size)
    order = _pick_weighted(stage.orders, words[0])
    size = order.group_sizes[int(words[1] % len(order.group_sizes))]
    if given is None and not order.context_shapes and not stage.absent:
        return _drawn(_own_ranks(order.order, size, segment_ids, positions, words[2:]), segment_ids)
    return _draw_after_given(order, size, stage.absent, segment_ids, given, words[2:], bits)


def _draw_after_given(order, size, absent_share, segment_ids, given, words, bits) -> Drawn:
    """Draws a row in which tokens may be given or absent; their random words come after the order's."""
    present = segment_ids != 0
    given = np.zeros(present.shape, bool) if given is None else present & given
    free = present & ~given
    if absent_share:
        absent = draw_absent(absent_share, free, segment_ids, bits)
        free, segment_ids = free & ~absent, np.where(absent, 0, segment_ids)
    if order.context_shapes:
        context = draw_context(order.context_shapes, free, segment_ids, bits)
        free, given = free & ~context, given | context

    # Given tokens take the first ranks, in groups of `width`; free tokens follow, in an order of their own.
    width = {"flat": len(given) + 1, "l2r": 1, "group": size}[order.context]
    groups_before = -(-count(given, segment_ids) // width)
    own = _own_ranks(order.order, size, np.where(free, segment_ids, 0), ordinals(free, segment_ids), words)
    ranks = np.where(given, ordinals(given, segment_ids) // width, groups_before[segment_ids] + own)
    return _drawn(ranks, segment_ids, given)


def _drawn(ranks, segment_ids, given=None) -> Drawn:
    present = segment_ids != 0
    ranks = np.where(present, ranks, 0).astype(np.int32)
    return Drawn(ranks, segment_ids, present if given is None else present & ~given)


def _own_ranks(order: str, size: int, segment_ids, ordinal, words) -> np.ndarray:
    """Ranks each segment's slots, which have these ordinals in it, by an order: [T] int."""
    if order == "random":
        return shuffle(segment_ids, words) // size
    return _spread_segments(segment_ids, size) if order == "spread" else ordinal // size


def _spread_segments(segment_ids, size: int) -> np.ndarray:
    """Ranks each segment's own slots by `spread`: [T] int32; 0 in segment 0."""
    # The stable sort lists padding (segment 0), then each segment's slots in reading order.
    slots = np.argsort(segment_ids, kind="stable")
    padding, *lengths = np.bincount(segment_ids, minlength=1).tolist()
    ranks = np.zeros(segment_ids.shape, np.int32)
    ranks[slots[padding:]] = np.concatenate(
        [np.zeros(0, np.int32), *(_kept_spread(length, size) for length in lengths)]
    )
    return ranks


_kept_spread = functools.lru_cache(maxsize=1024)(spread)  # nobody writes into them


def _pick_weighted(orders, word):
    """Picks the order in whose share of the summed weights a random 64-bit word falls."""
    shares = np.cumsum([order.weight for order in orders])
    point = fractions(word) * shares[-1]
    return orders[min(int(np.searchsorted(shares, point, side="right")), len(orders) - 1)]
