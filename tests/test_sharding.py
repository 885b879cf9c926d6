"""Invariant 7: the same numbers on one device and on every mesh, and every axis has its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.model import sharding
from a3_jax.model.two_stream import abstract_params, logical_axes, param_shardings
from tests import tiny

MESHES = [
    {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": -1, "tensor": 2},
]  # fmt: skip


def batch(rows=8):
    rng = np.random.default_rng(0)
    drawn = [tiny.packed_row(rng, [5, 6], padding=1) for _ in range(rows)]
    return tuple(np.stack(arrays) for arrays in zip(*drawn, strict=True))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(sizes):
    mesh = sharding.make_mesh(sizes)
    rows, weights = batch(), tiny.params(EVEN)
    expected = tiny.run(rows, weights=weights, config=EVEN)
    placed = jax.device_put(weights, param_shardings(mesh, EVEN))
    data = [jax.device_put(array, sharding.batch_sharding(mesh)) for array in rows]
    with jax.set_mesh(mesh):
        out = tiny.forward(placed, *data, config=EVEN)
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-5)
    if mesh.shape["tensor"] > 1:
        assert placed["layers"]["gate"].addressable_shards[0].data.size < weights["layers"]["gate"].size


EVEN = tiny.ModelConfig(**{**tiny.CONFIG.to_dict(), "vocab_size": 24})


def test_every_parameter_names_all_its_axes():
    axes, shapes = logical_axes(tiny.CONFIG), abstract_params(tiny.CONFIG)
    flat_axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    flat_shapes = jax.tree.leaves(shapes)
    assert len(flat_axes) == len(flat_shapes)
    for names, leaf in zip(flat_axes, flat_shapes, strict=True):
        assert len(names) == leaf.ndim
        sharding.partition_spec(names)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="logical axis 'experts' has no sharding rule"):
        sharding.partition_spec(("embed", "experts"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "does not match 8 devices"),
        ({"fdsp": 8}, "unknown axis 'fdsp'"),
        ({"data": -1, "fsdp": -1}, "sizes are positive, but for one -1"),
    ],
)
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(sizes)


def test_a_size_that_cannot_be_split_is_named():
    mesh = sharding.make_mesh({"tensor": 8})
    with pytest.raises(InputError, match=r"axis (vocab|heads|kv_heads) of size \d+ can't be split in 8"):
        param_shardings(mesh, tiny.CONFIG)


def test_bounds_are_computed_where_the_rows_are():
    """The group-mask computation is sharded with the batch: no collective in its program."""
    from a3_jax.ordering import intervals

    mesh = sharding.make_mesh({"data": 8})
    rows = jax.device_put(jnp.zeros((8, 16), jnp.int32), sharding.batch_sharding(mesh))
    text = jax.jit(intervals.bounds).lower(rows, rows, rows).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
