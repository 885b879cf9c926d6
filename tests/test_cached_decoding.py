"""Invariant 6: cached decoding equals decoding without a cache, with the same random bits; and both equal
a Python loop over the dense float64 model."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest

from a3_jax.decoding import generate
from a3_jax.decoding.batched_decode import DecodeRequest, first_state, make_decode_spec
from a3_jax.decoding.loop import decode, lay_out
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import param_shardings
from tests import oracles, tiny
from tests.tiny_checkpoint import blanks, tiny_checkpoint


def items(lengths=(4, 9, 13)):
    rng = np.random.default_rng(5)
    return [{"tokens": blanks(rng, length)} for length in lengths] + [{"tokens": [None] * 6}]


@pytest.mark.parametrize(
    "options",
    [
        {"order": "random", "group_size": 2, "temperature": 1.0, "top_k": 5},
        {"strategy": "dynamic", "criterion": "random", "temperature": 0.7, "top_p": 0.9, "context": "l2r"},
        {"strategy": "dynamic", "entropy_bound": 1.0, "max_commit": 4, "temperature": 1.0, "min_gap": 2},
        {"strategy": "dynamic", "threshold": 0.2, "order": "block", "block_size": 4},
        {"order": "spread", "group_size": 3, "temperature": 1.0},
        {"order": "block", "block_size": 5, "block_order": "spread", "temperature": 1.0},
        {"strategy": "speculative", "window": 3, "order": "random", "temperature": 1.0},
        {"strategy": "speculative", "window": 5, "order": "spread", "temperature": 0.8, "top_k": 9},
        {"strategy": "speculative", "window": 4, "entropy_bound": 2.0, "temperature": 1.0, "context": "l2r"},
        {"strategy": "speculative", "window": 2, "order": "block", "block_size": 4},
    ],
    ids=[
        "groupwise",
        "dynamic",
        "entropy bound",
        "threshold in blocks",
        "spread",
        "blocks",
        "speculative",
        "speculative, filtered",
        "speculative, bounded",
        "speculative, greedy in blocks",
    ],
)
def test_cached_equals_recomputed(options):
    """One batch through both forwards of the same loop."""
    checkpoint, options = tiny_checkpoint(), GenerateOptions(**options)
    # With no token given, or one, all candidates tie but for rounding.
    prompts = items()[:3] if options.threshold else items()
    requests = blank_requests(item_lines(prompts), checkpoint, options)
    tasks = [DecodeRequest(request, 0, options.context or "flat", options) for request in requests]
    state = first_state(tasks, 16, 4, options.seed)
    shape = tuple(map(max, *(task.shape for task in tasks)))
    spec = make_decode_spec(checkpoint.config, options, None, shape)
    cached = decode(checkpoint.params, state, spec=spec)
    recomputed = decode(checkpoint.params, state, spec=dataclasses.replace(spec, cached=False))
    for field in ("tokens", "commit_rank", "forwards", "filled"):
        np.testing.assert_array_equal(getattr(cached, field), getattr(recomputed, field), err_msg=field)
    np.testing.assert_allclose(cached.logprob, recomputed.logprob, atol=2e-5)
    assert np.array_equal(cached.filled, cached.present)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options", [{"order": "random", "group_size": 2, "temperature": 1.0}, {"model": "ar"}]
)
def test_the_layout_for_few_rows_changes_nothing(options, tied):
    """What CPUs decode with, and what accelerators do."""
    checkpoint = tiny_checkpoint(dataclasses.replace(tiny.CONFIG, tie_embeddings=tied))
    options = GenerateOptions(**options)
    requests = blank_requests(item_lines(items()[:3]), checkpoint, options)
    tasks = [DecodeRequest(request, 0, "flat", options) for request in requests]
    shape = tuple(map(max, *(task.shape for task in tasks)))
    state = first_state(tasks, shape[0], 4, options.seed)
    spec = make_decode_spec(checkpoint.config, options, None, shape)
    laid_out = lay_out(checkpoint.params, checkpoint.config)
    assert laid_out["last_layer"]["o"].shape == tuple(np.roll(checkpoint.params["last_layer"]["o"].shape, 1))
    first, second = (decode(params, state, spec=spec) for params in (checkpoint.params, laid_out))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_allclose(first.logprob, second.logprob, atol=2e-5)


def test_greedy_groups_against_a_python_loop():
    checkpoint = tiny_checkpoint()
    results = generate(checkpoint, items(), order="random", group_size=2)
    for item, result in zip(items(), results, strict=True):
        tokens, logprobs = oracles.greedy_groupwise(
            checkpoint.params, checkpoint.config, item["tokens"], result["commit_rank"]
        )
        assert result["tokens"] == tokens
        close(result["logprobs"], logprobs)
        assert result["forwards"] == -(-item["tokens"].count(None) // 2), "K groups cost K forwards"


@pytest.mark.parametrize(
    ("criterion", "step_size", "commit", "score"),
    [
        ("confidence", 1, "chain", lambda law: law.max()),
        ("entropy", 2, "flat", lambda law: (np.exp(law) * law).sum()),
        ("margin", 2, "chain", lambda law: np.exp(np.sort(law)[-1]) - np.exp(np.sort(law)[-2])),
    ],
)
def test_best_first_against_a_python_loop(criterion, step_size, commit, score):
    checkpoint = tiny_checkpoint()
    options = {"strategy": "dynamic", "criterion": criterion, "step_size": step_size, "commit": commit}
    prompts = items()[:3]  # with no token given, or equal ones only, all candidates tie but for rounding
    for item, result in zip(prompts, generate(checkpoint, prompts, **options), strict=True):
        tokens, logprobs, ranks = oracles.greedy_dynamic(
            checkpoint.params, checkpoint.config, item["tokens"], score, step_size, flat=commit == "flat"
        )
        assert result["tokens"] == tokens
        assert result["commit_rank"] == ranks
        close(result["logprobs"], logprobs)


def test_from_the_left_against_a_python_loop():
    checkpoint, prompts = tiny_checkpoint(), items()[:3]
    for item, result in zip(prompts, generate(checkpoint, prompts, model="ar"), strict=True):
        tokens, logprobs = oracles.greedy_left(checkpoint.params, checkpoint.config, item["tokens"])
        assert result["tokens"] == tokens
        close(result["logprobs"], logprobs)


def close(logprobs, expected):
    assert [value is None for value in logprobs] == [value is None for value in expected]
    np.testing.assert_allclose(np.array(logprobs, float), np.array(expected, float), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "random", "group_size": 2, "temperature": 1.0},
        {"strategy": "dynamic", "threshold": 0.3},
        {"strategy": "speculative", "window": 3, "temperature": 1.0},
        {"model": "ar"},
    ],
    ids=["groupwise", "dynamic", "speculative", "left to right"],
)
def test_new_prompts_of_a_known_bucket_compile_nothing(options):
    checkpoint, rng = tiny_checkpoint(), np.random.default_rng(7)
    generate(checkpoint, [{"tokens": [1, 2, *[None] * 9]}], **options)
    before = decode._cache_size()
    for length in (8, 10, 14):
        tokens = [*rng.integers(0, 20, 2).tolist(), *[None] * length]
        generate(checkpoint, [{"tokens": tokens}], **options)
    assert decode._cache_size() == before


@pytest.mark.parametrize("strategy", ["groupwise", "dynamic", "speculative"])
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 1, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}])
def test_a_mesh_changes_nothing(strategy, sizes):
    checkpoint = tiny_checkpoint(dataclasses.replace(tiny.CONFIG, vocab_size=24))
    rng, mesh = np.random.default_rng(8), make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    params = jax.device_put(checkpoint.params, param_shardings(mesh, checkpoint.config))
    sharded = types.SimpleNamespace(**{**vars(checkpoint), "params": params})
    prompts = [{"tokens": blanks(rng, length)} for length in (7, 12, 9, 14)]
    options = {"strategy": strategy, "order": "random", "temperature": 1.0}
    expected = generate(checkpoint, prompts, **options)
    for result, alone in zip(generate(sharded, prompts, **options), expected, strict=True):
        assert result["tokens"] == alone["tokens"]
        assert result["forwards"] == alone["forwards"]
        close(result["logprobs"], alone["logprobs"])
