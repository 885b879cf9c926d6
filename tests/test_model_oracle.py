"""Both streams, packed and padded, against the dense float64 model written out from the method's text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.model.config import RopeScaling
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import REMAT_POLICIES, Rows, TwoStream, init_cache, run_rows
from tests import tiny
from tests.oracles import two_stream_logits

VARIANTS = {
    "standard": {},
    "release residual": {"residual": "release"},
    "tied": {"tie_embeddings": True},
    "one layer": {"num_layers": 1},
    "linear rotary": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3 rotary": {"rope_scaling": RopeScaling("llama3", 8.0, original_max_length=16)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_streams_equal_the_dense_model(variant):
    config = dataclasses.replace(tiny.CONFIG, **VARIANTS[variant])
    row = tiny.packed_row(np.random.default_rng(0), [7, 5], padding=2)
    tokens, positions, segments, ranks = row
    content, query = two_stream_logits(tiny.params(config), config, tokens, positions, ranks, None, segments)
    real = segments > 0
    for outputs, expected in (("content", content), ("query", query)):
        out = tiny.run(row, outputs, config=config)
        np.testing.assert_allclose(out[real], expected[real], atol=1e-4)


def test_the_two_residuals_are_two_models():
    row = tiny.packed_row(np.random.default_rng(1), [8])
    release = dataclasses.replace(tiny.CONFIG, residual="release")
    difference = tiny.run(row, config=release, weights=tiny.params()) - tiny.run(row)
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_both_outputs_at_once_and_every_remat_policy(remat):
    """Asking for both streams, or recomputing in the backward pass, changes no number."""
    tokens, positions = np.arange(6)[None], np.arange(6)[None]
    start, limit = np.zeros((1, 6), int), np.arange(6)[None]
    content = Rows(positions=positions, start=start, limit=limit + 1, tokens=tokens)
    query = Rows(positions=positions, start=start, limit=limit)
    both = run_rows(TwoStream(tiny.CONFIG, remat=remat), tiny.params(), content, query, outputs="both")
    plain = TwoStream(tiny.CONFIG)
    alone = run_rows(plain, tiny.params(), content, query).query
    np.testing.assert_allclose(both.query, alone, atol=1e-5)
    np.testing.assert_allclose(
        both.content, run_rows(plain, tiny.params(), content, outputs="content").content, atol=1e-5
    )


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_gradients_of_every_remat_policy_are_those_of_none(sizes):
    rng, config = np.random.default_rng(3), dataclasses.replace(tiny.CONFIG, vocab_size=24)
    tokens, positions = rng.integers(0, config.vocab_size, (4, 8)), np.tile(np.arange(8), (4, 1))
    start, limit = np.zeros((4, 8), int), positions // 2 * 2
    content = Rows(positions=positions, start=start, limit=limit + 2, tokens=tokens)
    query = Rows(positions=positions, start=start, limit=limit)

    def gradients(remat):
        def loss(params):
            out = run_rows(TwoStream(config, remat=remat), params, content, query)
            return jnp.sum(jnp.square(out.query))

        return jax.jit(jax.grad(loss))(params)

    params = jax.tree.map(np.asarray, tiny.params(config))
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        expected = gradients("none")
        for remat in REMAT_POLICIES.keys() - {"none"}:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), gradients(remat), expected
            )


def test_a_cache_filled_bit_by_bit_equals_one_pass():
    """Rows appended in three calls, padding rows among them, leave what one call leaves."""
    model, weights = TwoStream(tiny.CONFIG), tiny.params()
    tokens = np.random.default_rng(2).integers(0, tiny.CONFIG.vocab_size, 7)
    reading = np.arange(7)
    whole = Rows(
        positions=reading[None], start=np.zeros((1, 7), int), limit=reading[None] + 1, tokens=tokens[None]
    )
    expected = run_rows(model, weights, whole, outputs="content").content

    cache, parts = init_cache(tiny.CONFIG, batch=1, slots=9), []
    for first, last in ((0, 3), (3, 4), (4, 7)):
        places = np.r_[reading[first:last], 0]  # one padding row at the end: it sees nothing, so it stays out
        limit = np.r_[reading[first:last] + 1, 0]
        rows = Rows(
            positions=places[None], start=np.zeros((1, len(limit)), int), limit=limit[None],
            tokens=tokens[places][None],
        )  # fmt: skip
        out = run_rows(model, weights, rows, outputs="content", cache=cache)
        cache = out.cache
        parts.append(out.content[:, :-1])
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-5)
    assert cache.length.tolist() == [7]
