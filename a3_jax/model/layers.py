"""The decoder's parts other than attention: norm, rotary positions, gated MLP."""

import jax
import jax.numpy as jnp

from a3_jax.model.config import RopeScaling


def rms_norm(x, scale, eps):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich, arXiv 1910.07467).

    Args:
      x: [..., D].  scale: [D].  eps: added to the mean square.

    Returns:
      [..., D] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (scale * normed.astype(x.dtype)).astype(x.dtype)


def rotary_frequencies(head_size: int, theta: float, scaling: RopeScaling | None = None):
    """Angular frequencies in radians per position, float32 [H / 2] (RoFormer, arXiv 2104.09864)."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies, scaling):
    """Wavelengths up to original/high stay, from original/low on are stretched, between they blend."""
    turns = scaling.original_max_length * frequencies / (2 * jnp.pi)  # full turns in the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


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


def gated_mlp(x_BTD, gate_DF, up_DF, down_FD, *, precision=None):
    """SwiGLU (Shazeer, arXiv 2002.05202): (silu(x gate) * (x up)) down; [B, T, D] to [B, T, D]."""
    gate = jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF, precision=precision)
    up = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF, precision=precision)
    return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, down_FD, precision=precision)
