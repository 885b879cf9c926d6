"""The embedding lookup on a mesh is the lookup: rows, gradients, and no whole table anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.model.layers import embed
from a3_jax.model.sharding import make_mesh, partition_spec

V, D, B, T = 24, 8, 8, 5


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (8, 1, 1), (1, 1, 8), (1, 4, 2)])
def test_a_mesh_changes_nothing(sizes):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    weight = rng.normal(size=(B, T, D)).astype(np.float32)
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, np.cos(table[tokens]) * weight)

    def total(table, tokens):
        x = embed(table, tokens, jnp.float32)
        return jnp.sum(jnp.sin(x) * weight), x

    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    placed = [
        jax.device_put(array, jax.NamedSharding(mesh, partition_spec(axes)))
        for array, axes in ((table, ("vocab", "embed")), (tokens, ("batch", "length")))
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(total, has_aux=True)).lower(*placed).compile()
        gradient, x = compiled(*placed)
    np.testing.assert_array_equal(x, table[tokens])
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert sizes[1] * sizes[2] == 1 or f"f32[{V},{D}]" not in compiled.as_text()


def test_gradients_are_summed_in_the_tables_precision():
    """1,000 gradients of 1/1000 on one token: in bfloat16 the sum would stop at about a half."""
    tokens = jnp.zeros((1, 1000), jnp.int32)
    gradient = jax.grad(lambda t: jnp.sum(embed(t, tokens, jnp.bfloat16).astype(jnp.float32)) / 1000)
    np.testing.assert_allclose(gradient(jnp.ones((2, 1)))[0], 1.0, rtol=1e-2)
