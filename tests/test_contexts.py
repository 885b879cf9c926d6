"""Laws of what is given beforehand and what is left out: shapes, sizes, shares, and the ranks that follow."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given as cases
from hypothesis import strategies as st

from a3_jax.ordering.contexts import CONTEXT_SHAPES
from a3_jax.ordering.curriculum import Order, Stage
from a3_jax.ordering.ranks import TRAINING_CONTEXTS, TRAINING_ORDERS, draw, spread
from tests.test_ranks import assert_dense_groups, packed

DOCUMENTS = st.lists(st.integers(1, 12), min_size=0, max_size=5)
SIZED_SHAPES = [shape for shape in CONTEXT_SHAPES if shape not in ("none", "blocks")]


def stage(order="random", sizes=(1,), shapes=(), context="flat", **fields):
    sizes = () if order == "l2r" else sizes
    return Stage("test", 1, orders=(Order(order, sizes, 1.0, shapes, context),), **fields)


def drawn_contexts(count, length, *shapes):
    """[count, length] bool: the contexts of as many examples of one document."""
    row, made = packed([length]), stage(shapes=shapes)
    return ~np.stack([draw(made, *row, 5, index).predicted for index in range(count)])


def chi_square(counts, expected):
    return sum((counts.get(value, 0) - mean) ** 2 / mean for value, mean in expected.items())


def runs(flags):
    """Lengths of the runs of equal values, and the first value."""
    return [len(list(run)) for _, run in itertools.groupby(flags)], bool(flags[0])


def has_shape(shape, context) -> bool:
    """Whether a context of n tokens may come from a shape, said in another way than the code does."""
    lengths, first = runs(context.tolist())
    return {
        "none": not context.any(),
        "prefix": first and len(lengths) == 2,
        "suffix": not first and len(lengths) == 2,
        "both": not context.all() and len(lengths) in (2, 3) and (first or len(lengths) == 2),
        "scattered": context.any() and not context.all(),
        "blocks": len(lengths) > 1 and set(lengths[:-1]) == {lengths[0]} and lengths[-1] <= lengths[0],
    }[shape]


@pytest.mark.parametrize("shape", CONTEXT_SHAPES)
@cases(DOCUMENTS, st.integers(0, 3), st.integers(0, 2**40))
def test_each_document_has_a_context_of_its_shape(shape, lengths, padding, index):
    positions, segments = packed(lengths, padding)
    drawn = draw(stage(shapes=(shape,)), positions, segments, 0, index)
    assert not drawn.predicted[segments == 0].any() and (drawn.segment_ids == segments).all()
    for document, length in enumerate(lengths, start=1):
        context = ~drawn.predicted[segments == document]
        assert has_shape(shape, context) if length > 1 else not context.any()


def test_shapes_are_equally_likely_and_each_documents_own():
    positions, segments = packed([9, 9])
    made = stage(shapes=("none", "prefix", "suffix"))
    counts = Counter()
    for index in range(4500):
        given = ~draw(made, positions, segments, 3, index).predicted
        ends = [(bool(document[0]), bool(document[-1])) for document in (given[:9], given[9:])]
        counts[tuple(ends)] += 1
    kinds = [(False, False), (True, False), (False, True)]
    expected = dict.fromkeys(itertools.product(kinds, kinds), 500)
    assert set(counts) == set(expected)
    assert chi_square(counts, expected) < 32  # 8 degrees of freedom, 1 in 10,000


@pytest.mark.parametrize("shape", SIZED_SHAPES)
def test_sizes_are_log_uniform(shape):
    """Of 9 tokens: 1 to 8, k as often as log(1 + 1/k)."""
    counts = Counter(drawn_contexts(5000, 9, shape).sum(axis=1).tolist())
    expected = {k: 5000 * np.log(1 + 1 / k) / np.log(9) for k in range(1, 9)}
    assert set(counts) == set(expected)
    assert chi_square(counts, expected) < 30  # 7 degrees, 1 in 10,000


def test_both_ends_share_evenly():
    contexts = drawn_contexts(6000, 9, "both")
    of_three = contexts[contexts.sum(axis=1) == 3]
    counts = Counter(next(k for k, flag in enumerate(row) if not flag) for row in of_three)  # left end
    assert chi_square(counts, dict.fromkeys(range(4), len(of_three) / 4)) < 21  # 3 degrees


def test_scattered_tokens_are_any():
    contexts = drawn_contexts(8000, 5, "scattered")
    pairs = contexts[contexts.sum(axis=1) == 2]
    counts = Counter(tuple(np.flatnonzero(row)) for row in pairs)
    expected = dict.fromkeys(itertools.combinations(range(5), 2), len(pairs) / 10)
    assert chi_square(counts, expected) < 34  # 9 degrees


def test_blocks_have_log_uniform_lengths_and_either_parity():
    """Of 9 tokens: blocks of 1 to 4."""
    found = [runs(row) for row in drawn_contexts(5000, 9, "blocks").tolist()]
    counts = Counter(lengths[0] for lengths, _ in found)
    expected = {k: 5000 * np.log(1 + 1 / k) / np.log(5) for k in range(1, 5)}
    assert chi_square(counts, expected) < 21
    assert 0.47 < np.mean([first for _, first in found]) < 0.53


def expected_ranks(order, size, mode, given, present):
    """Ranks of one document by loops; None at absent tokens."""
    ranks, known = [None] * len(given), [i for i in range(len(given)) if given[i] and present[i]]
    for place, i in enumerate(known):
        ranks[i] = {"flat": 0, "l2r": place, "group": place // size}[mode]
    after = 1 + max([ranks[i] for i in known], default=-1)
    rest = [i for i in range(len(given)) if present[i] and not given[i]]
    own = spread(len(rest), size) if order == "spread" else [place // size for place in range(len(rest))]
    for i, rank in zip(rest, own, strict=True):
        ranks[i] = after + int(rank)
    return ranks


@pytest.mark.parametrize("mode", TRAINING_CONTEXTS)
@pytest.mark.parametrize("order", [order for order in TRAINING_ORDERS if order != "random"])
@cases(DOCUMENTS, st.integers(0, 3), st.integers(0, 2**40), st.integers(1, 3), st.data())
def test_ranks_after_what_is_given(order, mode, lengths, padding, index, size, data):
    """Given tokens, drawn contexts and absent spans together, for orders that are the same each time."""
    size = 1 if order == "l2r" else size
    positions, segments = packed(lengths, padding)
    flags = data.draw(st.lists(st.booleans(), min_size=len(positions), max_size=len(positions)))
    known = np.array(flags, bool)
    made = stage(order, (size,), ("scattered", "none"), mode, absent=0.5)
    drawn = draw(made, positions, segments, 1, index, known)
    assert drawn.ranks.dtype == np.int32
    assert (drawn.ranks[drawn.segment_ids == 0] == 0).all()
    assert not drawn.predicted[known | (drawn.segment_ids == 0)].any()
    for document in range(1, len(lengths) + 1):
        of = segments == document
        present, predicted = drawn.segment_ids[of] == document, drawn.predicted[of]
        assert present[known[of]].all()
        assert predicted.any() or known[of].all()
        expected = expected_ranks(order, size, mode, (present & ~predicted).tolist(), present.tolist())
        assert [rank for rank in expected if rank is not None] == drawn.ranks[of][present].tolist()


@cases(DOCUMENTS, st.integers(0, 2**40), st.sampled_from([1, 2, 4]))
def test_random_groups_of_the_rest_are_dense(lengths, index, size):
    positions, segments = packed(lengths, 2)
    drawn = draw(stage(sizes=(size,), shapes=("scattered",), absent=0.5), positions, segments, 1, index)
    for document in range(1, len(lengths) + 1):
        own = drawn.ranks[drawn.predicted & (segments == document)]
        has_context = ((drawn.segment_ids == document) & ~drawn.predicted).any()
        assert_dense_groups(own - has_context, size)


def test_random_order_of_the_rest_is_uniform():
    """Three tokens besides two given ones, next to another document: six orders, equally often."""
    positions, segments = packed([2, 5])
    known = np.array([1, 0, 0, 1, 0, 1, 0], bool)
    counts = Counter(
        tuple(draw(stage(), positions, segments, 5, index, known).ranks[[2, 4, 6]]) for index in range(6000)
    )
    assert set(counts) == {tuple(1 + np.array(order)) for order in itertools.permutations(range(3))}
    assert chi_square(counts, dict.fromkeys(counts, 1000)) < 26  # 5 degrees


def test_hand_drawn_contexts():
    positions, segments = packed([7])
    known = [1, 0, 0, 1, 1, 0, 0]
    for mode, expected in {
        "flat": [0, 1, 1, 0, 0, 2, 2],
        "l2r": [0, 3, 3, 1, 2, 4, 4],
        "group": [0, 2, 2, 0, 1, 3, 3],
    }.items():
        drawn = draw(stage("contiguous", (2,), context=mode), positions, segments, 0, 0, known)
        assert drawn.ranks.tolist() == expected, mode
        assert drawn.predicted.tolist() == [not flag for flag in known]


def test_what_is_given_in_a_left_to_right_stage_keeps_its_rank():
    positions, segments = packed([4, 3], padding=1)
    known = positions < 2
    drawn = draw(stage(objective="ar", absent=1.0), positions, segments, 0, 0, known)
    assert (drawn.ranks == positions).all() and (drawn.segment_ids == segments).all()
    assert drawn.predicted.tolist() == [False, False, True, True, False, False, True, False]


def test_share_of_examples_with_absent_tokens():
    """In such an example every document loses a span, in the others none does."""
    positions, segments = packed([8, 1, 6])
    lost = [
        [bool((drawn.segment_ids[segments == document] == 0).any()) for document in (1, 2, 3)]
        for drawn in (draw(stage(absent=0.3), positions, segments, 2, index) for index in range(4000))
    ]
    assert {tuple(row) for row in lost} == {(False, False, False), (True, False, True)}
    assert 0.27 < np.mean([row[0] for row in lost]) < 0.33  # four standard deviations: 0.029


def test_law_of_absent_spans():
    """Of 9 free tokens: 1 to 4 in a row, log-uniform; anywhere, but for the given ones around them."""
    positions, segments = packed([11])
    known = np.zeros(11, bool)
    known[[0, 10]] = True
    spans = Counter()
    for index in range(6000):
        drawn = draw(stage(absent=1.0), positions, segments, 2, index, known)
        absent = np.flatnonzero(drawn.segment_ids == 0)
        assert (np.diff(absent) == 1).all() and absent[0] >= 1 and absent[-1] <= 9
        spans[(len(absent), int(absent[0]))] += 1
    expected = {
        (length, first): 6000 * np.log(1 + 1 / length) / np.log(5) / (10 - length)
        for length in range(1, 5)
        for first in range(1, 11 - length)
    }
    assert set(spans) == set(expected)
    assert chi_square(spans, expected) < 66  # 29 degrees, 1 in 10,000


def test_what_else_is_drawn_does_not_change_the_order():
    """The order and the group size of an example are those that it has without contexts and absent spans."""
    positions, segments = packed([30])
    orders = (Order("contiguous", (1, 2, 4, 8)), Order("l2r"))
    given = tuple(Order(o.order, o.group_sizes, context_shapes=("none",)) for o in orders)
    for index in range(50):
        plain = draw(Stage("a", 1, orders=orders), positions, segments, 3, index)
        other = draw(Stage("a", 1, orders=given), positions, segments, 3, index)
        assert (plain.ranks == other.ranks).all() and (plain.predicted == other.predicted).all()
