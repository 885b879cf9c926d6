"""Fingerprints of arrays: equal on every sharding, another one for every flipped bit.

A leaf is read as 32-bit words v at global indices i. With h(i) and k(i) two hashes of the index,

    m(i) = mix(v(i) XOR h(i))        one-to-one in v: no changed word leaves it as it was
    sums = (sum of m(i), sum of m(i) * (2 k(i) + 1))        both modulo 2^32

Sums don't depend on the order, so each device adds up what it holds and two numbers a leaf travel;
`part_sums` does the same by NumPy, for arrays that are never whole.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = 0x9E3779B9, 0x7F4A7C15
_NO_MESH = jax.sharding.Mesh(np.empty((), dtype=object), ())


def tree_names(tree) -> dict[str, Any]:
    """The leaves of a tree by their path, such as `layers/attention/query`."""
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
    """By name the fingerprint of each leaf, 16 hexadecimal digits."""
    return hexadecimal(start_fingerprints(leaves))


@jax.jit
def _sums(leaves):
    """One compiled function for a list of leaves of given shapes and shardings."""
    return [_sums_of_leaf(leaf) for leaf in leaves]


@jax.jit
def _sums_of_leaf(leaf):
    """Compiled with the others; a function of its own so that equal shapes are traced once."""
    words = _words(leaf)
    key, weight = (
        functools.reduce(jnp.add, [_axis_hash(words.shape, axis, seed) for axis in range(words.ndim)])
        for seed in SEEDS
    )
    mixed = _mix(words ^ key)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(mixed * (weight | 1), dtype=jnp.uint32)])


def _axis_hash(shape, axis, seed):
    """A hash of the index along one axis: products of the sizes, which may pass 2^32, appear nowhere."""
    index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(index + jnp.uint32((seed * (2 * axis + 1)) % 2**32))


def _mix(x):
    """The finaliser of MurmurHash3: one-to-one on 32-bit words, every bit reaches every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(leaf):
    """uint32 of the leaf's shape, with an axis of 2 more where elements have 8 bytes; a scalar is [1]."""
    leaf = jnp.atleast_1d(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)


def _words_on_host(array):
    """Elements of 8 bytes as two words: without `jax_enable_x64` they would lose half of themselves."""
    if array.dtype.itemsize != 8:
        return array
    array = np.ascontiguousarray(np.atleast_1d(array))
    return array[..., None].view(np.uint32)


def _host():
    """This process's CPU device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return jax.local_devices()[0]
