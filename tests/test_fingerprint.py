"""Fingerprints: the same on every sharding, another one after any flipped bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from a3_jax.checkpoints import fingerprint
from a3_jax.checkpoints.fingerprint import fingerprints, start_fingerprints

RNG = np.random.default_rng(0)
LEAVES = {
    "float32": RNG.normal(size=(8, 16, 3)).astype(np.float32),
    "bfloat16": RNG.normal(size=(16, 8)).astype(ml_dtypes.bfloat16),
    "float16": RNG.normal(size=(24,)).astype(np.float16),
    "float64": RNG.normal(size=(8, 2)),
    "int64": np.int64(-(2**40) + 3),
    "int32": RNG.integers(-(2**31), 2**31, (8, 8), dtype=np.int32),
    "int8": RNG.integers(-128, 128, (8, 5), dtype=np.int8),
    "bool": RNG.random((16,)) < 0.5,
    "scalar": np.float32(1.5),
    "empty": np.zeros((0, 3), np.float32),
    "number": 7,
}


def mix(x):
    x = np.asarray(x, np.uint64) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def index_hash(index, seed):
    """Of a tuple of indices, by plain integers."""
    terms = [int(mix((i + seed * (2 * axis + 1)) % 2**32)) for axis, i in enumerate(index)]
    return sum(terms) % 2**32


def oracle(leaf):
    """The formula of the module, word by word, in plain integers."""
    array = np.ascontiguousarray(np.atleast_1d(np.asarray(leaf)))
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[array.dtype.itemsize]
    words = array[..., None].view(np.uint32) if array.dtype.itemsize == 8 else array.view(kind)
    first = second = 0
    for index, word in np.ndenumerate(words):
        mixed = int(mix(int(word) ^ index_hash(index, 0x9E3779B9)))
        first, second = first + mixed, second + mixed * (index_hash(index, 0x7F4A7C15) | 1)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("name", LEAVES)
def test_against_plain_integers(name):
    leaf = LEAVES[name]
    assert fingerprints({name: leaf}) == {name: oracle(leaf)}
    if np.asarray(leaf).dtype.itemsize < 8:  # without x64 a device has no such type
        assert fingerprints({name: jnp.asarray(leaf)}) == {name: oracle(leaf)}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64", "int8", "int64"])
def test_every_flipped_bit_is_noticed(name):
    array = np.ascontiguousarray(np.atleast_1d(LEAVES[name]))
    bits = np.unpackbits(array.view(np.uint8).reshape(-1))
    flipped = np.packbits(bits ^ np.eye(len(bits), dtype=np.uint8), axis=1)
    variants = flipped.view(np.uint8).reshape(len(bits), *array.shape[:-1], -1).view(array.dtype)
    if array.dtype.itemsize == 8:
        array, variants = (x[..., None].view(np.uint32) for x in (array, variants))
    sums = np.asarray(jax.jit(jax.vmap(fingerprint._sums_of_leaf))(variants))
    right = np.asarray(fingerprint._sums([array])[0])
    assert len(sums) == len(bits)
    assert (sums != right).all()  # both sums, each


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[::-1],
        lambda x: x[:, ::-1],
        lambda x: np.where(np.isin(np.arange(16), [2, 9]), -x, x),  # pairs of top bits
        lambda x: np.where(np.arange(16) == 3, np.roll(x, 1, axis=0), x),
        lambda x: np.zeros_like(x),
    ],
)
def test_errors_that_cancel_in_a_plain_sum(change):
    array = RNG.normal(size=(8, 16)).astype(np.float32)
    before, after = fingerprints({"x": array}), fingerprints({"x": np.ascontiguousarray(change(array))})
    assert all(before["x"][half] != after["x"][half] for half in (slice(8), slice(8, 16)))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((1, 1), P()), ((2, 2), P("a", "b")), ((4, 1), P("a")), ((8, 1), P(None, "a")), ((2, 4), P(("a", "b"))),
     ((2, 4), P("b"))],
)  # fmt: skip
def test_the_same_on_every_sharding(shape, spec):
    """No device gets another one's part of the array: two numbers a leaf are added up."""
    array = LEAVES["int32"]
    mesh = jax.make_mesh(shape, ("a", "b"), devices=jax.devices()[: shape[0] * shape[1]])
    placed = jax.device_put(array, NamedSharding(mesh, spec))
    sums = start_fingerprints({"x": placed})
    assert fingerprint.hexadecimal(sums) == {"x": oracle(array)}
    assert sums["x"].is_fully_replicated
    text = fingerprint._sums.lower([placed]).compile().as_text()
    assert "gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    assert ("all-reduce" in text) == (not placed.is_fully_replicated)


def test_leaves_in_different_places_under_a_mesh():
    """One device, another one, a mesh, the host; while another mesh is in use."""
    array, devices = LEAVES["int32"], jax.devices()
    mesh = jax.make_mesh((8,), ("a",))
    leaves = {
        "first": jax.device_put(array, devices[0]),
        "other": jax.device_put(array, devices[5]),
        "mesh": jax.device_put(array, NamedSharding(mesh, P("a"))),
        "host": array,
    }
    with jax.set_mesh(mesh):
        assert set(fingerprints(leaves).values()) == {oracle(array)}
        assert list(fingerprints(leaves)) == list(leaves)


def test_compiled_once():
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P("a"))
    sizes = []
    for value in (1, 2):
        x = jax.device_put(np.full((12, 5), value, np.float32), sharding)
        fingerprints({"x": x, "y": np.full(7, value, np.float32)})
        sizes.append(fingerprint._sums._cache_size())
    assert sizes[0] == sizes[1]


def test_more_elements_than_32_bits_count():
    """Elements whose flat indices are equal modulo 2^32 have hashes of their own."""
    places = [(i, j) for i in (0, 2**16, 2**17) for j in (0, 1)]
    assert len({index_hash(place, 0x9E3779B9) for place in places}) == len(places)
    huge = jax.ShapeDtypeStruct((3 * 2**16, 2**16), jnp.bfloat16)
    assert jax.eval_shape(fingerprint._sums, [huge])[0].shape == (2,)


def test_arrays_may_be_donated_at_once():
    """The next step may write over an array whose sums are still being computed."""
    overwrite = jax.jit(lambda x: x * 0, donate_argnums=0)
    array = RNG.normal(size=(512, 1024)).astype(np.float32)
    right = fingerprints({"x": array})
    for _ in range(10):
        placed = jnp.array(array)
        sums = start_fingerprints({"x": placed})
        overwrite(placed)
        assert fingerprint.hexadecimal(sums) == right
