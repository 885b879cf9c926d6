"""Invariant 9: over every value of a subset A, `exp(score(A | B))` adds up to 1."""

import itertools

import numpy as np
import pytest

from a3_jax.decoding import score
from a3_jax.model.config import ModelConfig
from tests.tiny_checkpoint import tiny_checkpoint

VOCABULARY = 5
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=48,
    max_length=64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "what"),
    [
        ([0, 3, 0, 1, 1, 0], "one token, then two together"),
        ([0, 1, 1, 3, 2, 0], "each by itself; B in two groups"),
        ([1, 0, 1, 0, 0, 1], "A first, given nothing"),
    ],
)
def test_all_values_of_a_subset_add_up_to_one(ranks, what):
    """A = columns 1, 3 and 4, all 125 values of it; the others are given and not scored."""
    subset = [1, 3, 4]
    items = []
    for values in itertools.product(range(VOCABULARY), repeat=3):
        tokens = np.array([4, 0, 2, 0, 0, 1])
        tokens[subset] = values
        scored = [int(column in subset) for column in range(6)]
        items.append({"tokens": tokens.tolist(), "ranks": ranks, "scored": scored})
    results = score(tiny_checkpoint(CONFIG), items)
    logprobs = np.array([result["logprob"] for result in results])
    assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-5), what
    assert logprobs.std() > 0.1, "a model that ignores its tokens would pass too"


def test_the_left_to_right_model_too():
    """The last two tokens of four, given the first two."""
    items = [
        {"tokens": [4, 2, *values], "context": 2} for values in itertools.product(range(VOCABULARY), repeat=2)
    ]
    results = score(tiny_checkpoint(CONFIG), items, model="ar")
    assert np.exp([result["logprob"] for result in results]).sum() == pytest.approx(1.0, abs=1e-5)
