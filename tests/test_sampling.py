"""Draws and filters: by hand, and by counting against the distribution they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.decoding.sampling import Sampling, candidate_score, draw, filtered_logprobs
from a3_jax.decoding.strategies import CommitPolicy, choose

LAW = np.array([0.15, 0.5, 0.05, 0.3])


def kept(probabilities, **sampling):
    logprobs = np.asarray(filtered_logprobs(jnp.log(jnp.asarray(probabilities)), Sampling(1.0, **sampling)))
    np.testing.assert_allclose(np.exp(logprobs).sum(), 1.0, atol=1e-6)
    return np.flatnonzero(np.isfinite(logprobs)).tolist()


def test_top_k_keeps_the_likeliest():
    assert kept(LAW, top_k=1) == [1]
    assert kept(LAW, top_k=2) == [1, 3]
    assert kept(LAW, top_k=0) == kept(LAW, top_k=9) == [0, 1, 2, 3]
    assert kept([0.25] * 4, top_k=2) == [0, 1], "of equal tokens the lower ids"


def test_top_p_keeps_the_smallest_set_that_exceeds_it():
    """The token that goes over is kept; a set that only reaches p is not enough."""
    assert kept(LAW, top_p=0.4) == [1]
    assert kept(LAW, top_p=0.6) == [1, 3]
    assert kept(LAW, top_p=0.79) == [1, 3]
    assert kept(LAW, top_p=0.81) == [0, 1, 3]
    assert kept(LAW, top_p=1.0) == [0, 1, 2, 3]
    assert kept([0.5, 0.25, 0.25], top_p=0.5) == [0, 1], "0.5 does not exceed 0.5"
    assert kept(LAW, top_p=1e-6) == [1], "never nothing"


def test_top_p_counts_what_top_k_left():
    """Of the two tokens that top_k leaves, the likelier has 0.5 / 0.8 = 0.625."""
    assert kept(LAW, top_k=2, top_p=0.6) == [1]
    assert kept(LAW, top_k=2, top_p=0.65) == [1, 3]


def test_temperature_sharpens_before_the_filters():
    logits = jnp.log(jnp.asarray(LAW))
    squared = LAW**2 / (LAW**2).sum()
    np.testing.assert_allclose(np.exp(filtered_logprobs(logits, Sampling(0.5))), squared, rtol=1e-5)
    np.testing.assert_allclose(np.exp(filtered_logprobs(logits, Sampling(0.0))), LAW, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5, top_k=3), Sampling(1.5, top_p=0.7)], ids=str
)
def test_draws_follow_the_distribution(sampling):
    """40,000 draws; each count within five standard deviations."""
    count = 40_000
    logprobs = filtered_logprobs(jnp.log(jnp.asarray(LAW)), sampling)
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(jax.vmap(lambda key: draw(logprobs, key, sampling)))(keys)
    seen, probabilities = np.bincount(tokens, minlength=4), np.exp(np.asarray(logprobs))
    assert (
        np.abs(seen - count * probabilities) <= 5 * np.sqrt(count * probabilities * (1 - probabilities))
    ).all(), (seen, probabilities * count)


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest():
    logits = jnp.array([0.0, 2.0, 2.0, 1.0])
    assert int(draw(filtered_logprobs(logits, Sampling(0.0)), jax.random.key(0), Sampling(0.0))) == 1


def test_criteria_by_hand():
    logprobs = jnp.log(jnp.asarray(LAW))
    key = jax.random.key(0)
    assert float(candidate_score(logprobs, key, "confidence")) == pytest.approx(np.log(0.5))
    assert float(candidate_score(logprobs, key, "entropy")) == pytest.approx(
        (LAW * np.log(LAW)).sum(), rel=1e-5
    )
    assert float(candidate_score(logprobs, key, "margin")) == pytest.approx(0.2, abs=1e-6)
    assert 0 <= float(candidate_score(logprobs, key, "random")) < 1
    filtered = filtered_logprobs(logprobs, Sampling(1.0, top_k=1))
    assert float(candidate_score(filtered, key, "entropy")) == 0.0
    assert float(candidate_score(filtered, key, "margin")) == 1.0


def test_ties_go_to_the_lower_position():
    scores = jnp.array([[0.1, 0.7, 0.7, 0.2], [0.5, 0.5, 0.5, 0.9]])
    valid = jnp.array([[True, True, True, True], [True, True, True, False]])
    for count, expected in (
        (1, [[0, 1, 0, 0], [1, 0, 0, 0]]), (2, [[0, 1, 1, 0], [1, 1, 0, 0]]), (9, valid)
    ):  # fmt: skip
        chosen = choose(CommitPolicy(count), scores, scores, scores, jnp.tile(jnp.arange(4), (2, 1)), valid)
        np.testing.assert_array_equal(chosen, expected)


def chosen_by(policy, distributions, positions=None):
    """The candidates chosen of `distributions` [Q, V], most confident first, read independently."""
    distributions = np.asarray(distributions, np.float32)
    entropy, confidence = -(distributions * np.log(distributions)).sum(-1), distributions.max(-1)
    positions = np.arange(len(distributions)) if positions is None else np.asarray(positions)
    found = choose(policy, *(jnp.asarray(a)[None] for a in (confidence, entropy, confidence, positions)),
                   jnp.ones((1, len(distributions)), bool))  # fmt: skip
    return np.flatnonzero(found[0]).tolist(), entropy, confidence


@pytest.mark.parametrize("bound", [0.0, 0.3, 0.7, 1.5, 9.0])
def test_entropy_bound_commits_the_longest_run_below_it(bound):
    distributions = np.random.default_rng(0).dirichlet([0.5] * 5, size=7) + 1e-6
    distributions /= distributions.sum(-1, keepdims=True)
    found, entropy, confidence = chosen_by(CommitPolicy(7, entropy_bound=bound), distributions)
    order = np.argsort(-confidence)
    fits = [n for n in range(1, 8) if entropy[order[:n]].sum() - entropy[order[:n]].max() <= bound + 1e-7]
    assert found == sorted(order[: max(fits)].tolist())
    assert bound or len(found) == 1, "a bound of 0 is one at a time"


def test_threshold_factor_and_limits():
    confidences = np.array([0.6, 0.99, 0.8, 0.95, 0.3])
    distributions = np.stack([confidences, 1 - confidences], axis=1)
    distributions[4] = [0.5, 0.5]
    assert chosen_by(CommitPolicy(5, threshold=0.9), distributions)[0] == [1, 3]
    assert chosen_by(CommitPolicy(5, threshold=0.999), distributions)[0] == [1], "the best in any case"
    assert chosen_by(CommitPolicy(1, threshold=0.9), distributions)[0] == [1]
    assert chosen_by(CommitPolicy(5, factor=0.25), distributions)[0] == [1, 3], "3 * 0.05 < 0.25 <= 4 * 0.2"
    assert chosen_by(CommitPolicy(5, factor=1.0), distributions)[0] == [1, 2, 3]
    assert chosen_by(CommitPolicy(3, min_gap=2), distributions)[0] == [1, 3], (
        "1, then 3; all others stand next to one of them"
    )
    assert chosen_by(CommitPolicy(2, min_gap=3), distributions, [0, 5, 6, 7, 20])[0] == [0, 1]
