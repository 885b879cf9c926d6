"""Fingerprints of arrays: equal on every sharding, another one for every flipped bit.

A leaf is read as 32-bit words v at global indices i. With h(i) and k(i) two hashes of the index,

    m(i) = mix(v(i) XOR h(i))        one-to-one in v: no changed word leaves it as it was
    sums = (sum of m(i), sum of m(i) * (2 k(i) + 1))        both modulo 2^32

Sums don't depend on the order, so each device adds up what it holds and two numbers per leaf travel;
`sums_of_part` does the same by NumPy, for arrays that are never whole.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = 0x9E3779B9, 0x7F4A7C15
_TILE = 1 << 15  # words that NumPy works on at a time, so that they stay in a core's cache
_NO_MESH = jax.sharding.Mesh(np.empty((), dtype=object), ())


def tree_names(tree) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, such as `layers/q`."""
    return {tree_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tree_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def start_fingerprints(leaves: dict[str, Any]) -> dict[str, Any]:
    """Begins to compute fingerprints; the arrays may be donated to the next step at once.

    Args:
      leaves: by name, jax arrays of any sharding, NumPy arrays or numbers. Every process names the same.

    Returns:
      By name the two sums, [2] uint32, on their devices or on their way there; `hexadecimal` reads them.
    """
    groups: dict[Any, dict[str, Any]] = {}
    sums = {}
    with jax.set_mesh(_NO_MESH):  # which would draw every array onto its devices
        for name, leaf in leaves.items():
            if isinstance(leaf, jax.Array):
                groups.setdefault(frozenset(leaf.sharding.device_set), {})[name] = leaf
            else:
                words = jax.device_put(_words_on_host(np.asarray(leaf)), _host())
                sums[name] = _sums([words])[0]
        for group in groups.values():  # arrays on different devices can't enter one function
            sums |= dict(zip(group, _sums(list(group.values()))))
    return {name: sums[name] for name in leaves}


def hexadecimal(sums: dict[str, Any]) -> dict[str, str]:
    """Waits for sums that were started; by name 16 hexadecimal digits."""
    return {name: "".join(f"{word:08x}" for word in np.asarray(pair)) for name, pair in sums.items()}


def fingerprints(leaves: dict[str, Any]) -> dict[str, str]:
    """Returns the fingerprint of each leaf by name, 16 hexadecimal digits."""
    return hexadecimal(start_fingerprints(leaves))


@jax.jit
def _sums(leaves):
    """Returns the sums of each leaf: one compiled function for leaves of given shapes and shardings."""
    return [_sums_of_leaf(leaf) for leaf in leaves]


@jax.jit
def _sums_of_leaf(leaf):
    """Returns the two sums of a leaf; jitted by itself so that equal shapes are traced once."""
    words = _words(leaf)
    key, weight = (
        functools.reduce(jnp.add, [_axis_hash(words.shape, axis, seed) for axis in range(words.ndim)])
        for seed in SEEDS
    )
    mixed = _mix(words ^ key)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (weight | 1), dtype=jnp.uint32)])


def _axis_hash(shape, axis, seed):
    """Hashes the index along one axis, so that no product of sizes, which may pass 2^32, is needed."""
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(index + jnp.uint32((seed * (2 * axis + 1)) % 2**32))


def _mix(x):
    """Mixes words by MurmurHash3's finaliser: one-to-one, and every bit reaches every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(leaf):
    """Returns a leaf's words, uint32, with one more axis of 2 for elements of 8 bytes; a scalar is [1]."""
    leaf = jnp.atleast_1d(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)


def _words_on_host(array):
    """Splits elements of 8 bytes into two words: without `jax_enable_x64` jax would drop one."""
    if array.dtype.itemsize != 8:
        return array
    array = np.ascontiguousarray(np.atleast_1d(array))
    return array[..., None].view(np.uint32)


def _host():
    """Returns this process's CPU device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return jax.local_devices()[0]


def sums_of_part(part: np.ndarray, begin: tuple[int, ...]) -> np.ndarray:
    """Computes the sums of a part of a leaf, by NumPy; a leaf's are those of its parts, added modulo 2^32.

    Args:
      part: of a dtype of 2 or 4 bytes, at least one axis, any strides.
      begin: the global index of its first element.

    Returns:
      [2] uint32
    """
    if not part.size:
        return np.zeros(2, np.uint32)
    bits = part.view(f"u{part.dtype.itemsize}")
    axes = sorted(range(bits.ndim), key=lambda axis: -bits.strides[axis])  # as it lies in memory
    hashes = [[_host_axis_hash(bits.shape[axis], begin[axis], axis, seed) for axis in axes] for seed in SEEDS]
    inner, columns = len(axes) - 1, bits.shape[axes[-1]]
    while inner and columns < _TILE // 16:  # short rows would cost NumPy a call each
        inner -= 1
        columns *= bits.shape[axes[inner]]
    bits = bits.transpose(axes).reshape(-1, columns)
    (key, key_inner), (weight, weight_inner) = (
        (_outer_sum(of_axes[:inner]), _outer_sum(of_axes[inner:])) for of_axes in hashes
    )
    sums, rows = [0, 0], max(1, _TILE // columns)
    for row in range(0, len(bits), rows):
        here = slice(row, row + rows)
        words = key[here, None] + key_inner
        words ^= bits[here]
        _mix_in_place(words)
        sums[0] += int(words.sum(dtype=np.uint64))
        words *= (weight[here, None] + weight_inner) | np.uint32(1)
        sums[1] += int(words.sum(dtype=np.uint64))
    return np.array([total % 2**32 for total in sums], np.uint32)


def _host_axis_hash(size, begin, axis, seed) -> np.ndarray:
    """Computes `_axis_hash` of the indices from `begin`, [size] uint32."""
    hashes = (np.arange(begin, begin + size, dtype=np.uint64) + seed * (2 * axis + 1)).astype(np.uint32)
    _mix_in_place(hashes)
    return hashes


def _outer_sum(hashes) -> np.ndarray:
    """Adds hashes, one per axis, at every index: flat, the last axis fastest."""
    total = np.zeros(1, np.uint32)
    for one in hashes:
        total = (total[:, None] + one).reshape(-1)
    return total


def _mix_in_place(words: np.ndarray) -> None:
    """Computes `_mix` on the host."""
    shifted = np.empty_like(words)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(words, shift, out=shifted)
        words ^= shifted
        words *= np.uint32(factor)
    np.right_shift(words, 16, out=shifted)
    words ^= shifted
