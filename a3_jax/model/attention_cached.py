"""A decoding cache: written in place, and read in place, no further than it is filled.

    cache  [L, B, K, S, H]   slots  0 . . 1 . . 2 . . | . . .
    rows                            x x x x x x x . .   two blocks of keys are read; the third, and what is
                                                        past the length, is not touched

A block of one layer's keys is a slice of the cache, taken in the loop: the cache is never copied, and the
cost of a step follows what is committed, not what there is room for.
"""

import functools

import jax
import jax.numpy as jnp

from a3_jax.model.attention_chunked import AttentionArgs, add_to_softmax, empty_softmax
from a3_jax.model.layers import softcap
from a3_jax.model.sharding import on_each_device

KEYS = 256  # of a block
_CACHE = ("layers", "batch", "kv_heads", "length", "head_size")
_KEY = ("batch", "length", "kv_heads", "head_size")
_QUERY, _ROW = ("batch", "length", "heads", "head_size"), ("batch", "length")


def append(cache_LBKSH, new_BTKH, layer, length_B):
    """Writes each example's new rows of one layer after the slots in use.

    Args:
      cache_LBKSH: [L, B, K, S, H], keys or values.
      new_BTKH: [B, T, K, H].
      layer: int32 scalar.
      length_B: [B] int32, slots in use; length + T <= S.

    Returns:
      [L, B, K, S, H]: the same buffer, where its old content is no longer needed.
    """

    def put(cache_LBKSH, new_BTKH, layer, length_B):
        new_BKTH = new_BTKH.astype(cache_LBKSH.dtype).swapaxes(1, 2)

        def put_example(b, cache_LBKSH):  # a scatter over examples would transpose the whole cache
            new_11KTH = jax.lax.dynamic_slice_in_dim(new_BKTH, b, 1)[None]
            return jax.lax.dynamic_update_slice(cache_LBKSH, new_11KTH, (layer, b, 0, length_B[b], 0))

        return jax.lax.fori_loop(0, new_BKTH.shape[0], put_example, cache_LBKSH)

    put = on_each_device(put, (_CACHE, _KEY, (), ("batch",)), _CACHE, _sizes(cache_LBKSH))
    return put(cache_LBKSH, new_BTKH, layer, length_B)


def cached_attention(query_BTNH, keys_LBKSH, values_LBKSH, layer, start_BT, limit_BT, args: AttentionArgs):
    """Computes `attention.attention` over one layer of a cache; forward only.

    Args:
      query_BTNH: [B, T, N, H], few rows: scores of all of them with a block of keys are alive at once.
      keys_LBKSH, values_LBKSH: [L, B, K, S, H].
      layer: int32 scalar.
      start_BT, limit_BT: [B, T] int32, intervals of slots.
      args: how scores are made of products.

    Returns:
      [B, T, N, H] in query's dtype; exactly zero in rows with an empty interval.
    """
    specs = (_QUERY, _CACHE, _CACHE, (), _ROW, _ROW)
    attend = on_each_device(functools.partial(_attend, args=args), specs, _QUERY, _sizes(keys_LBKSH))
    return attend(query_BTNH, keys_LBKSH, values_LBKSH, layer, start_BT, limit_BT)


def _sizes(cache_LBKSH):
    return {"batch": cache_LBKSH.shape[1], "kv_heads": cache_LBKSH.shape[2]}


def _attend(query_BTNH, keys_LBKSH, values_LBKSH, layer, start_BT, limit_BT, *, args):
    """`cached_attention` of one device's examples and heads. Below, R = G x T: all rows of a kv head."""
    (batch, rows, heads, size), (kv_heads, slots) = query_BTNH.shape, keys_LBKSH.shape[2:4]
    block, group = min(KEYS, slots), heads // kv_heads
    # [B, T, K G, H] -> [B, T, K, G, H] -> [B, K, G, T, H] -> [B, K, R, H]: one product per kv head.
    query_BKRH = query_BTNH.reshape(batch, rows, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    query_BKRH = query_BKRH.reshape(batch, kv_heads, group * rows, size)
    start_B1R1, limit_B1R1 = (jnp.tile(bound, (1, group))[:, None, :, None] for bound in (start_BT, limit_BT))
    # Only blocks between the lowest start and the highest limit of the batch are read.
    sees = limit_B1R1 > start_B1R1
    last = -(-jnp.max(jnp.where(sees, limit_B1R1, 0)) // block)
    first = jnp.minimum(jnp.min(jnp.where(sees, start_B1R1, slots)) // block, last)

    def take(cache_LBKSH, at):
        part = jax.lax.dynamic_slice(
            cache_LBKSH, (layer, 0, 0, at, 0), (1, batch, kv_heads, block, size), allow_negative_indices=False
        )
        return part[0].astype(query_BTNH.dtype)

    def visit(j, carry):
        # Slots need not be a multiple of the block: the last block is moved back to end with them, and of
        # the keys that it shares with the block before none is counted twice (`s >= j * block`).
        at = jnp.minimum(j * block, slots - block)
        scores_BKRS = args.scale * jnp.einsum(
            "BKRH,BKSH->BKRS", query_BKRH, take(keys_LBKSH, at),
            precision=args.precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores_BKRS = softcap(scores_BKRS, args.softcap)
        s = at + jnp.arange(block)
        scores_BKRS = jnp.where(
            (s >= start_B1R1) & (s < limit_B1R1) & (s >= j * block), scores_BKRS, -jnp.inf
        )

        def values_of(weights_BKRS):
            return jnp.einsum(
                "BKRS,BKSH->BKRH", weights_BKRS.astype(query_BTNH.dtype), take(values_LBKSH, at),
                precision=args.precision, preferred_element_type=jnp.float32,
            )  # fmt: skip

        return add_to_softmax(carry, scores_BKRS, values_of, axis=3)

    carry = empty_softmax((batch, kv_heads, group * rows, 1), query_BKRH.shape)
    _, total_BKR1, out_BKRH = jax.lax.fori_loop(first, last, visit, carry)
    out_BKRH = (out_BKRH / jnp.where(total_BKR1 > 0, total_BKR1, 1.0)).astype(query_BTNH.dtype)
    # [B, K, R, H] -> [B, K, G, T, H] -> [B, T, K, G, H] -> [B, T, N, H].
    out_BKGTH = out_BKRH.reshape(batch, kv_heads, group, rows, size)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(query_BTNH.shape)
