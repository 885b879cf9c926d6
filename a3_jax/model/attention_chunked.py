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
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ROWS, KEYS = 256, 256  # a block's sides
RESIDUALS = "attention"  # the name of what remat policies may keep: output and log-normalisers


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(query, key, value, start, limit, scale, softcap, precision):
    return _forward(query, key, value, start, limit, scale, softcap, precision)[0]


def chunked_attention(query, key, value, start, limit, *, scale, logit_softcap=None, precision=None):
    """`attention.attention`, a block of rows by a block of keys at a time.

    Blocks that no row of the batch sees are not computed: rows sorted as one document cost half of
    [T, S], packed documents less. Rows with an empty interval give zeros and pass no gradient.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H].
      start, limit: [B, T] int32.
      scale, logit_softcap, precision: as in `attention.attention`.

    Returns:
      [B, T, N, H] in query's dtype.
    """
    (batch, length, heads, size), kv_heads = query.shape, key.shape[2]
    rows, keys, group = min(ROWS, length), min(KEYS, key.shape[1]), heads // kv_heads
    blocks = -(-length // rows)

    def split(array):  # [B, T, ...] -> [blocks, B, rows, ...]; the rows added see nothing
        array = _padded(array, blocks * rows)
        return jnp.moveaxis(array.reshape(batch, blocks, rows, *array.shape[2:]), 1, 0)

    def of_heads(bound):  # [blocks, B, 1, 1, R]: each row once for every head of a group
        return jnp.tile(split(bound), (1, 1, group))[:, :, None, None]

    query = split(query).reshape(blocks, batch, rows, kv_heads, group, size)
    query = query.transpose(0, 1, 3, 5, 4, 2).reshape(blocks, batch, kv_heads, size, group * rows)
    key, value = (
        _padded(array, -(-array.shape[1] // keys) * keys).transpose(0, 2, 1, 3) for array in (key, value)
    )
    bounds = of_heads(start), of_heads(limit)
    out = cast(jax.Array, _attention(query, key, value, *bounds, scale, logit_softcap, precision))
    out = out.reshape(blocks, batch, kv_heads, size, group, rows).transpose(1, 0, 5, 2, 4, 3)
    return out.reshape(batch, blocks * rows, heads, size)[:, :length]


def _padded(array, length):
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


# Below, R = G x rows of a block: the rows of all query heads that share a kv head. Scores are [S, R]: the
# softmax runs along the outer axis, and no product of either pass has a block of scores to transpose.


def _forward(query, key, value, start, limit, scale, softcap, precision):
    """All row blocks; the output [blocks, B, K, H, R] and the rows' log-normalisers [blocks, B, K, 1, R].

    Args:
      query: [blocks, B, K, H, R].  key, value: [B, K, S, H], S a multiple of the key block.
      start, limit: [blocks, B, 1, 1, R].
    """
    value_BKHS = value.swapaxes(2, 3)

    def one_block(block):
        q, start, limit = block
        largest = jnp.full((*q.shape[:2], 1, q.shape[-1]), -jnp.inf, jnp.float32)
        carry = (largest, jnp.zeros_like(largest), jnp.zeros(q.shape, jnp.float32))

        def visit(j, carry):
            largest, total, out = carry
            scores, _ = _scores(j, _take(key, j, 2), q, start, limit, scale, softcap, precision)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=2, keepdims=True))
            shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
            weights = jnp.exp(scores - shift)
            decay = jnp.exp(largest - shift)
            total = total * decay + jnp.sum(weights, axis=2, keepdims=True)
            added = _product("BKHS,BKSR->BKHR", _take(value_BKHS, j, 3), weights.astype(q.dtype), precision)
            return new_largest, total, out * decay + added

        largest, total, out = jax.lax.fori_loop(*_range(start, limit, key.shape[2]), visit, carry)
        total = jnp.where(total > 0, total, 1.0)
        normaliser = jnp.where(jnp.isfinite(largest), largest, 0.0) + jnp.log(total)
        return (out / total).astype(q.dtype), normaliser

    return jax.lax.map(one_block, (query, start, limit))


def _forward_rule(query, key, value, start, limit, scale, softcap, precision):
    out, normaliser = _forward(query, key, value, start, limit, scale, softcap, precision)
    out, normaliser = (checkpoint_name(array, RESIDUALS) for array in (out, normaliser))
    return out, (query, key, value, start, limit, out, normaliser)


def _backward_rule(scale, softcap, precision, kept, d_out):
    """One visit of every block: scores again, then the three gradients."""
    query, key, value, start, limit, out, normaliser = kept
    key_BKHS, d_out = key.swapaxes(2, 3), d_out.astype(query.dtype)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=3, keepdims=True)

    def one_block(totals, block):
        q, start, limit, normaliser, d_out, delta = block
        q_BKRH, d_out_BKRH = q.swapaxes(2, 3), d_out.swapaxes(2, 3)

        def visit(j, carry):
            d_q, d_key, d_value = carry
            scores, slope = _scores(j, _take(key, j, 2), q, start, limit, scale, softcap, precision)
            weights = jnp.exp(scores - normaliser)
            d_weights = _product("BKSH,BKHR->BKSR", _take(value, j, 2), d_out, precision)
            d_scores = weights * (d_weights - delta) * (scale if slope is None else scale * slope)
            weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
            d_value = _add(d_value, _product("BKSR,BKRH->BKSH", weights, d_out_BKRH, precision), j)
            d_key = _add(d_key, _product("BKSR,BKRH->BKSH", d_scores, q_BKRH, precision), j)
            d_q = d_q + _product("BKHS,BKSR->BKHR", _take(key_BKHS, j, 3), d_scores, precision)
            return d_q, d_key, d_value

        carry = (jnp.zeros(q.shape, jnp.float32), *totals)
        d_q, *totals = jax.lax.fori_loop(*_range(start, limit, key.shape[2]), visit, carry)
        return tuple(totals), d_q.astype(q.dtype)

    zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    blocks = (query, start, limit, normaliser, d_out, delta)
    (d_key, d_value), d_query = jax.lax.scan(one_block, zeros, blocks)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None, None


_attention.defvjp(_forward_rule, _backward_rule)


def _range(start, limit, length):
    """The first and the last + 1 block of keys that any of these rows sees."""
    keys = min(KEYS, length)
    sees = limit > start
    first = jnp.min(jnp.where(sees, start, length)) // keys
    last = -(-jnp.max(jnp.where(sees, limit, 0)) // keys)
    return jnp.minimum(first, last), last


def _scores(j, k_BKSH, q_BKHR, start, limit, scale, softcap, precision):
    """Scores of key block j [B, K, S, R], -inf where not visible, and the softcap's slope (None without)."""
    scores, slope = scale * _product("BKSH,BKHR->BKSR", k_BKSH, q_BKHR, precision), None
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1.0 - jnp.square(capped)
    size = k_BKSH.shape[2]
    s = j * size + jnp.arange(size)[:, None]
    return jnp.where((s >= start) & (s < limit), scores, -jnp.inf), slope


def _take(array, j, axis):
    keys = min(KEYS, array.shape[axis])
    return jax.lax.dynamic_slice_in_dim(array, j * keys, keys, axis=axis)


def _add(total, part, j):
    block = jax.lax.dynamic_slice_in_dim(total, j * part.shape[2], part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, block + part, j * part.shape[2], axis=2)


def _product(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
