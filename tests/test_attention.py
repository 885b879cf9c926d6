"""Attention over intervals: dense and chunked against softmax written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.model import attention_chunked as module
from a3_jax.model import sharding
from a3_jax.model.attention import (
    IMPLEMENTATIONS,
    AttentionArgs,
    attention,
    chunked_attention,
    dense_attention,
)  # fmt: skip


def loop_attention(query, key, value, start, limit, scale, softcap=None):
    """Row by row and head by head, in float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    group = query.shape[2] // key.shape[2]
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(query.shape[:3]):
        visible = slice(int(start[b, t]), int(limit[b, t]))
        if visible.start >= visible.stop:
            continue
        scores = scale * key[b, visible, n // group] @ query[b, t, n]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, visible, n // group]
    return out


def example(rng, batch=2, rows=19, keys=23, heads=4, kv_heads=2, size=8):
    query, key, value = (
        rng.normal(size=shape).astype(np.float32)
        for shape in [
            (batch, rows, heads, size),
            (batch, keys, kv_heads, size),
            (batch, keys, kv_heads, size),
        ]
    )
    start = rng.integers(0, keys, (batch, rows)).astype(np.int32)
    limit = np.minimum(keys, start + rng.integers(0, keys, (batch, rows))).astype(np.int32)
    return query, key, value, start, limit


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("implementation", [dense_attention, chunked_attention])
def test_equals_the_loop(implementation, softcap, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "KEYS", 8)  # several blocks, the last one ragged
    arrays = example(np.random.default_rng(0))
    out = implementation(*arrays, AttentionArgs(0.3, softcap))
    np.testing.assert_allclose(out, loop_attention(*arrays, scale=0.3, softcap=softcap), atol=2e-6)


def test_chunked_gradients_equal_dense(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "KEYS", 8)
    query, key, value, start, limit = example(np.random.default_rng(1))
    weight = np.random.default_rng(2).normal(size=query.shape)

    def total(implementation, q, k, v):
        return jnp.sum(weight * implementation(q, k, v, start, limit, AttentionArgs(0.3)))

    for dense, chunked in zip(
        jax.grad(lambda *a: total(dense_attention, *a), argnums=(0, 1, 2))(query, key, value),
        jax.grad(lambda *a: total(chunked_attention, *a), argnums=(0, 1, 2))(query, key, value),
        strict=True,
    ):
        np.testing.assert_allclose(chunked, dense, atol=5e-6)
        assert np.abs(dense).max() > 0.01


def test_blocks_that_no_row_sees_are_not_touched(monkeypatch):
    """NaN in keys and values there would reach every product of theirs, and so every gradient."""
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "KEYS", 8)
    rng = np.random.default_rng(6)
    query, key, value, _, _ = example(rng, rows=16, keys=40)
    first = np.repeat(np.array([[8, 24], [16, 24]]), 8, axis=1)  # of two row blocks of two examples
    start, limit = (first + rng.integers(low, low + 4, first.shape) for low in (0, 4))
    unseen = np.zeros(40, bool)
    unseen[:8], unseen[32:] = True, True
    poisoned_key, poisoned_value = (np.where(unseen[:, None, None], np.nan, array) for array in (key, value))

    def total(key, value):
        return jnp.sum(chunked_attention(query, key, value, start, limit, AttentionArgs(0.3)) ** 2)

    gradients = jax.grad(total, argnums=(0, 1))(poisoned_key, poisoned_value)
    for got, expected in zip(gradients, jax.grad(total, argnums=(0, 1))(key, value), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert not np.any(np.asarray(got)[:, unseen]) and np.all(np.abs(got[:, 24:28]).max((0, 2, 3)) > 0)


@pytest.mark.parametrize("implementation", ["chunked", "dense"])
def test_a_mesh_changes_nothing(implementation, monkeypatch):
    """Each device attends to its own examples and heads: equal numbers, and nothing travels."""
    monkeypatch.setattr(module, "ROWS", 8)
    given = example(np.random.default_rng(7), batch=4)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def both(query, key, value, start, limit):
        def total(*arrays):
            out = attention(*arrays, start, limit, AttentionArgs(0.3), implementation=implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    expected = jax.jit(both)(*given)
    placed = [
        jax.device_put(array, jax.NamedSharding(mesh, sharding.partition_spec(axes[: array.ndim])))
        for array, axes in zip(given, [("batch", "length", "heads", "head_size")] * 5, strict=True)
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(both).lower(*placed).compile()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), compiled(*placed), expected)
    assert not any(f" {name}(" in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all"))


def test_implementations_have_names():
    given = example(np.random.default_rng(8))
    results = [
        attention(*given, AttentionArgs(0.3), implementation=name)
        for name in IMPLEMENTATIONS
        if name != "splash"
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=2e-6)
    with pytest.raises(ValueError, match="implementation='flash', known: auto, splash, chunked, dense"):
        attention(*given, AttentionArgs(0.3), implementation="flash")


@pytest.mark.parametrize("implementation", [dense_attention, chunked_attention])
def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient(implementation):
    """Exactly zero, and finite gradients, even where the masked scores are huge."""
    query, key, value, start, limit = example(np.random.default_rng(3))
    limit = np.where(np.arange(limit.shape[1]) % 2 == 0, start, limit)
    empty = start >= limit
    query = query * 1e4

    out = implementation(query, key, value, start, limit, AttentionArgs(1.0))
    assert np.all(np.asarray(out)[empty] == 0)
    gradient = jax.grad(lambda q: jnp.sum(implementation(q, key, value, start, limit, AttentionArgs(1.0))))(
        query
    )
    assert np.all(np.isfinite(gradient)) and np.all(np.asarray(gradient)[empty] == 0)


def test_memory_grows_linearly_with_length():
    """No intermediate of T x S elements: the largest value of the traced program is a block's scores."""

    def largest(length):
        shapes = [(1, length, 2, 4), (1, length, 1, 4), (1, length, 1, 4), (1, length), (1, length)]
        kinds = [jnp.float32] * 3 + [jnp.int32] * 2
        arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, kinds)]
        step = jax.grad(lambda *a: jnp.sum(attention(*a, AttentionArgs(1.0))), argnums=(0, 1, 2))
        return max(_sizes(jax.make_jaxpr(step)(*arguments).jaxpr))

    assert largest(8192) <= 2.2 * largest(4096)


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for parameter in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)


def test_shapes_that_do_not_fit_are_named():
    query, key, value, start, limit = example(np.random.default_rng(4))
    with pytest.raises(ValueError, match=r"start has shape \(2, 18\), expected \[B, T\] = \(2, 19\)"):
        attention(query, key, value, start[:, 1:], limit, AttentionArgs(1.0))
    with pytest.raises(ValueError, match="does not fit key"):
        attention(query, key[:, :, :, :4], value[:, :, :, :4], start, limit, AttentionArgs(1.0))
