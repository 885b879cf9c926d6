"""A tiny model and random packed rows, for the tests of the invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import Rows, TwoStream, abstract_params, logits
from a3_jax.ordering import intervals

CONFIG = ModelConfig(
    vocab_size=23, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=48,
    max_length=64,
)  # fmt: skip


@functools.cache
def params(config=CONFIG, seed=0):
    """Random weights by NumPy: norms and the query vector are away from their initial values too."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape) * fan_in**-0.5 + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(draw, abstract_params(config))


def packed_row(rng, lengths, padding=0, group_size=2):
    """An unsorted row of documents of these lengths: tokens, positions, segment_ids, ranks, [T] int32."""
    tokens = rng.integers(0, CONFIG.vocab_size, sum(lengths) + padding)
    positions = np.concatenate([np.arange(length) for length in lengths] + [np.zeros(padding, int)])
    segments = np.concatenate(
        [np.full(length, i + 1) for i, length in enumerate(lengths)] + [np.zeros(padding, int)]
    )
    ranks = np.concatenate(
        [rng.permutation(length) // group_size for length in lengths] + [np.zeros(padding, int)]
    )
    return tuple(array.astype(np.int32) for array in (tokens, positions, segments, ranks))


@functools.partial(jax.jit, static_argnames=("config", "outputs"))
def forward(weights, tokens, positions, segment_ids, ranks, config=CONFIG, outputs="query"):
    """Logits [B, T, V] of unsorted rows [B, T], in the order given: sort, bounds, model, unsort."""
    order = intervals.sort_order(ranks, segment_ids)
    tokens, positions, segment_ids, ranks = intervals.take_rows(order, tokens, positions, segment_ids, ranks)
    start, content_limit, query_limit = intervals.bounds(ranks, ranks, segment_ids)
    content = Rows(positions=positions, start=start, limit=content_limit, tokens=tokens)
    query = Rows(positions=positions, start=start, limit=query_limit)
    model = TwoStream(config, precision=jax.lax.Precision.HIGHEST)
    out = model.apply({"params": weights}, content, query, outputs=outputs)
    hidden = out.query if outputs == "query" else out.content
    return intervals.unsort(order, logits(weights, config, hidden, jax.lax.Precision.HIGHEST))


def run(row, outputs="query", weights=None, config=CONFIG):
    """Logits [T, V] (NumPy) of one row, or [B, T, V] of a batch."""
    batch = [jnp.atleast_2d(jnp.asarray(array)) for array in row]
    out = np.asarray(
        forward(params(config) if weights is None else weights, *batch, config=config, outputs=outputs)
    )
    return out[0] if np.ndim(row[0]) == 1 else out
