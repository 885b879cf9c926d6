"""Attention over intervals of keys: row t sees exactly the keys `start[t] <= s < limit[t]`.

    s        0  1  2  3  4  5
    t = 0    x  x  .  .  .  .     start 0, limit 2
    t = 1    .  .  .  .  .  .     start 0, limit 0: no visible key, the output is zero
    t = 2    .  .  .  x  x  x     start 3, limit 6: another document

`start` and `limit` are all that attention knows about order. The softmax over no key is zero by
construction, so neither a row without context nor padding needs a special case.
"""

import jax
import jax.numpy as jnp

_CHUNK = 256  # rows a block; one block's scores [B, N, _CHUNK, S] are all that is alive at a time


def attention(query, key, value, start, limit, *, scale, logit_softcap=None, precision=None):
    """Softmax attention of each row over its interval of keys, with grouped key/value heads.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H], K divides N; query head n reads kv head n // (N / K).
      start, limit: [B, T] int32, the row's interval of keys, half open; empty where limit <= start.
      scale: factor on the scores before the softmax.
      logit_softcap: scores become cap * tanh(scores / cap) when given.
      precision: of the matrix products, as in `jax.numpy.einsum`.

    Returns:
      [B, T, N, H] in query's dtype; softmax in float32; exactly zero in rows with an empty interval.

    Raises:
      ValueError: shapes that don't fit each other.
    """
    _check_shapes(query, key, value, start, limit)
    implementation = dense_attention if query.shape[1] <= _CHUNK else chunked_attention
    return implementation(
        query, key, value, start, limit, scale=scale, logit_softcap=logit_softcap, precision=precision
    )


def dense_attention(query, key, value, start, limit, *, scale, logit_softcap=None, precision=None):
    """The reference: `attention` with all [T, S] scores at once."""
    (batch, rows, heads, size), kv_heads = query.shape, key.shape[2]
    query_BTKGH = query.reshape(batch, rows, kv_heads, heads // kv_heads, size)
    scores = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", query_BTKGH, key, precision=precision, preferred_element_type=jnp.float32
    )
    if logit_softcap is not None:
        scores = logit_softcap * jnp.tanh(scores / logit_softcap)
    s = jnp.arange(key.shape[1])
    visible_BTS = (s >= start[..., None]) & (s < limit[..., None])
    weights = _masked_softmax(scores, visible_BTS[:, None, None])
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(value.dtype), value, precision=precision)
    return out.reshape(query.shape).astype(query.dtype)


def chunked_attention(query, key, value, start, limit, *, scale, logit_softcap=None, precision=None):
    """`attention` a block of rows at a time: scores of [B, N, block, S] alive, recomputed for gradients."""
    rows = query.shape[1]
    blocks = -(-rows // _CHUNK)

    def split(array):  # [B, T, ...] -> [blocks, B, _CHUNK, ...]; the rows added see nothing
        padding = [(0, 0), (0, blocks * _CHUNK - rows)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, padding)
        return jnp.moveaxis(array.reshape(array.shape[0], blocks, _CHUNK, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(block):
        return dense_attention(
            block[0], key, value, *block[1:], scale=scale, logit_softcap=logit_softcap, precision=precision
        )

    out = jax.lax.map(one_block, (split(query), split(start), split(limit)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * _CHUNK, *query.shape[2:])[:, :rows]


def _masked_softmax(scores, visible):
    """Softmax over the visible entries of the last axis; all zeros where none is visible."""
    largest = jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.exp(jnp.where(visible, scores - largest, -jnp.inf))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _check_shapes(query, key, value, start, limit):
    batch, rows, heads, size = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key {key.shape} and value {value.shape} differ in shape")
    if key.shape[0] != batch or key.shape[3] != size or heads % key.shape[2]:
        raise ValueError(f"query [B, T, N, H] = {query.shape} does not fit key [B, S, K, H] = {key.shape}")
    for name, array in (("start", start), ("limit", limit)):
        if array.shape != (batch, rows):
            raise ValueError(f"{name} has shape {array.shape}, expected [B, T] = {(batch, rows)}")
