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
    rows, keys = min(ROWS, query.shape[1]), min(KEYS, key.shape[1])
    (batch, length, heads, size), kv_heads = query.shape, key.shape[2]
    blocks = -(-length // rows)

    def split(array):  # [B, T, ...] -> [blocks, B, rows, ...]; the rows added see nothing
        array = _padded(array, blocks * rows)
        return jnp.moveaxis(array.reshape(batch, blocks, rows, *array.shape[2:]), 1, 0)

    query_blocks = split(query).reshape(blocks, batch, rows, kv_heads, heads // kv_heads, size)
    query_blocks = query_blocks.transpose(0, 1, 3, 4, 2, 5)  # [blocks, B, K, G, rows, H]
    key_BKSH, value_BKSH = (
        _padded(array, -(-key.shape[1] // keys) * keys).transpose(0, 2, 1, 3) for array in (key, value)
    )
    out = _attention(
        query_blocks, key_BKSH, value_BKSH, split(start), split(limit), scale, logit_softcap, precision
    )
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * rows, heads, size)
    return out[:, :length].astype(query.dtype)


def _padded(array, length):
    return jnp.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


def _forward(query, key, value, start, limit, scale, softcap, precision):
    """All row blocks; the output and the rows' log-normalisers.

    Args:
      query: [blocks, B, K, G, rows, H].  key, value: [B, K, S, H], S a multiple of the key block.
      start, limit: [blocks, B, rows].
    """

    def one_block(block):
        q, start, limit = block
        largest = jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
        carry = (largest, jnp.zeros_like(largest), jnp.zeros(q.shape, jnp.float32))

        def visit(j, carry):
            largest, total, out = carry
            k, v = _take(key, j), _take(value, j)
            scores, _ = _scores(q, k, _visible(j, k.shape[2], start, limit), scale, softcap, precision)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            shift = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
            weights = jnp.exp(scores - shift[..., None])
            decay = jnp.exp(largest - shift)
            total = total * decay + jnp.sum(weights, axis=-1)
            added = _einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, precision)
            return new_largest, total, out * decay[..., None] + added

        largest, total, out = jax.lax.fori_loop(*_range(start, limit, key.shape[2]), visit, carry)
        total = jnp.where(total > 0, total, 1.0)
        normaliser = jnp.where(jnp.isfinite(largest), largest, 0.0) + jnp.log(total)
        return (out / total[..., None]).astype(q.dtype), normaliser

    return jax.lax.map(one_block, (query, start, limit))


def _forward_rule(query, key, value, start, limit, scale, softcap, precision):
    out, normaliser = _forward(query, key, value, start, limit, scale, softcap, precision)
    out, normaliser = (checkpoint_name(array, RESIDUALS) for array in (out, normaliser))
    return out, (query, key, value, start, limit, out, normaliser)


def _backward_rule(scale, softcap, precision, kept, d_out):
    """One visit of every block: scores again, then the three gradients."""
    query, key, value, start, limit, out, normaliser = kept
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def one_block(totals, block):
        q, start, limit, normaliser, d_out, delta = block

        def visit(j, carry):
            d_q, d_key, d_value = carry
            k, v = _take(key, j), _take(value, j)
            visible = _visible(j, k.shape[2], start, limit)
            scores, slope = _scores(q, k, visible, scale, softcap, precision)
            weights = jnp.exp(scores - normaliser[..., None])
            d_weights = _einsum("bkgth,bksh->bkgts", d_out, v, precision)
            d_scores = weights * (d_weights - delta[..., None]) * (scale if slope is None else scale * slope)
            d_scores = d_scores.astype(q.dtype)
            d_v = _einsum("bkgts,bkgth->bksh", weights.astype(q.dtype), d_out, precision)
            d_k = _einsum("bkgts,bkgth->bksh", d_scores, q, precision)
            d_q = d_q + _einsum("bkgts,bksh->bkgth", d_scores, k, precision)
            return d_q, _add(d_key, d_k, j), _add(d_value, d_v, j)

        carry = (jnp.zeros(q.shape, jnp.float32), *totals)
        d_q, *totals = jax.lax.fori_loop(*_range(start, limit, key.shape[2]), visit, carry)
        return tuple(totals), d_q.astype(q.dtype)

    zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    blocks = (query, start, limit, normaliser, d_out.astype(query.dtype), delta)
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


def _visible(j, size, start, limit):
    """[B, 1, 1, rows, keys] bool."""
    s = j * size + jnp.arange(size)
    return ((s >= start[..., None]) & (s < limit[..., None]))[:, None, None]


def _scores(q, k, visible, scale, softcap, precision):
    """Scores [B, K, G, rows, keys], -inf where not visible, and the softcap's slope (None without)."""
    scores, slope = scale * _einsum("bkgth,bksh->bkgts", q, k, precision), None
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1.0 - jnp.square(capped)
    return jnp.where(visible, scores, -jnp.inf), slope


def _take(array, j):
    keys = min(KEYS, array.shape[2])
    return jax.lax.dynamic_slice_in_dim(array, j * keys, keys, axis=2)


def _add(total, part, j):
    block = jax.lax.dynamic_slice_in_dim(total, j * part.shape[2], part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, block + part, j * part.shape[2], axis=2)


def _einsum(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
