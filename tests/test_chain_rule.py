"""Invariant 5: what a decoding strategy reports is the one-pass log-probability of what it wrote.

For every strategy with commit "chain", the reported log-probabilities are those of the finished tokens
under their `commit_rank`: by `score`, and by the dense float64 model. For "flat" they are the sum of its
own steps' conditionals, and `exact` is false.
"""

import numpy as np
import pytest

from a3_jax.decoding import generate, score
from tests import oracles
from tests.tiny_checkpoint import blanks, tiny_checkpoint

STRATEGIES = {
    "groups in random order": {"order": "random", "group_size": 2, "temperature": 1.0, "top_k": 5},
    "left to right, context too": {"context": "l2r", "group_size": 2, "temperature": 1.0, "top_k": 5},
    "best first": {"strategy": "dynamic", "step_size": 2, "criterion": "margin"},
    "any first": {
        "strategy": "dynamic", "criterion": "random", "temperature": 0.7, "top_p": 0.9, "context": "l2r",
    },
    "as many as the entropy allows": {"strategy": "dynamic", "entropy_bound": 1.0, "temperature": 1.0},
    "blocks": {"order": "block", "block_size": 3, "group_size": 2, "temperature": 1.0},
    "spread": {"order": "spread", "group_size": 4, "temperature": 1.0},
    "speculative": {"strategy": "speculative", "window": 3, "order": "random", "temperature": 1.0},
    "speculative, filtered": {
        "strategy": "speculative", "window": 4, "order": "spread", "temperature": 0.7, "top_p": 0.9,
    },
}  # fmt: skip


def make_items(with_ranks=False):
    """Prompts of several lengths, one of them nothing but blanks, one without any."""
    rng = np.random.default_rng(0)
    items = [{"tokens": blanks(rng, length)} for length in (5, 14)]
    items += [{"tokens": [None] * 7}, {"tokens": [1, 2, 3]}]
    if with_ranks:
        for item in items:
            item["ranks"] = rng.integers(-2, 3, len(item["tokens"])).tolist()
    return items


def check(results, items, **score_options):
    checkpoint = tiny_checkpoint()
    for item, result in zip(items, results, strict=True):
        blank = [token is None for token in item["tokens"]]
        line = {"tokens": result["tokens"], "ranks": result["commit_rank"], "scored": [int(b) for b in blank]}
        scored = score(checkpoint, [line], **score_options)[0]
        assert result["exact"] is True
        assert [token for token, b in zip(result["tokens"], blank) if not b] == [
            t for t in item["tokens"] if t is not None
        ]
        assert [value is None for value in result["logprobs"]] == [not b for b in blank]
        assert result["logprob"] == pytest.approx(scored["logprob"], abs=1e-4)
        yield np.array(result["logprobs"], float)[blank], result, blank


@pytest.mark.parametrize("name", STRATEGIES)
def test_reported_is_the_one_pass_score(name):
    items, checkpoint = make_items(), tiny_checkpoint()
    results = generate(checkpoint, items, **STRATEGIES[name])
    for reported, result, blank in check(results, items):
        dense = oracles.any_order_logprobs(
            checkpoint.params, checkpoint.config, result["tokens"], result["commit_rank"]
        )
        np.testing.assert_allclose(reported, dense[blank], atol=1e-4)


def test_given_ranks_are_followed():
    """The blanks' groups are those of the input's ranks, after the given tokens."""
    items = make_items(with_ranks=True)
    results = generate(tiny_checkpoint(), items, temperature=1.0, group_size=1)
    for (_, result, blank), item in zip(check(results, items), items, strict=True):
        wanted = np.array(item["ranks"])[blank]
        used = np.array(result["commit_rank"])
        assert np.array_equal(
            np.unique(wanted, return_inverse=True)[1], used[blank] - used[blank].min(initial=99)
        )
        assert result["forwards"] == len(set(wanted.tolist()))
        assert (used[~np.array(blank)] == 0).all()


def test_left_to_right_model():
    """`model="ar"`: the reported value is that of the plain left-to-right model on the finished tokens."""
    items = [item for item in make_items() if item["tokens"][0] is not None]
    checkpoint = tiny_checkpoint()
    results = generate(checkpoint, items, model="ar", temperature=1.0)
    for reported, result, blank in check(results, items, model="ar"):
        dense = oracles.left_logprobs(checkpoint.params, checkpoint.config, result["tokens"])
        np.testing.assert_allclose(reported, dense[blank], atol=1e-4)
        assert result["forwards"] == sum(blank)
        assert np.array(result["commit_rank"])[blank].tolist() == list(range(1, sum(blank) + 1))


def test_flat_is_not_exact():
    """Each step sees all tokens so far as one group: no single pass has that distribution."""
    items, checkpoint = make_items()[:2], tiny_checkpoint()
    results = generate(checkpoint, items, commit="flat", group_size=2)
    for item, result in zip(items, results, strict=True):
        tokens, logprobs = oracles.greedy_groupwise(
            checkpoint.params, checkpoint.config, item["tokens"], result["commit_rank"], flat=True
        )
        assert result["exact"] is False
        assert result["tokens"] == tokens
        expected = sum(value for value in logprobs if value is not None)
        assert result["logprob"] == pytest.approx(expected, abs=1e-4)
    one_pass = score(checkpoint, [{"tokens": r["tokens"], "ranks": r["commit_rank"]} for r in results])
    assert any(
        abs(sum(v for v, own in zip(s["logprobs"], r["logprobs"]) if own is not None) - r["logprob"]) > 1e-3
        for s, r in zip(one_pass, results, strict=True)
    )
