"""Sorted, every mask is an interval: `bounds` against the rank rule written as a dense mask."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_jax.ordering import intervals


def dense_rule(content_ranks, query_ranks, segment_ids):
    """[T, T] visibility of content keys (columns) for content rows and for query rows, by definition."""
    same = (segment_ids[:, None] == segment_ids[None, :]) & (segment_ids[:, None] > 0)
    content = same & (content_ranks[None, :] <= content_ranks[:, None])
    query = same & (content_ranks[None, :] < query_ranks[:, None])
    return content, query


def as_mask(start, limit):
    keys = np.arange(len(start))
    return (keys >= np.asarray(start)[:, None]) & (keys < np.asarray(limit)[:, None])


rows = st.integers(1, 20).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-3, 6), min_size=n, max_size=n),
        st.lists(st.integers(-4, 7), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
    )
)


@settings(max_examples=200, deadline=None)
@given(rows)
def test_bounds_are_the_dense_rule(row):
    """Any ranks (ties, gaps, negative), any query ranks, documents and padding in any storage order."""
    content_ranks, query_ranks, segment_ids = (np.array(values, np.int32) for values in row)
    order = intervals.sort_order(content_ranks, segment_ids)
    sorted_rows = intervals.take_rows(order, content_ranks, query_ranks, segment_ids)
    bounds = intervals.bounds(*sorted_rows)
    content, query = dense_rule(*sorted_rows)
    np.testing.assert_array_equal(as_mask(bounds.start, bounds.content_limit), content)
    np.testing.assert_array_equal(as_mask(bounds.start, np.maximum(bounds.start, bounds.query_limit)), query)
    padding = sorted_rows[2] == 0
    assert not np.any(bounds.start[padding]) and not np.any(bounds.content_limit[padding])
    assert np.all(np.diff(padding.astype(int)) >= 0), "padding lies last"


def test_the_drawn_example():
    """The example of the module's docstring, row by row."""
    ranks = np.array([1, 0, 1, 2, 1, 0], np.int32)
    segments = np.array([1, 1, 1, 1, 2, 2], np.int32)
    order = intervals.sort_order(ranks, segments)
    assert "".join(np.array(list("abcdef"))[order]) == "bacdfe"
    bounds = intervals.bounds(*intervals.take_rows(order, ranks, ranks, segments))
    assert bounds.start.tolist() == [0, 0, 0, 0, 4, 4]
    assert bounds.content_limit.tolist() == [1, 3, 3, 4, 5, 6]
    assert bounds.query_limit.tolist() == [0, 1, 1, 3, 4, 5]


def test_numpy_and_traced_jax_agree_on_a_batch():
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 9, (3, 40)).astype(np.int32)
    segments = rng.integers(0, 4, (3, 40)).astype(np.int32)
    order = intervals.sort_order(ranks, segments)
    np.testing.assert_array_equal(
        order, jax.jit(intervals.sort_order)(jnp.asarray(ranks), jnp.asarray(segments))
    )
    sorted_rows = intervals.take_rows(order, ranks, ranks, segments)
    for host, traced in zip(
        intervals.bounds(*sorted_rows), jax.jit(intervals.bounds)(*map(jnp.asarray, sorted_rows))
    ):
        np.testing.assert_array_equal(host, traced)
        assert traced.dtype == jnp.int32 and host.dtype == np.int32


def test_bounds_make_no_square_array():
    """T = 4096: no intermediate value of T x T elements in the traced program."""
    length = 4096
    arguments = [jax.ShapeDtypeStruct((length,), jnp.int32)] * 3
    jaxpr = jax.make_jaxpr(intervals.bounds)(*arguments)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) <= 8 * length


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_unsort_is_the_inverse(length, seed):
    rng = np.random.default_rng(seed)
    order = intervals.sort_order(rng.integers(0, 5, length), rng.integers(0, 3, length))
    vectors = rng.normal(size=(length, 4))
    np.testing.assert_array_equal(intervals.unsort(order, intervals.take_rows(order, vectors)), vectors)


def test_sort_is_stable():
    """Equal ranks keep their storage order, so a group lists its tokens in reading order."""
    order = intervals.sort_order(np.array([1, 0, 1, 0, 1]), np.ones(5, int))
    assert order.tolist() == [1, 3, 0, 2, 4]
