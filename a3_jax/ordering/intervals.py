"""Sorted, every mask is an interval.

A row of packed documents is permuted once, by a stable sort on (is padding, segment, content
rank). After that, each row of either stream sees exactly the content keys `start <= k < limit`.

    token            a  b  c  d  |  e  f        two documents (segments 1 and 2)
    content rank     1  0  1  2  |  1  0
    sorted           b  a  c  d  |  f  e
    start            0  0  0  0  |  4  4        where its document begins
    content limit    1  3  3  4  |  5  6        end of its own group   (rank <= own)
    query limit      0  1  1  3  |  4  5        start of its own group (rank <  own)

This module alone holds the rank rule. It runs on NumPy arrays on the host and on traced
`jax.numpy` arrays inside the jitted step, and needs no [T, S] array in either place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Bounds(NamedTuple):
    """Intervals of visible content keys, int32, [..., T] each. Padding has `start == limit == 0`."""

    start: Any
    content_limit: Any
    query_limit: Any


def sort_order(content_ranks, segment_ids):
    """Returns the permutation that sorts rows for `bounds`.

    Args:
      content_ranks: [..., T] int, lower = earlier; any values, compared within a segment only.
      segment_ids: [..., T] int, packed document, 0 = padding.

    Returns:
      [..., T] int32: `take_rows(order, x)` lists x document by document, group by group, in the
      given order inside a group; padding last.
    """
    xp = _numpy_of(content_ranks, segment_ids)
    segment_ids = xp.asarray(segment_ids)
    # The last key sorts first. The sort is stable, which keeps a group's tokens in the given order.
    order = xp.lexsort((xp.asarray(content_ranks), segment_ids, segment_ids == 0), axis=-1)
    return order.astype(xp.int32)


def take_rows(order, *arrays):
    """Takes each array's rows ([..., T] or [..., T, D]) in the given order ([..., T]).

    One array in, one array out; several in, a tuple out.
    """
    xp = _numpy_of(order, *arrays)

    def take(array):
        index = order.reshape(order.shape + (1,) * (array.ndim - order.ndim))
        return xp.take_along_axis(array, index, axis=order.ndim - 1)

    return take(arrays[0]) if len(arrays) == 1 else tuple(take(array) for array in arrays)


def unsort(order, array):
    """Inverts `take_rows`: puts rows ([..., T] or [..., T, D]) back to where they came from."""
    xp = _numpy_of(order, array)
    return take_rows(xp.argsort(order, axis=-1), array)


def bounds(content_ranks, query_ranks, segment_ids) -> Bounds:
    """Returns what each row may see, of rows sorted by `sort_order(content_ranks, segment_ids)`.

    A content row of rank r sees the content keys of its document with rank <= r; a query row of
    rank r those with rank < r (A3, arXiv 2601.13228, section 3). The two streams may follow
    different ranks: keys are sorted by content rank, so any query threshold is a prefix too.

    Args:
      content_ranks: [..., T] int, sorted within each document.
      query_ranks: [..., T] int, the same array in ordinary training.
      segment_ids: [..., T] int, ascending, then padding (0).

    Returns:
      `Bounds` of int32 [..., T] arrays.
    """
    xp = _numpy_of(content_ranks, query_ranks, segment_ids)
    content_ranks, query_ranks, segment_ids = xp.broadcast_arrays(content_ranks, query_ranks, segment_ids)
    # Padding comes last, so its segment has to be the largest for the search; what it finds is not used.
    is_padding = segment_ids == 0
    segments = xp.where(is_padding, xp.iinfo(segment_ids.dtype).max, segment_ids)
    # Each of the three counts the keys of its document whose rank is below (or at) a threshold.
    lowest = xp.full_like(content_ranks, xp.iinfo(content_ranks.dtype).min)
    thresholds = xp.stack([lowest, content_ranks, query_ranks])
    at_threshold = np.array([False, True, False]).reshape(3, *[1] * content_ranks.ndim)
    counts = _count_before(xp, segments, content_ranks, thresholds, at_threshold)
    return Bounds(*xp.where(is_padding, 0, counts).astype(xp.int32))


def _count_before(xp, segments, ranks, thresholds, at_threshold):
    """Counts the sorted keys (segment, rank) that come before (own segment, threshold), by bisection.

    Args:
      segments, ranks: [..., T].  thresholds: [3, ..., T].  at_threshold: [3, ..., 1] bool, whether a
        key of just that rank counts.

    Returns:
      [3, ..., T] int32.
    """
    length = segments.shape[-1]
    low = xp.zeros(thresholds.shape, xp.int32)
    high = xp.full(thresholds.shape, length, xp.int32)
    all_segments, all_ranks = (xp.broadcast_to(array, thresholds.shape) for array in (segments, ranks))
    # All rows and thresholds search at once. The range of one that is done is empty (low == high) and stays
    # so; `searchsorted` would need keys in one number, and has no axis.
    for _ in range(length.bit_length()):
        middle = (low + high) // 2
        key = xp.minimum(middle, length - 1)
        key_segments = xp.take_along_axis(all_segments, key, axis=-1)
        key_ranks = xp.take_along_axis(all_ranks, key, axis=-1)
        below = (key_ranks < thresholds) | (at_threshold & (key_ranks == thresholds))
        before = (low < high) & ((key_segments < segments) | ((key_segments == segments) & below))
        low, high = xp.where(before, middle + 1, low), xp.where(before, high, middle)
    return low


def _numpy_of(*arrays):
    """Returns `jax.numpy` if any array is JAX's (traced or not), else NumPy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np
