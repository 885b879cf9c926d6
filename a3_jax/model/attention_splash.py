"""Interval attention on TPU: the kernels of JAX's splash attention, fed with traced intervals.

The kernels (Pallas, `jax.experimental.pallas.ops.tpu.splash_attention`) compute the mask inside from one
int32 per row and the key's index, and skip the blocks that a block mask names. Both are traced here, so one
compilation serves every order. All that this package knows of the library's inner names is in this file.

The examples of a batch follow each other along the rows and along the keys, so that one kernel runs over
all of them:

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

from a3_jax.model.attention_chunked import RESIDUALS, AttentionArgs
from a3_jax.model.sharding import axis_parts, platform

MAX_KEYS = 2**16 - 1  # start and length of an interval share one int32
_LANES = 128  # a block is a multiple of the vector registers' width
_BLOCKS = (512, 256, 128)
_BLOCK_SIDES = "block_q block_kv block_q_dq block_kv_dq block_q_dkv block_kv_dkv"  # rows, keys of each kernel
_SCALAR_BYTES = 1_000_000  # of a chip's scalar memory (1 MiB), which holds a kernel's block mask
_QUERY_AXES = ("batch", "length", "heads", "head_size")
_KEY_AXES = ("batch", "length", "kv_heads", "head_size")


def splash_attention(
    query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT, args: AttentionArgs, *, interpret=None, block=None
):
    """Computes `attention.attention` by splash attention, of the examples and heads on one device.

    Args:
      query_BTNH: [B, T, N, H].
      key_BSKH, value_BSKH: [B, S, K, H], K divides N; query head n reads kv head n // (N / K).
      start_BT, limit_BT: [B, T] int32, the row's interval of keys, 0 <= start and limit <= S; empty where
        limit <= start.
      args: scale and softcap; products are in the dtype of the inputs, summed in float32, whatever
        `precision` says.
      interpret: run the kernels without a TPU, slowly; None: where the platform is not a TPU.
      block: rows and keys per block, a multiple of 128; None: chosen by length.

    Returns:
      [B, T, N, H] in query's dtype; exactly zero in rows with an empty interval.

    Raises:
      ValueError: `unavailable` says why.
    """
    reason = unavailable(query_BTNH.shape, key_BSKH.shape)
    if reason is not None:
        raise ValueError(f"splash attention can't be used: {reason}")
    (batch, rows, heads, size), keys = query_BTNH.shape, key_BSKH.shape[1]
    row_block, key_block = block or _choose_block(rows), block or _choose_block(keys)
    # In float32: a scale rounded to bfloat16 would shift all scores the same way.
    query_BTNH = (query_BTNH.astype(jnp.float32) * args.scale).astype(query_BTNH.dtype)
    kernel = _make_kernel(
        _pad(start_BT, row_block),
        _pad(limit_BT, row_block),  # rows added see nothing
        -(-keys // key_block),
        (row_block, key_block),
        softcap=args.softcap,
        interpret=platform() != "tpu" if interpret is None else interpret,
    )
    out = kernel(*(_heads_first(_pad(array, size)) for array, size in (
        (query_BTNH, row_block), (key_BSKH, key_block), (value_BSKH, key_block),
    )))  # fmt: skip
    # [N, B x T, H] -> [N, B, T, H] -> [B, T, N, H], without the rows added.
    out_BTNH = jnp.moveaxis(out.reshape(heads, batch, -1, size), 0, 2)[:, :rows]
    return jnp.where((limit_BT > start_BT)[..., None, None], out_BTNH, 0)


def unavailable(query_shape, key_shape) -> str | None:
    """Returns why `splash_attention` can't be used for these shapes in the mesh of the context, or None.

    Args:
      query_shape: that of query [B, T, N, H].
      key_shape: that of key [B, S, K, H].
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
    """Returns whether `splash_attention` can be used; if not, says why on standard error, each reason once.

    Args:
      query_shape: that of query [B, T, N, H].
      key_shape: that of key [B, S, K, H].
    """
    reason = unavailable(query_shape, key_shape)
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason):
    print(f"warning: attention without the TPU kernel, which is slower: {reason}", file=sys.stderr)


