"""A decoding cache: written in place, and read in place, no further than it is filled.

    cache  [L, B, K, S, H]   slots  0 . . 1 . . 2 . . | . . .
    rows                            x x x x x x x . .   two blocks of keys read, the third and what lies
                                                        behind the length are not touched

A block of one layer's keys is a slice of the cache, taken in the loop: the cache is never copied, and a
step costs by what is committed, not by what there is room for.
"""

import functools

import jax
import jax.numpy as jnp

from a3_jax.model.sharding import axis_parts, partition_spec

KEYS = 256  # of a block
_CACHE = ("layers", "batch", "kv_heads", "length", "head_size")
_KEY = ("batch", "length", "kv_heads", "head_size")
_QUERY, _ROW = ("batch", "length", "heads", "head_size"), ("batch", "length")


def append(kept, new, layer, length):
    """The cache with an example's new rows behind those in use.

    Args:
      kept: [L, B, K, S, H], keys or values.
      new: [B, T, K, H].
      layer: int32 scalar.
      length: [B] int32; length + T <= S.

    Returns:
      [L, B, K, S, H]: the same buffer, where its old content is not needed any more.
    """

    def put(kept, new, layer, length):
        new = new.astype(kept.dtype).swapaxes(1, 2)

        def one(b, kept):  # a scatter over examples would transpose the whole cache
            block = jax.lax.dynamic_slice_in_dim(new, b, 1)[None]
            return jax.lax.dynamic_update_slice(kept, block, (layer, b, 0, length[b], 0))

        return jax.lax.fori_loop(0, new.shape[0], one, kept)

    specs = (_CACHE, _KEY, (), ("batch",))
    return _each_device(put, specs, _CACHE, kept)(kept, new, layer, length)


def cached_attention(query, keys, values, layer, start, limit, *, scale, logit_softcap=None, precision=None):
    """`attention.attention` over one layer of a cache; forward only.

    Args:
      query: [B, T, N, H], few rows: scores of all of them with a block of keys are alive at once.
      keys, values: [L, B, K, S, H].
      layer: int32 scalar.
      start, limit: [B, T] int32, intervals of slots.
      scale, logit_softcap, precision: as in `attention.attention`.

    Returns:
      [B, T, N, H] in query's dtype; exactly zero in rows with an empty interval.
    """
    attend = functools.partial(_attend, scale=scale, logit_softcap=logit_softcap, precision=precision)
    specs = (_QUERY, _CACHE, _CACHE, (), _ROW, _ROW)
    return _each_device(attend, specs, _QUERY, keys)(query, keys, values, layer, start, limit)


def _each_device(function, in_axes, out_axes, cache):
    """`function` on each device's examples and heads; as it is without a mesh or where they don't divide."""
    batch, heads = axis_parts("batch"), axis_parts("kv_heads")
    if batch * heads == 1 or cache.shape[1] % batch or cache.shape[2] % heads:
        return function
    specs = tuple(partition_spec(axes) for axes in in_axes)
    return jax.shard_map(function, in_specs=specs, out_specs=partition_spec(out_axes), check_vma=False)


def _attend(query, keys, values, layer, start, limit, *, scale, logit_softcap, precision):
    (batch, rows, heads, size), (kv_heads, slots) = query.shape, keys.shape[2:4]
    block, group = min(KEYS, slots), heads // kv_heads
    query_BKRH = query.reshape(batch, rows, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    query_BKRH = query_BKRH.reshape(batch, kv_heads, group * rows, size)
    start, limit = (jnp.tile(bound, (1, group))[:, None, :, None] for bound in (start, limit))
    sees = limit > start
    last = -(-jnp.max(jnp.where(sees, limit, 0)) // block)
    first = jnp.minimum(jnp.min(jnp.where(sees, start, slots)) // block, last)

    def take(array, at):
        part = jax.lax.dynamic_slice(
            array, (layer, 0, 0, at, 0), (1, batch, kv_heads, block, size), allow_negative_indices=False
        )
        return part[0].astype(query.dtype)

    def visit(j, carry):
        largest, total, out = carry
        at = jnp.minimum(j * block, slots - block)  # the last block may overlap the one before
        scores = scale * jnp.einsum(
            "BKRH,BKSH->BKRS", query_BKRH, take(keys, at),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        if logit_softcap is not None:
            scores = logit_softcap * jnp.tanh(scores / logit_softcap)
        s = at + jnp.arange(block)
        scores = jnp.where((s >= start) & (s < limit) & (s >= j * block), scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        weights, decay = jnp.exp(scores - shift), jnp.exp(largest - shift)
        added = jnp.einsum(
            "BKRS,BKSH->BKRH", weights.astype(query.dtype), take(values, at),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return new_largest, total * decay + jnp.sum(weights, axis=-1, keepdims=True), out * decay + added

    nothing = jnp.zeros((batch, kv_heads, group * rows, 1), jnp.float32)
    carry = (nothing - jnp.inf, nothing, jnp.zeros(query_BKRH.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(first, last, visit, carry)
    out = (out / jnp.where(total > 0, total, 1.0)).astype(query.dtype)
    out = out.reshape(batch, kv_heads, group, rows, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)
