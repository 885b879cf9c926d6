"""The decoder's parts other than attention: embedding, norms, rotary positions, activations."""

import functools
import math

import jax
import jax.numpy as jnp

from a3_jax.model.config import RopeScaling
from a3_jax.model.sharding import axis_parts, mesh_axes, partition_spec

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def embed(table, tokens, dtype):
    """Rows of the embedding table, [B, T, D] in `dtype`; gradients are summed in the table's dtype.

    On a mesh no device sees the whole table: each looks up the tokens of all examples in its own
    columns, and the columns of an example are sent to where the example is.

    Args:
      table: [V, D].  tokens: [B, T] int32 in 0..V-1.
    """
    width, vocab = mesh_axes("embed"), mesh_axes("vocab")
    if axis_parts("batch") * axis_parts("vocab") == 1 or tokens.shape[0] % axis_parts("batch"):
        return table[tokens].astype(dtype)

    def lookup(table, tokens):
        # Tokens of other devices' parts of the vocabulary are out of range here and give zeros: in the sum
        # over `vocab` each token has one part that is its embedding.
        tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        tokens = tokens - table.shape[0] * jax.lax.axis_index(vocab)
        columns = table.at[tokens].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        # [all examples, T, own columns] -> [own examples, T, D]
        x_BTD = jax.lax.all_to_all(columns.astype(dtype), width, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x_BTD, vocab)

    of_rows, of_table = partition_spec(("batch", "length")), partition_spec(("vocab", "embed"))
    return jax.shard_map(
        lookup, in_specs=(of_table, of_rows), out_specs=partition_spec(("batch", "length", "embed_act"))
    )(table, tokens)


def rms_norm(x, scale, eps, offset=False):
    """x / rms(x) * scale over the axes of `scale`, in float32 (Zhang & Sennrich, arXiv 1910.07467).

    Args:
      x: [..., D].  scale: [D], or of several axes, which are normed together.
      eps: added to the mean square.
      offset: times 1 + scale, and in float32 to the end, as in Gemma (arXiv 2403.08295).

    Returns:
      [..., D] in x's dtype.
    """
    x32, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    # Gemma's code rounds after the scale, Llama's before it: so do we, to give the same bits.
    if offset:
        return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
    return (scale * normed.astype(x.dtype)).astype(x.dtype)


def layer_norm(x, scale, bias, eps):
    """(x - mean(x)) / std(x) * scale + bias over the last axis, in float32 (Ba et al., arXiv 1607.06450).

    Args:
      x: [..., D].  scale, bias: [D].  eps: added to the variance.

    Returns:
      [..., D] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def softcap(scores, cap):
    """Returns cap * tanh(scores / cap), [...] to [...], so that no score exceeds the cap; None: no cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def softcap_slope(capped, cap):
    """Returns the derivative of `softcap` where its result is `capped`: 1 - tanh^2; [...] to [...]."""
    return 1.0 - jnp.square(capped / cap)


def rotary_frequencies(head_size: int, theta: float, scaling: RopeScaling | None = None):
    """Angular frequencies in radians per position, float32 [H / 2] (RoFormer, arXiv 2104.09864)."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        return _yarn_frequencies(frequencies, theta, scaling)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies, scaling):
    """Wavelengths up to original/high stay, from original/low on are stretched, between they blend."""
    # The blend is linear in the turns that a pair makes over the original context.
    turns = scaling.original_max_length * frequencies / (2 * jnp.pi)  # full turns in the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def _yarn_frequencies(frequencies, theta, scaling):
    """Pairs that turn often in the original context stay, slow ones are stretched; between, a linear ramp."""
    pairs = frequencies.shape[0]

    def pair_of(turns):  # the pair, a fraction as it comes, that makes so many turns
        return pairs * math.log(scaling.original_max_length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.high_freq_factor), pair_of(scaling.low_freq_factor)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # A ramp of no length would divide by zero.
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last += 0.001 if last == first else 0.0
    stretch = jnp.clip((jnp.arange(pairs, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)
    return frequencies * (1.0 - stretch + stretch / scaling.factor)


def rotary_angles(positions, frequencies):
    """(cos, sin) of position x frequency, float32 [..., T, H / 2] each; positions [..., T] int."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, cos_BTh, sin_BTh):
    """Turns the pair (x[h], x[h + H/2]) by its angle: the half-split layout of Hugging Face checkpoints.

    Args:
      x_BTNH: [B, T, N, H].  cos_BTh, sin_BTh: [B, T, H / 2] float32.

    Returns:
      [B, T, N, H] in x's dtype.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
