"""Attention over intervals of keys: row t sees exactly the keys `start[t] <= s < limit[t]`.

    s        0  1  2  3  4  5
    t = 0    x  x  .  .  .  .     start 0, limit 2
    t = 1    .  .  .  .  .  .     start 0, limit 0: no visible key, the output is zero
    t = 2    .  .  .  x  x  x     start 3, limit 6: another document

`start` and `limit` are all that attention knows about order. The softmax over no key is zero by
construction, so neither a row without context nor padding needs a special case.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from a3_jax.model.attention_chunked import AttentionArgs, chunked_attention
from a3_jax.model.attention_splash import available, splash_attention
from a3_jax.model.layers import softcap
from a3_jax.model.sharding import on_each_device, platform

FEW_ROWS = 256  # up to here all scores at once are cheaper than blocks
_QUERY = ("batch", "length", "heads", "head_size")
_KEY, _ROW = ("batch", "length", "kv_heads", "head_size"), ("batch", "length")


def attention(
    query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT, args: AttentionArgs, implementation: str = "auto"
):
    """Computes the softmax attention of each row over its interval of keys, with grouped key/value heads.

    On a mesh (`jax.set_mesh`) every device attends to its own examples with its own heads.

    Args:
      query_BTNH: [B, T, N, H].
      key_BSKH, value_BSKH: [B, S, K, H], K divides N; query head n reads kv head n // (N / K).
      start_BT, limit_BT: [B, T] int32, the row's interval of keys, half open; empty where limit <= start.
      args: how scores are made of products.
      implementation: a name of `IMPLEMENTATIONS`; "auto" takes splash attention on TPU and blocks in
        plain JAX elsewhere, or all scores at once for few rows. Without a TPU, "splash" is interpreted.

    Returns:
      [B, T, N, H] in query's dtype; softmax in float32; exactly zero in rows with an empty interval.

    Raises:
      ValueError: shapes that don't fit each other, or an unknown implementation.
    """
    _check_shapes(query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT)
    if implementation == "auto":
        implementation = _chosen(query_BTNH, key_BSKH)
    if implementation not in _FUNCTIONS:
        raise ValueError(f"implementation={implementation!r}, known: {', '.join(IMPLEMENTATIONS)}")
    sizes = {"batch": query_BTNH.shape[0], "kv_heads": key_BSKH.shape[2]}
    specs = (_QUERY, _KEY, _KEY, _ROW, _ROW)
    attend = functools.partial(_FUNCTIONS[implementation], args=args)
    attend = on_each_device(attend, specs, _QUERY, sizes)
    return attend(query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT)


def dense_attention(query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT, args: AttentionArgs):
    """Computes `attention` with all [T, S] scores at once: the reference."""
    (batch, rows, heads, size), kv_heads = query_BTNH.shape, key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(batch, rows, kv_heads, heads // kv_heads, size)
    scores_BKGTS = args.scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH,
        precision=args.precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores_BKGTS = softcap(scores_BKGTS, args.softcap)
    s = jnp.arange(key_BSKH.shape[1])
    visible_BTS = (s >= start_BT[..., None]) & (s < limit_BT[..., None])
    weights_BKGTS = _masked_softmax(scores_BKGTS, visible_BTS[:, None, None])
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS.astype(value_BSKH.dtype), value_BSKH, precision=args.precision
    )
    return out_BTKGH.reshape(query_BTNH.shape).astype(query_BTNH.dtype)


_FUNCTIONS: dict[str, Callable] = {
    "splash": splash_attention,
    "chunked": chunked_attention,
    "dense": dense_attention,
}
IMPLEMENTATIONS = ("auto", *_FUNCTIONS)


def _chosen(query_BTNH, key_BSKH) -> str:
    """Returns what "auto" means for these shapes, on the devices of the mesh or the default ones."""
    if query_BTNH.shape[1] <= FEW_ROWS:
        return "dense"
    return "splash" if platform() == "tpu" and available(query_BTNH.shape, key_BSKH.shape) else "chunked"


def _masked_softmax(scores, visible):
    """Returns the softmax over the visible entries of the last axis; all zeros where none is visible."""
    # Of a row that sees nothing the largest score is -inf, and -inf - -inf would be NaN: 0 takes its place.
    # Its weights are then exp(-inf) = 0, and their sum 0 is replaced so that 0 / 1 is exactly zero. Both
    # `where` stand inside `exp` and the division, or their gradients would be 0 * NaN.
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
