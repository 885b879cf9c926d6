"""The laws of the two streams and of the cache hold in every family, and its costs are counted."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from a3_jax.decoding.batched_decode import DecodeRequest, first_state, make_decode_spec
from a3_jax.decoding.loop import decode, lay_out
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.model import flops
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import Rows, TwoStream, abstract_params, param_shardings, run_rows
from tests import test_flops, tiny
from tests.tiny_checkpoint import blanks, tiny_checkpoint
from tests.tiny_families import FAMILIES, WINDOW, model_config

every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_changing_a_token_changes_only_later_ranks(name):
    """Invariant 2: exactly zero where the law says zero; a change at every row where there may be one."""
    config = model_config(name)
    weights = tiny.params(config)
    row = tiny.packed_row(np.random.default_rng(0), [9, 5], padding=2, group_size=2)
    tokens, _, segments, ranks = row
    changed = np.arange(len(tokens))
    others = np.repeat(tokens[None], len(tokens), axis=0)
    others[changed, changed] = (tokens + 1) % tiny.CONFIG.vocab_size
    batch = [np.repeat(array[None], len(tokens), axis=0) for array in row]
    before = tiny.run(batch, weights=weights, config=config)
    after = tiny.run([others, *batch[1:]], weights=weights, config=config)
    difference = np.abs(after - before).max(axis=-1)  # [changed, row]
    may_change = (segments == segments[:, None]) & (ranks > ranks[:, None]) & (segments[:, None] > 0)
    assert np.all(difference[~may_change] == 0)
    assert np.all(difference[may_change] > 1e-6)


@pytest.mark.parametrize("options", [
    {"order": "random", "group_size": 2, "temperature": 1.0},
    {"strategy": "speculative", "window": 3, "order": "spread", "temperature": 1.0},
], ids=["groupwise", "speculative"])  # fmt: skip
@every_family
def test_cached_equals_recomputed(name, options):
    """Invariant 6, as CPUs decode (weights laid out for few rows) and without either cache or layout."""
    checkpoint, options = tiny_checkpoint(model_config(name)), GenerateOptions(**options)
    rng = np.random.default_rng(5)
    items = [{"tokens": blanks(rng, length)} for length in (4, 9, WINDOW)]
    requests = blank_requests(item_lines(items), checkpoint, options)
    tasks = [DecodeRequest(request, 0, "flat", options) for request in requests]
    shape = tuple(map(max, *(task.shape for task in tasks)))
    state = first_state(tasks, shape[0], 4, options.seed)
    spec = make_decode_spec(checkpoint.config, options, None, shape)
    cached = decode(lay_out(checkpoint.params, checkpoint.config), state, spec=spec)
    recomputed = decode(checkpoint.params, state, spec=dataclasses.replace(spec, cached=False))
    np.testing.assert_array_equal(cached.tokens, recomputed.tokens)
    np.testing.assert_allclose(cached.logprob, recomputed.logprob, atol=2e-5)
    assert np.array_equal(cached.filled, cached.present)


def test_every_attention_gives_the_same():
    """Softcap, windows and scale reach each implementation, the TPU kernel (interpreted) among them."""
    config, length = model_config("gemma2", num_hidden_layers=2), 40
    positions = np.arange(length, dtype=np.int32)[None]
    tokens = np.random.default_rng(1).integers(0, 61, (1, length)).astype(np.int32)
    rows = Rows(positions=positions, start=0 * positions, limit=positions + 1, tokens=tokens)

    def run(implementation):
        model = TwoStream(config, attention=implementation, precision=jax.lax.Precision.HIGHEST)
        return run_rows(model, tiny.params(config), rows, outputs="content").content

    expected = run("dense")
    for implementation in ("chunked", "splash"):
        np.testing.assert_allclose(run(implementation), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["olmo2", "gemma3", "gpt2"])
def test_a_mesh_changes_nothing(name):
    """Every parameter has axes that can be split: by width, by heads, by the vocabulary."""
    config = model_config(name, vocab_size=64)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    batch = [np.repeat(array[None], 2, axis=0) for array in tiny.packed_row(np.random.default_rng(2), [8, 4])]
    expected = tiny.run(batch, config=config)
    with jax.set_mesh(mesh):
        weights = jax.device_put(tiny.params(config), param_shardings(mesh, config))
        found = tiny.run(batch, weights=weights, config=config)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@every_family
def test_costs_are_counted(name):
    """FLOPs are those of the traced products, numbers those of the parameter tree."""
    config = model_config(name)
    found = sum(count for count, _, _ in test_flops.traced(test_flops.forward(config), config))
    assert test_flops.dense_flops(config).total == found
    leaves = jax.tree.leaves(abstract_params(config))
    assert flops.parameter_count(config) == sum(math.prod(leaf.shape) for leaf in leaves)
