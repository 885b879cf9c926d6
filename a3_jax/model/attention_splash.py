"""Interval attention on TPU: the kernels of JAX's splash attention, fed with traced intervals.

The kernels (Pallas, `jax.experimental.pallas.ops.tpu.splash_attention`) compute the mask inside from one
int32 a row and the key's index, and skip the blocks that a block mask names. Both are traced here, so one
compilation serves every order. All that this package knows of the library's inner names is in this file.

The examples of a batch lie behind each other along the rows and along the keys, so that one kernel runs
over all of them:

    keys        |  example 0  |  example 1  |     the block mask has no room for the blocks off the
    rows   0    |  x  x  .  . |             |     diagonal: row block i has S / block entries, and
           1    |             |  .  x  x  . |     `data_next` says which block of keys each one is

In blocks where a row sees nothing, the kernels' output is undefined: it is set to zero outside, which also
stops the gradient. Forward and backward use the same blocks: a block of rows that sees nothing at all has no
softmax to differentiate, and equal blocks are what keeps it out of the backward kernels.
"""

import functools
import inspect
import sys

import jax
import jax.numpy as jnp

from a3_jax.model.attention_chunked import RESIDUALS
from a3_jax.model.sharding import axis_parts

MAX_KEYS = 2**16 - 1  # start and length of an interval share one int32
_LANES = 128  # a block is a multiple of the vector registers' width
_BLOCKS = (512, 256, 128)
_SCALAR_BYTES = 1_000_000  # of a chip's scalar memory (1 MiB), which holds a kernel's block mask
_QUERY_AXES = ("batch", "length", "heads", "head_size")
_KEY_AXES = ("batch", "length", "kv_heads", "head_size")


def splash_attention(
    query, key, value, start, limit, *, scale, logit_softcap=None, interpret=False, block=None
):
    """`attention.attention` by splash attention, of the examples and heads on one device.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H], K divides N; query head n reads kv head n // (N / K).
      start, limit: [B, T] int32, the row's interval of keys, 0 <= start and limit <= S; empty where
        limit <= start.
      scale: factor on the scores before the softmax.
      logit_softcap: scores become cap * tanh(scores / cap) when given.
      interpret: run the kernels without a TPU, slowly.
      block: rows and keys a block, a multiple of 128; chosen by length unless given.

    Returns:
      [B, T, N, H] in query's dtype; exactly zero in rows with an empty interval.

    Raises:
      ValueError: `unavailable` says why.
    """
    reason = unavailable(query.shape, key.shape)
    if reason is not None:
        raise ValueError(f"splash attention can't be used: {reason}")
    return _attend(
        query, key, value, start, limit,
        scale=scale, logit_softcap=logit_softcap, interpret=interpret, block=block,
    )  # fmt: skip


def unavailable(query_shape, key_shape) -> str | None:
    """Why `splash_attention` can't be used for these shapes in the mesh of the context; None if it can.

    Args:
      query_shape: of query [B, T, N, H].
      key_shape: of key [B, S, K, H].
    """
    try:
        _library()
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has no splash attention that fits: {error}"
    (batch, rows), keys = query_shape[:2], key_shape[1]
    if keys > MAX_KEYS:
        return f"{keys} keys are more than {MAX_KEYS}"
    for name, size in [*zip(_QUERY_AXES, query_shape), *zip(_KEY_AXES, key_shape)]:
        if _splits() and size % axis_parts(name):
            return f"axis {name} of size {size} can't be split in {axis_parts(name)}"
    batch //= axis_parts("batch") if _splits() else 1
    row_blocks, key_blocks = -(-rows // _choose_block(rows)), -(-keys // _choose_block(keys))
    entries = max(batch * row_blocks * _round_up(key_blocks), row_blocks * _round_up(batch * key_blocks))
    if 3 * entries > _SCALAR_BYTES or batch * key_blocks >= 2**15:
        return f"{batch} examples of {rows} rows and {keys} keys are too many blocks for one chip"
    return None


def available(query_shape, key_shape) -> bool:
    """Whether `splash_attention` can be used; if not, says why on standard error, each reason once.

    Args:
      query_shape: of query [B, T, N, H].
      key_shape: of key [B, S, K, H].
    """
    reason = unavailable(query_shape, key_shape)
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason):
    print(f"warning: attention without the TPU kernel, which is slower: {reason}", file=sys.stderr)


