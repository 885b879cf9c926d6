"""Attention over intervals in blocks, in plain JAX: for CPU and GPU.

A block of rows visits the blocks of keys between its lowest start and its highest limit, one after
another, with a running softmax (Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135):

    keys        0 . . 1 . . 2 . . 3 . .
    rows 0      x x . | . . . | . . . | . .      one block of keys visited
    rows 1      x x x | x . . | . . . | . .      two
    rows 2      . . . | . . . | x x . | . .      another document: one

What is alive is one block's scores. The backward pass computes them again from the rows'
log-normalisers, so only the output is kept, and nothing of size [T, S] ever exists.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from a3_jax.model.layers import softcap, softcap_slope

ROWS, KEYS = 256, 256  # a block's sides
RESIDUALS = "attention"  # the name of what remat policies may keep: output and log-normalisers


class AttentionArgs(NamedTuple):
    """How scores are made of products of queries and keys; static.

    Attributes:
      scale: factor on the products.
      softcap: scores become cap * tanh(scores / cap); None: they don't.
      precision: that of the matrix products, as in `jax.numpy.einsum`.
    """

    scale: float
    softcap: float | None = None
    precision: Any = None


def chunked_attention(query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT, args: AttentionArgs):
    """Computes `attention.attention`, a block of rows by a block of keys at a time.

    Blocks that no row of the batch sees are not computed: rows sorted as one document cost half of
    [T, S], packed documents less. Rows with an empty interval give zeros and pass no gradient.

    Args:
      query_BTNH: [B, T, N, H].
      key_BSKH, value_BSKH: [B, S, K, H].
      start_BT, limit_BT: [B, T] int32.
      args: how scores are made of products.

    Returns:
      [B, T, N, H] in query's dtype.
    """
    (batch, length, heads, size), kv_heads = query_BTNH.shape, key_BSKH.shape[2]
    rows, keys, group = min(ROWS, length), min(KEYS, key_BSKH.shape[1]), heads // kv_heads
    blocks = -(-length // rows)

    def split(array):  # [B, T, ...] -> [blocks, B, rows, ...]; the rows added see nothing
        array = _padded(array, blocks * rows)
        return jnp.moveaxis(array.reshape(batch, blocks, rows, *array.shape[2:]), 1, 0)

    def of_heads(bound):  # [B, T] -> [blocks, B, 1, 1, R]: each row once for every head of a group
        return jnp.tile(split(bound), (1, 1, group))[:, :, None, None]

    # [blocks, B, rows, K, G, H] -> [blocks, B, K, H, G, rows] -> [blocks, B, K, H, R]
    query = split(query_BTNH).reshape(blocks, batch, rows, kv_heads, group, size)
    query = query.transpose(0, 1, 3, 5, 4, 2).reshape(blocks, batch, kv_heads, size, group * rows)
    # [B, S, K, H] -> [B, K, S, H], S padded to whole blocks: no limit reaches the keys added.
    key_BKSH, value_BKSH = (
        _padded(array, -(-array.shape[1] // keys) * keys).transpose(0, 2, 1, 3)
        for array in (key_BSKH, value_BSKH)
    )
    bounds = of_heads(start_BT), of_heads(limit_BT)
    out = cast(jax.Array, _attention(query, key_BKSH, value_BKSH, *bounds, args))
    # [blocks, B, K, H, G, rows] -> [B, blocks, rows, K, G, H] -> [B, T, N, H]
    out = out.reshape(blocks, batch, kv_heads, size, group, rows).transpose(1, 0, 5, 2, 4, 3)
    return out.reshape(batch, blocks * rows, heads, size)[:, :length]


def _padded(array, length):
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


# The running softmax, here and over a cache. After some of the keys of a row the carry is
# (m, sum exp(s - m), sum exp(s - m) v) with m the largest score s so far, one for each row. Another block of
# keys raises m, and what was summed under the old one is scaled down by exp(old m - new m).


def empty_softmax(rows_shape, out_shape):
    """Returns the carry before any key, float32: -inf and 0 [B, K, R, 1] or [B, K, 1, R], and 0 [..., H]."""
    largest = jnp.full(rows_shape, -jnp.inf, jnp.float32)
    return largest, jnp.zeros_like(largest), jnp.zeros(out_shape, jnp.float32)


def add_to_softmax(carry, scores, values_of: Callable, axis: int):
    """Returns the carry with another block of keys.

    Args:
      carry: of `empty_softmax`, or of the blocks before.
      scores: [B, K, R, S] or [B, K, S, R] float32, -inf where a row doesn't see a key.
      values_of: weights of the scores' shape -> their product with the block's values, float32.
      axis: that of the keys in `scores`; of size 1 in the first two of the carry.
    """
    largest, total, out = carry
    new_largest = jnp.maximum(largest, jnp.max(scores, axis=axis, keepdims=True))
    shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)  # nothing seen yet: -inf - -inf is NaN
    weights = jnp.exp(scores - shift)
    decay = jnp.exp(largest - shift)
    total = total * decay + jnp.sum(weights, axis=axis, keepdims=True)
    return new_largest, total, out * decay + values_of(weights)


# Below, R = G x rows of a block: the rows of all query heads that share a kv head. Scores are [S, R]: the
# softmax runs along the outer axis, and no product of either pass has a block of scores to transpose.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key_BKSH, value_BKSH, start, limit, args):
    return _forward(query, key_BKSH, value_BKSH, start, limit, args)[0]


def _forward(query, key_BKSH, value_BKSH, start, limit, args):
    """Computes all row blocks: outputs [blocks, B, K, H, R], log-normalisers of rows [blocks, B, K, 1, R].

    Args:
      query: [blocks, B, K, H, R].
      key_BKSH, value_BKSH: [B, K, S, H], S a multiple of the key block.
      start, limit: [blocks, B, 1, 1, R].
      args: `AttentionArgs`.
    """
    value_BKHS = value_BKSH.swapaxes(2, 3)

    def one_block(block):
        query_BKHR, start, limit = block

        def visit(j, carry):
            scores_BKSR = _scores(j, _take(key_BKSH, j, 2), query_BKHR, start, limit, args)[0]
            return add_to_softmax(
                carry, scores_BKSR,
                lambda weights_BKSR: _product("BKHS,BKSR->BKHR", _take(value_BKHS, j, 3),
                                              weights_BKSR.astype(query_BKHR.dtype), args.precision),
                axis=2,
            )  # fmt: skip

        batch, kv_heads, _, rows = query_BKHR.shape
        carry = empty_softmax((batch, kv_heads, 1, rows), query_BKHR.shape)
        span = _range(start, limit, key_BKSH.shape[2])
        largest_BK1R, total_BK1R, out_BKHR = jax.lax.fori_loop(*span, visit, carry)
        # A row that saw nothing has total 0 and largest -inf: its output is 0 / 1, its normaliser 0.
        total_BK1R = jnp.where(total_BK1R > 0, total_BK1R, 1.0)
        normaliser_BK1R = jnp.where(jnp.isfinite(largest_BK1R), largest_BK1R, 0.0) + jnp.log(total_BK1R)
        return (out_BKHR / total_BK1R).astype(query_BKHR.dtype), normaliser_BK1R

    return jax.lax.map(one_block, (query, start, limit))


def _forward_rule(query, key_BKSH, value_BKSH, start, limit, args):
    out, normaliser = _forward(query, key_BKSH, value_BKSH, start, limit, args)
    out, normaliser = (checkpoint_name(array, RESIDUALS) for array in (out, normaliser))
    return out, (query, key_BKSH, value_BKSH, start, limit, out, normaliser)


def _backward_rule(args, kept, d_out):
    """Visits every block once: scores again, then the three gradients.

    With p = exp(s - normaliser) and out = sum p v, the gradient of a score s is p (d_out . v - delta), where
    delta = d_out . out is what the normalisation takes off: one number per row, made before the loop.
    """
    query, key_BKSH, value_BKSH, start, limit, out, normaliser = kept
    key_BKHS, d_out = key_BKSH.swapaxes(2, 3), d_out.astype(query.dtype)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=3, keepdims=True)

    def one_block(totals, block):
        query_BKHR, start, limit, normaliser_BK1R, d_out_BKHR, delta_BK1R = block
        query_BKRH, d_out_BKRH = query_BKHR.swapaxes(2, 3), d_out_BKHR.swapaxes(2, 3)
        dtype = query_BKHR.dtype

        def visit(j, carry):
            d_query_BKHR, d_key_BKSH, d_value_BKSH = carry
            scores_BKSR, slope = _scores(j, _take(key_BKSH, j, 2), query_BKHR, start, limit, args)
            weights_BKSR = jnp.exp(scores_BKSR - normaliser_BK1R)
            d_weights_BKSR = _product("BKSH,BKHR->BKSR", _take(value_BKSH, j, 2), d_out_BKHR, args.precision)
            d_scores_BKSR = weights_BKSR * (d_weights_BKSR - delta_BK1R) * slope
            weights_BKSR, d_scores_BKSR = weights_BKSR.astype(dtype), d_scores_BKSR.astype(dtype)
            # Keys and values of a block get a part from every block of rows: float32 sums in the carry.
            part = _product("BKSR,BKRH->BKSH", weights_BKSR, d_out_BKRH, args.precision)
            d_value_BKSH = _add(d_value_BKSH, part, j)
            part = _product("BKSR,BKRH->BKSH", d_scores_BKSR, query_BKRH, args.precision)
            d_key_BKSH = _add(d_key_BKSH, part, j)
            part = _product("BKHS,BKSR->BKHR", _take(key_BKHS, j, 3), d_scores_BKSR, args.precision)
            return d_query_BKHR + part, d_key_BKSH, d_value_BKSH

        carry = (jnp.zeros(query_BKHR.shape, jnp.float32), *totals)
        d_query_BKHR, *totals = jax.lax.fori_loop(*_range(start, limit, key_BKSH.shape[2]), visit, carry)
        return tuple(totals), d_query_BKHR.astype(dtype)

    zeros = jnp.zeros(key_BKSH.shape, jnp.float32), jnp.zeros(value_BKSH.shape, jnp.float32)
    blocks = (query, start, limit, normaliser, d_out, delta)
    (d_key_BKSH, d_value_BKSH), d_query = jax.lax.scan(one_block, zeros, blocks)
    return d_query, d_key_BKSH.astype(key_BKSH.dtype), d_value_BKSH.astype(value_BKSH.dtype), None, None


_attention.defvjp(_forward_rule, _backward_rule)


def _range(start, limit, length):
    """Returns the first and the last + 1 block of keys that any of these rows sees."""
    keys = min(KEYS, length)
    sees = limit > start
    first = jnp.min(jnp.where(sees, start, length)) // keys
    last = -(-jnp.max(jnp.where(sees, limit, 0)) // keys)
    return jnp.minimum(first, last), last


def _scores(j, key_BKSH, query_BKHR, start, limit, args):
    """Returns scores of key block j [B, K, S, R], -inf where not visible, and their slope in the products."""
    scores_BKSR = args.scale * _product("BKSH,BKHR->BKSR", key_BKSH, query_BKHR, args.precision)
    scores_BKSR, slope = softcap(scores_BKSR, args.softcap), args.scale
    if args.softcap is not None:
        slope = args.scale * softcap_slope(scores_BKSR, args.softcap)
    size = key_BKSH.shape[2]
    s = j * size + jnp.arange(size)[:, None]
    return jnp.where((s >= start) & (s < limit), scores_BKSR, -jnp.inf), slope


def _take(array, j, axis):
    keys = min(KEYS, array.shape[axis])
    return jax.lax.dynamic_slice_in_dim(array, j * keys, keys, axis=axis)


def _add(total_BKSH, part_BKSH, j):
    size = part_BKSH.shape[2]
    block_BKSH = jax.lax.dynamic_slice_in_dim(total_BKSH, j * size, size, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total_BKSH, block_BKSH + part_BKSH, j * size, axis=2)


def _product(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