def _splits() -> bool:
    """Returns whether a mesh is in the context and the arrays are not one device's part already."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.are_all_axes_manual)


def _choose_block(length: int) -> int:
    """Returns the rows or keys per block: the largest size that pads a length by little."""
    return next(size for size in _BLOCKS if _round_up(length, size) <= 1.125 * _round_up(length))


def _round_up(size, unit=_LANES):
    return -(-size // unit) * unit


def _make_kernel(start_BT, limit_BT, key_blocks, blocks, *, softcap, interpret):
    """Makes the library's kernel object for intervals [B, T] whose T is a multiple of the rows per block."""
    library, masks = _library()
    batch, key_block = len(start_BT), blocks[1]
    start_BT, limit_BT = start_BT.astype(jnp.int32), limit_BT.astype(jnp.int32)
    # The keys of example b come after those of the b examples before it: so do its intervals.
    example = jnp.arange(batch, dtype=jnp.int32)[:, None]
    packed_BT = _pack(start_BT + example * (key_blocks * key_block), limit_BT - start_BT)
    needed = _needed_blocks(start_BT, limit_BT, key_blocks, blocks)  # [B, T blocks, S blocks]
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
            q_sequence=packed_BT.reshape(-1),
        )

    rows_info = info(row_mask, by_row, (1, batch * row_blocks, key_blocks))
    keys_info = info(
        jnp.moveaxis(key_mask, 0, 1), jnp.moveaxis(by_key, 0, 1), (1, row_blocks, batch * key_blocks)
    )
    return library.SplashAttentionKernel(
        rows_info,
        rows_info,
        keys_info,
        # Not the fused backward kernel: it writes dq once for every block of keys.
        block_sizes=library.BlockSizes(**dict(zip(_BLOCK_SIDES.split(), 3 * blocks, strict=True))),
        is_mqa=False,
        save_residuals=False,
        mask_value=library.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=RESIDUALS,
        mask_function=_visible,
        interpret=interpret,
    )


def _pack(start, length):
    """Packs an interval into one int32: its start modulo 2**16, and its length, 0 if negative."""
    return start << 16 | jnp.maximum(length, 0)


def _visible(packed, key):
    """Returns whether a row sees a key of its example."""
    # Its distance from the start, modulo 2**16, is below the length. A key before the start is too far to be
    # seen, as start and length add up to less than 2**16.
    return ((key - (packed >> 16)) & 0xFFFF) < (packed & 0xFFFF)


def _needed_blocks(start_BT, limit_BT, key_blocks, blocks):
    """Marks the blocks in which any row sees any key: [B, T blocks, S blocks] bool."""
    row_block, key_block = blocks
    first = jnp.arange(key_blocks, dtype=jnp.int32) * key_block
    start, limit = start_BT[..., None], limit_BT[..., None]
    needed = (limit > start) & (limit > first) & (start < first + key_block)  # [B, T, S blocks]
    return needed.reshape(len(start), -1, row_block, key_blocks).any(axis=2)


def _next_needed(needed, axis):
    """Returns the index of the next needed block along an axis; after the last one, that of the last.

    So what is not needed is not fetched, and what is needed next is fetched ahead.

        needed         .  x  .  .  x  .
        next needed    1  1  4  4  4  4
    """
    size = needed.shape[axis]
    index = jnp.arange(size, dtype=jnp.int32).reshape([size if a == axis else 1 for a in range(needed.ndim)])
    following = jax.lax.cummin(jnp.where(needed, index, size), axis=axis, reverse=True)
    last = jnp.max(jnp.where(needed, index, 0), axis=axis, keepdims=True)
    return jnp.minimum(following, last)


def _pad(array, block):
    """Pads the rows of [B, T, ...] with zeros to a multiple of the block."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, -array.shape[1] % block)
    return jnp.pad(array, padding)


def _heads_first(array):
    """Puts the heads first and all examples after each other: [B, T, N, H] -> [N, B * T, H]."""
    return jnp.moveaxis(array, 2, 0).reshape(array.shape[2], -1, array.shape[3])


@functools.cache
def _library():
    """Imports the library's modules (kernel, mask_info), and checks that they have all names used here.

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
        kernels.BlockSizes: _BLOCK_SIDES,
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
