"""Laws of the orders, by counting; what decides a draw, and what must not."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_jax.errors import InputError
from a3_jax.ordering import ranks
from a3_jax.ordering.curriculum import Order, Stage

DOCUMENTS = st.lists(st.integers(1, 9), min_size=0, max_size=5)


def packed(lengths, padding=0):
    """(positions, segment_ids) of one row of documents of these lengths, then padding."""
    positions = [np.arange(length) for length in lengths] + [np.zeros(padding)]
    segments = [np.full(length, 1 + index) for index, length in enumerate(lengths)] + [np.zeros(padding)]
    return np.concatenate(positions).astype(np.int32), np.concatenate(segments).astype(np.int32)


def stage(*orders, **fields):
    return Stage("test", 1, orders=orders, **fields)


def draw_ranks(*arguments):
    return ranks.draw(*arguments).ranks


def assert_dense_groups(document_ranks, size):
    """Groups 0, 1, ... of `size` tokens each, but for a smaller last one."""
    counts = np.bincount(document_ranks)
    assert (counts[:-1] == size).all() and 1 <= counts[-1] <= size
    assert counts.sum() == len(document_ranks)


def test_hand_drawn():
    assert ranks.l2r(4).tolist() == [0, 1, 2, 3]
    assert ranks.contiguous(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert ranks.context_first([0, 0, 1, 2, 2], [1, 0, 0, 1, 0]).tolist() == [0, 1, 2, 0, 3]
    assert ranks.context_first([0, 0, 1, 2, 2], [1, 0, 0, 1, 0], "l2r").tolist() == [0, 2, 3, 1, 4]
    assert ranks.context_first([3, 3, 1], [0, 0, 0]).tolist() == [1, 1, 0]
    assert ranks.context_first([3, 3, 1], [1, 1, 1], "l2r").tolist() == [0, 1, 2]


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**32))
def test_random_groups_are_dense(length, size, seed):
    drawn = ranks.random(length, size, np.random.default_rng(seed))
    assert drawn.dtype == np.int32 and drawn.shape == (length,)
    if length:
        assert_dense_groups(drawn, size)


def test_random_is_uniform_over_permutations():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(ranks.random(4, 1, rng)) for _ in range(24_000))
    assert set(counts) == set(itertools.permutations(range(4)))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi_square < 58  # 23 degrees of freedom: exceeded once in 10,000 seeds


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12),
    st.sampled_from(ranks.CONTEXTS),
)
def test_context_first_is_dense_and_keeps_the_order_of_the_rest(tokens, mode):
    old = np.array([rank for rank, _ in tokens])
    is_given = np.array([flag for _, flag in tokens])
    new = ranks.context_first(old, is_given, mode)
    assert set(new) == set(range(new.max() + 1))
    rest = ~is_given
    assert (
        np.sign(np.subtract.outer(new[rest], new[rest])) == np.sign(np.subtract.outer(old[rest], old[rest]))
    ).all()
    if is_given.any() and rest.any():
        assert new[is_given].max() < new[rest].min()


@given(DOCUMENTS, st.integers(0, 4), st.integers(0, 2**63), st.integers(0, 2**63), st.sampled_from([1, 2, 4]))
def test_draw_ranks_each_document_by_itself(lengths, padding, seed, index, size):
    positions, segments = packed(lengths, padding)
    drawn = draw_ranks(stage(Order("random", (size,))), positions, segments, seed, index)
    assert drawn.dtype == np.int32
    assert (drawn[segments == 0] == 0).all()
    for segment in range(1, len(lengths) + 1):
        assert_dense_groups(drawn[segments == segment], size)


@given(DOCUMENTS, st.integers(0, 4), st.sampled_from([1, 2, 4]))
def test_draw_in_reading_order(lengths, padding, size):
    positions, segments = packed(lengths, padding)
    drawn = draw_ranks(stage(Order("contiguous", (size,))), positions, segments, 0, 0)
    assert drawn.tolist() == (positions // size).tolist()
    assert (draw_ranks(stage(Order("l2r")), positions, segments, 0, 0) == positions).all()
    assert (draw_ranks(stage(Order("random"), objective="ar"), positions, segments, 0, 0) == positions).all()


def test_draw_of_a_packed_document_is_uniform():
    """All six orders of a document of three, next to other documents, equally often."""
    positions, segments = packed([2, 3, 4])
    counts = Counter(
        tuple(draw_ranks(stage(Order("random", (1,))), positions, segments, 5, index)[2:5])
        for index in range(6000)
    )
    assert len(counts) == 6
    assert (
        sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 26
    )  # 5 degrees of freedom, 1 in 10,000


def test_documents_of_a_row_are_drawn_independently():
    positions, segments = packed([2, 2])
    drawn = [draw_ranks(stage(Order("random", (1,))), positions, segments, 1, index) for index in range(2000)]
    agreement = np.mean([row[0] == row[2] for row in drawn])
    assert 0.45 < agreement < 0.55


def test_law_of_a_mixture():
    """Shares of the orders follow the weights, group sizes are equally likely, one of each a row."""
    mixture = stage(
        Order("l2r", weight=1), Order("contiguous", (2, 4, 8), weight=2), Order("random", (16,), weight=5)
    )
    positions, segments = packed([32, 32])
    counts = Counter()
    for index in range(4000):
        drawn = draw_ranks(mixture, positions, segments, 3, index)
        sizes = {int(np.bincount(document).max()) for document in (drawn[:32], drawn[32:])}
        assert len(sizes) == 1
        counts[sizes.pop()] += 1
    expected = {1: 500, 2: 1000 / 3, 4: 1000 / 3, 8: 1000 / 3, 16: 2500}
    assert set(counts) == set(expected)
    assert (
        sum((counts[size] - mean) ** 2 / mean for size, mean in expected.items()) < 24
    )  # 4 degrees, 1 in 10,000


def test_draw_depends_on_seed_and_index_alone():
    positions, segments = packed([9, 7], padding=3)
    mixture = stage(Order("random", (1, 2)), Order("l2r"))
    again = stage(Order("random", (1, 2)), Order("l2r"))
    first = draw_ranks(mixture, positions, segments, 7, 11)
    np.random.seed(0)
    draw_ranks(mixture, positions, segments, 7, 12)
    assert (draw_ranks(again, positions.astype(np.int64), segments.astype(np.int64), 7, 11) == first).all()
    single = stage(Order("random", (1,)))
    drawn = {
        (seed, index): draw_ranks(single, positions, segments, seed, index).tobytes()
        for seed in (0, 1, 2**31)
        for index in (0, 1, 2**40)
    }
    assert len(set(drawn.values())) == 9


def test_golden_draw():
    """The stream of (seed, index) is a promise to every run that resumes: these numbers stay."""
    positions, segments = packed([6, 3], padding=1)
    drawn = draw_ranks(stage(Order("random", (2,))), positions, segments, 42, 7)
    assert drawn.tolist() == [2, 2, 1, 1, 0, 0, 0, 1, 0, 0]


def test_golden_draws_of_a_mixture():
    """As before contexts and absent spans could be drawn: their random words come after all others."""
    mixture = stage(Order("l2r"), Order("contiguous", (2, 4, 8), 2), Order("random", (1, 2, 4, 8, 16), 5))
    row, digest = packed([40, 1, 17, 70], padding=5), hashlib.sha256()
    for seed, index in itertools.product((0, 1, 2**40), range(200)):
        digest.update(draw_ranks(mixture, *row, seed, index).tobytes())
    assert digest.hexdigest() == "fa6f0b2035e506b3c7c4f7771b8bdc39fe7061a196a0d430ef1d61b9aea56d33"


@given(DOCUMENTS, st.integers(0, 4), st.sampled_from([1, 2, 4, 16]))
def test_draw_of_a_spread_order(lengths, padding, size):
    """The order of generation and scoring, in each document by itself."""
    drawn = draw_ranks(stage(Order("spread", (size,))), *packed(lengths, padding), 0, 0)
    expected = [ranks.order_ranks("spread", length, size, None) for length in lengths]
    assert drawn.tolist() == np.concatenate([*expected, np.zeros(padding, int)]).tolist()
    assert drawn.dtype == np.int32


def test_draw_of_segments_as_they_stand():
    """Whatever is packed where: numbers of documents need not ascend, or be without gaps."""
    positions, segments = packed([3, 5, 2])
    renumbered = np.array([0, 7, 2, 5], np.int32)[segments]
    for order in (Order("spread", (2,)), Order("l2r", (), 1.0, ("prefix",))):
        drawn = draw_ranks(stage(order), positions, renumbered, 0, 0)
        for segment in (7, 2, 5):
            own = drawn[renumbered == segment]
            assert set(own) == set(range(own.max() + 1))


def test_one_draw_for_rows_of_several_lengths():
    """Rows that share an index share one order of their slots (the release: one order a batch)."""
    single = stage(Order("random", (1,)))
    long = draw_ranks(single, *packed([8]), 0, 5)
    short = draw_ranks(single, *packed([5], padding=3), 0, 5)
    assert np.argsort(short[:5]).tolist() == [slot for slot in np.argsort(long) if slot < 5]


@given(st.sampled_from(ranks.ORDERS), st.integers(0, 20), st.integers(1, 6))
@settings(max_examples=30)
def test_order_ranks(order, length, size):
    drawn = ranks.order_ranks(order, length, size, np.random.default_rng(0))
    if order == "l2r":
        assert drawn.tolist() == [position // size for position in range(length)]
    elif order == "random" and length:
        assert_dense_groups(drawn, size)
    elif length:  # the first groups of a spread order and the last of each block may be smaller
        sizes = np.bincount(drawn)
        assert sizes.min() >= 1 and sizes.max() <= size


def test_blocks_come_from_left_to_right():
    drawn = ranks.order_ranks("block", 20, 2, np.random.default_rng(0), block_size=8, block_order="spread")
    blocks = [drawn[first : first + 8] for first in (0, 8, 16)]
    assert all(left.max() < right.min() for left, right in itertools.pairwise(blocks))
    assert (drawn[8:16] - drawn[8:16].min() == ranks.spread(8, 2)).all()


def test_bad_orders():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"order: .*did you mean 'random'"):
        ranks.order_ranks("randm", 4, 1, rng)
    with pytest.raises(InputError, match="group_size"):
        ranks.order_ranks("l2r", 4, 0, rng)
    with pytest.raises(InputError, match=r"context.*did you mean 'flat'"):
        ranks.context_first([0], [1], "flt")
