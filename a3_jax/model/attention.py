"""Attention over intervals of keys: row t sees exactly the keys `start[t] <= s < limit[t]`.

    s        0  1  2  3  4  5
    t = 0    x  x  .  .  .  .     start 0, limit 2
    t = 1    .  .  .  .  .  .     start 0, limit 0: no visible key, the output is zero
    t = 2    .  .  .  x  x  x     start 3, limit 6: another document

`start` and `limit` are all that attention knows about order. The softmax over no key is zero by
construction, so neither a row without context nor padding needs a special case.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from a3_jax.model import attention_splash
from a3_jax.model.attention_chunked import chunked_attention
from a3_jax.model.sharding import axis_parts, partition_spec, platform

FEW_ROWS = 256  # up to here all scores at once are cheaper than blocks
_AXES = {
    "query": ("batch", "length", "heads", "head_size"),
    "key": ("batch", "length", "kv_heads", "head_size"),
    "row": ("batch", "length"),
}


def attention(
    query, key, value, start, limit, *, scale, logit_softcap=None, precision=None, implementation="auto"
):
    """Softmax attention of each row over its interval of keys, with grouped key/value heads.

    On a mesh (`jax.set_mesh`) every device attends to its own examples with its own heads.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H], K divides N; query head n reads kv head n // (N / K).
      start, limit: [B, T] int32, the row's interval of keys, half open; empty where limit <= start.
      scale: factor on the scores before the softmax.
      logit_softcap: scores become cap * tanh(scores / cap) when given.
      precision: of the matrix products, as in `jax.numpy.einsum`.
      implementation: a name of `IMPLEMENTATIONS`; "auto" takes splash attention on TPU and blocks in
        plain JAX elsewhere, or all scores at once for few rows. Without a TPU, "splash" is interpreted.

    Returns:
      [B, T, N, H] in query's dtype; softmax in float32; exactly zero in rows with an empty interval.

    Raises:
      ValueError: shapes that don't fit each other, or an unknown implementation.
    """
    _check_shapes(query, key, value, start, limit)
    if implementation == "auto":
        implementation = _chosen(query, key)
    if implementation not in _FUNCTIONS:
        raise ValueError(f"implementation={implementation!r}, known: {', '.join(IMPLEMENTATIONS)}")

    def attend(query, key, value, start, limit):
        return _FUNCTIONS[implementation](
            query, key, value, start, limit, scale=scale, logit_softcap=logit_softcap, precision=precision
        )

    return _each_device(attend, query, key)(query, key, value, start, limit)


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


def _splash(query, key, value, start, limit, *, scale, logit_softcap, precision):
    del precision  # the kernel's products are in the dtype of its inputs, summed in float32
    return attention_splash.splash_attention(
        query, key, value, start, limit,
        scale=scale, logit_softcap=logit_softcap, interpret=platform() != "tpu",
    )  # fmt: skip


_FUNCTIONS: dict[str, Callable] = {
    "splash": _splash,
    "chunked": chunked_attention,
    "dense": dense_attention,
}
IMPLEMENTATIONS = ("auto", *_FUNCTIONS)


def _chosen(query, key) -> str:
    """What "auto" means for these shapes, on the devices of the mesh or the default ones."""
    if query.shape[1] <= FEW_ROWS:
        return "dense"
    if platform() == "tpu" and attention_splash.available(query.shape, key.shape):
        return "splash"
    return "chunked"


def _each_device(attend, query, key):
    """`attend` on each device's examples and heads; as it is without a mesh or where they don't divide."""
    batch, heads = axis_parts("batch"), axis_parts("heads")
    if batch * heads == 1 or query.shape[0] % batch or key.shape[2] % heads:
        return attend
    of_query, of_key, of_row = (partition_spec(_AXES[name]) for name in ("query", "key", "row"))
    return jax.shard_map(
        attend, in_specs=(of_query, of_key, of_key, of_row, of_row), out_specs=of_query, check_vma=False
    )


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
