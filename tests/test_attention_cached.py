"""Attention over a cache is dense attention over its filled slots, whatever lies behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.model.attention import AttentionArgs, dense_attention
from a3_jax.model.attention_cached import append, cached_attention

LAYERS, B, N, K, H = 3, 2, 4, 2, 8


def cache(rng, slots):
    return (jnp.asarray(rng.normal(size=(LAYERS, B, K, slots, H)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("slots", [5, 256, 300, 700])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_dense(slots, softcap):
    """Whole and part blocks of keys, rows that see nothing, intervals that begin late; garbage unread."""
    rng = np.random.default_rng(slots)
    keys, values = cache(rng, slots)
    query = jnp.asarray(rng.normal(size=(B, 6, N, H)), jnp.float32)
    filled = slots - slots // 4
    start, limit = np.sort(rng.integers(0, filled + 1, (2, B, 6)), axis=0).astype(np.int32)
    start[:, 0], limit[:, 0] = 3, 3
    start[:, 1], limit[:, 1] = 0, filled
    garbage = keys.at[..., filled:, :].set(jnp.inf), values.at[..., filled:, :].set(0.0)
    for layer in (0, LAYERS - 1):
        dense = dense_attention(
            query, keys[layer].swapaxes(1, 2), values[layer].swapaxes(1, 2), start, limit,
            AttentionArgs(0.3, softcap),
        )  # fmt: skip
        found = jax.jit(cached_attention, static_argnames="args")(
            query, *garbage, layer, start, limit, args=AttentionArgs(0.3, softcap)
        )
        np.testing.assert_allclose(found, dense, atol=1e-5)
        assert not np.asarray(found)[:, 0].any()


def test_what_is_appended_stands_behind_each_examples_length():
    rng = np.random.default_rng(0)
    keys, _ = cache(rng, 9)
    new = jnp.asarray(rng.normal(size=(B, 3, K, H)), jnp.float32)
    found = np.asarray(append(keys, new, 1, jnp.array([2, 6])))
    expected = np.array(keys)
    for example, length in ((0, 2), (1, 6)):
        expected[1, example, :, length : length + 3] = np.asarray(new[example]).swapaxes(0, 1)
    np.testing.assert_array_equal(found, expected)


def test_no_copy_of_the_cache_in_the_decoding_loop():
    """Three layers' writes and reads in a loop set aside less than one cache beside the one carried."""
    slots = 2048
    shape = jax.ShapeDtypeStruct((LAYERS, B, K, slots, H), jnp.float32)
    new = jax.ShapeDtypeStruct((B, 2, K, H), jnp.float32)

    def loop(keys, new):
        def step(i, carry):
            keys, out = carry
            length = jnp.full(B, i)
            for layer in range(LAYERS):
                keys = append(keys, new + out[:, :, :K], layer, length)
                limit = jnp.full((B, 2), i + 1)
                query = jnp.repeat(new, 2, axis=2)
                out = cached_attention(query, keys, keys, layer, limit * 0, limit, AttentionArgs(1.0))
            return keys, out

        return jax.lax.fori_loop(0, 100, step, (keys, jnp.zeros((B, 2, N, H))))

    compiled = jax.jit(loop, donate_argnums=0).lower(shape, new).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < LAYERS * B * K * slots * H * 4