def _splits() -> bool:
    """Whether a mesh is in the context and the arrays are not one device's part already."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.are_all_axes_manual)


def _choose_block(length: int) -> int:
    """Rows or keys a block: the largest size that pads a length by little."""
    return next(size for size in _BLOCKS if _round_up(length, size) <= 1.125 * _round_up(length))


def _round_up(size, unit=_LANES):
    return -(-size // unit) * unit


def _attend(query, key, value, start, limit, *, scale, logit_softcap, interpret, block):
    """`splash_attention` of the examples on one device."""
    (batch, rows, heads, _), keys = query.shape, key.shape[1]
    row_block, key_block = block or _choose_block(rows), block or _choose_block(keys)
    # In float32: a scale rounded to bfloat16 would shift all scores the same way.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    kernel = _make_kernel(
        _pad(start, row_block),
        _pad(limit, row_block),  # rows added see nothing
        -(-keys // key_block),
        (row_block, key_block),
        softcap=logit_softcap,
        interpret=interpret,
    )
    out = kernel(*(_heads_first(_pad(array, size)) for array, size in (
        (query, row_block), (key, key_block), (value, key_block),
    )))  # fmt: skip
    out = jnp.moveaxis(out.reshape(heads, batch, -1, query.shape[3]), 0, 2)[:, :rows]
    return jnp.where((limit > start)[..., None, None], out, 0)


def _make_kernel(start, limit, key_blocks, blocks, *, softcap, interpret):
    """The library's kernel object for intervals [B, T] whose T is a multiple of the rows a block."""
    library, masks = _library()
    row_block, key_block = blocks
    batch = len(start)
    start, limit = start.astype(jnp.int32), limit.astype(jnp.int32)
    example = jnp.arange(batch, dtype=jnp.int32)[:, None]
    packed = _pack(start + example * (key_blocks * key_block), limit - start)
    needed = _needed_blocks(start, limit, key_blocks, blocks)  # [B, T blocks, S blocks]
    row_blocks = needed.shape[1]
    example = example[..., None]
    # Forward and dq walk along the keys of a block of rows, dkv along the rows of a block of keys.
    by_row = _next_needed(needed, axis=2) + example * key_blocks
    by_key = _next_needed(needed, axis=1) + example * row_blocks
    # Fused together, these small arrays have crashed the TPU compiler. Small types save scalar memory.
    mask, by_row, by_key = needed.astype(jnp.int8), by_row.astype(jnp.int16), by_key.astype(jnp.int16)
    row_mask, key_mask, by_row, by_key = jax.lax.optimization_barrier((mask, mask, by_row, by_key))

    def info(mask, data_next, shape):
        return masks.MaskInfo(
            data_next=data_next.reshape(shape),
            mask_next=None,
            block_mask=mask.reshape(shape),
            partial_mask_blocks=None,
            q_sequence=packed.reshape(-1),
        )

    rows_info = info(row_mask, by_row, (1, batch * row_blocks, key_blocks))
    keys_info = info(
        jnp.moveaxis(key_mask, 0, 1), jnp.moveaxis(by_key, 0, 1), (1, row_blocks, batch * key_blocks)
    )
    return library.SplashAttentionKernel(
        rows_info,
        rows_info,
        keys_info,
        block_sizes=library.BlockSizes(
            block_q=row_block,
            block_kv=key_block,
            block_q_dq=row_block,
            block_kv_dq=key_block,
            block_q_dkv=row_block,
            block_kv_dkv=key_block,
        ),  # not the fused backward kernel: it writes dq once for every block of keys
        is_mqa=False,
        save_residuals=False,
        mask_value=library.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=RESIDUALS,
        mask_function=_visible,
        interpret=interpret,
    )


def _pack(start, length):
    """An interval as one int32: its start modulo 2**16, and its length, 0 if negative."""
    return start << 16 | jnp.maximum(length, 0)


def _visible(packed, key):
    """Whether a row sees a key of its example: the distance from the start, modulo 2**16, is below the
    length. A key before the start is too far to be seen, as start and length add up to less than 2**16.
    """
    return ((key - (packed >> 16)) & 0xFFFF) < (packed & 0xFFFF)


def _needed_blocks(start, limit, key_blocks, blocks):
    """[B, T blocks, S blocks] bool: whether any row of the block sees any key of the block."""
    row_block, key_block = blocks
    first = jnp.arange(key_blocks, dtype=jnp.int32) * key_block
    start, limit = start[..., None], limit[..., None]
    needed = (limit > start) & (limit > first) & (start < first + key_block)
    return needed.reshape(len(start), -1, row_block, key_blocks).any(axis=2)


def _next_needed(needed, axis):
    """The index of the next needed block along an axis, and after the last one the last: what is not
    needed is not fetched, and what is needed next is fetched ahead."""
    size = needed.shape[axis]
    index = jnp.arange(size, dtype=jnp.int32).reshape([size if a == axis else 1 for a in range(needed.ndim)])
    following = jax.lax.cummin(jnp.where(needed, index, size), axis=axis, reverse=True)
    last = jnp.max(jnp.where(needed, index, 0), axis=axis, keepdims=True)
    return jnp.minimum(following, last)


def _pad(array, block):
    """[B, T, ...] with T padded to a multiple of the block, by zeros."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, -array.shape[1] % block)
    return jnp.pad(array, padding)


def _heads_first(array):
    """[B, T, N, H] -> [N, B * T, H]."""
    return jnp.moveaxis(array, 2, 0).reshape(array.shape[2], -1, array.shape[3])


@functools.cache
def _library():
    """The library's modules (kernel, mask_info), with all names that are used here.

    Raises:
      ImportError, AttributeError: this version of jax lacks one.
    """
    # Imported late: 0.3 s that a run without a TPU would pay for nothing.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask_info,
    )

    kernels, masks = splash_attention_kernel, splash_attention_mask_info
    used = {
        kernels.BlockSizes: "block_q block_kv block_q_dq block_kv_dq block_q_dkv block_kv_dkv",
        masks.MaskInfo: "data_next mask_next block_mask partial_mask_blocks q_sequence",
        kernels.SplashAttentionKernel: "fwd_mask_info dq_mask_info dkv_mask_info",
        kernels._splash_attention: "block_sizes is_mqa save_residuals mask_value attn_logits_soft_cap "
        "residual_checkpoint_name mask_function interpret",
    }
    for function, names in used.items():
        for name in names.split():
            if name not in inspect.signature(function).parameters:
                raise AttributeError(f"{function.__name__} has no {name}")
    kernels.DEFAULT_MASK_VALUE  # noqa: B018
    return kernels, masks
