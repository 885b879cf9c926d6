"""Speculative decoding draws from the distribution of one token at a time, in fewer forwards than blanks."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.decoding import generate
from a3_jax.decoding.batched_decode import DecodeRequest, first_state, make_decode_spec
from a3_jax.decoding.decode_state import lay_drafts
from a3_jax.decoding.loop import ModelFns, run_steps, start_state
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.decoding.sampling import Sampling, filtered_logprobs
from a3_jax.decoding.speculative import residual
from a3_jax.decoding.strategies import CommitPolicy, choose
from a3_jax.ordering.ranks import spread
from benchmarks.forward_counts import exact_model_fns, transition_matrix
from tests.tiny_checkpoint import blanks, tiny_checkpoint

V, M, DRAWS = 3, 5, 20_000


def run_steps_of(model_fns, options, blank_count, batch, vocab_size, columns=None, given=(), seed=0):
    """The final state of `batch` examples of nothing but blanks (after `given` tokens)."""
    config = dataclasses.replace(tiny_checkpoint().config, vocab_size=vocab_size, max_length=256)
    checkpoint = types.SimpleNamespace(**{**vars(tiny_checkpoint()), "config": config})
    item = {"tokens": [*given, *[None] * blank_count]}
    requests = blank_requests(item_lines([item]), checkpoint, options)
    completions = [DecodeRequest(requests[0], sample, "flat", options) for sample in range(batch)]
    if columns is not None:
        for completion in completions:
            completion.ranks = np.asarray(columns, np.int32)
    shape = completions[0].shape
    spec = dataclasses.replace(make_decode_spec(checkpoint.config, options, None, shape), cached=False)
    state = start_state(first_state(completions, shape[0], batch, seed), spec)
    return jax.jit(lambda state: run_steps(state, model_fns, spec))(state)


def model_of_tables(tables):
    """Random conditionals given the set of known (column, token) pairs, in place of the model."""

    def forward(state, candidates, active):
        del active
        tokens, ranks, drafted = lay_drafts(state)
        known = (state.filled | drafted)[:, None, :M]
        seen = ranks[:, None, :M] < state.next_rank[:, None, None] + candidates.num_visible_drafts[..., None]
        values = jnp.where(known & seen, tokens[:, None, :M] + 1, 0)  # [B, Q, M]
        code = jnp.sum(values * (V + 1) ** jnp.arange(M), axis=-1)
        return tables[jnp.minimum(candidates.columns, M - 1), code], state

    return ModelFns(forward, lambda hidden: hidden)


def chain_distribution(tables, order, sampling):
    """Exact probabilities of all V^M outcomes, one token at a time in this order."""
    probabilities = jax.jit(jax.vmap(lambda scores: filtered_logprobs(scores, sampling)))
    tables = np.exp(np.asarray(probabilities(tables.reshape(-1, V)))).reshape(tables.shape)
    probabilities = {}
    for outcome in itertools.product(range(V), repeat=M):
        code, probability = 0, 1.0
        for column in order:
            probability *= tables[column, code, outcome[column]]
            code += (outcome[column] + 1) * (V + 1) ** column
        probabilities[outcome] = probability
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-4)
    return probabilities


@functools.cache
def random_tables():
    return jnp.asarray(np.random.default_rng(3).normal(size=(M, (V + 1) ** M, V)) * 1.5, jnp.float32)


@pytest.mark.parametrize(
    ("window", "order", "options"),
    [
        (3, (2, 0, 4, 1, 3), {}),
        (5, (0, 1, 2, 3, 4), {}),
        (1, (4, 2, 0, 1, 3), {}),
        (2, (1, 3, 0, 2, 4), {"temperature": 0.6, "top_p": 0.9}),
        (4, (3, 1, 4, 0, 2), {"entropy_bound": 1.2}),
    ],
)
def test_the_distribution_is_the_chains(window, order, options):
    """All 243 outcomes, chi-square against exact probabilities; and never more forwards than blanks."""
    options = GenerateOptions(**{"strategy": "speculative", "window": window, "temperature": 1.0, **options})
    ranks = np.argsort(order)
    state = run_steps_of(model_of_tables(random_tables()), options, M, DRAWS, V, columns=ranks)
    assert int(state.forwards.max()) <= M
    assert bool(jnp.all(state.filled[:, :M]))
    assert float(state.drafts.accepted.sum()) < float(state.drafts.proposed.sum()), "some were rejected"

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    expected = chain_distribution(random_tables(), order, sampling)
    seen = np.bincount(np.asarray(state.tokens[:, :M]) @ V ** np.arange(M), minlength=V**M)
    probabilities = np.zeros(V**M)
    for outcome, probability in expected.items():
        probabilities[np.asarray(outcome) @ V ** np.arange(M)] = probability * DRAWS
    assert not seen[probabilities == 0].any()
    order_by_size = np.argsort(probabilities)
    kept = order_by_size[probabilities[order_by_size] >= 5]  # the usual rule; the rest is one cell
    counts = np.append(seen[kept], DRAWS - seen[kept].sum())
    means = np.append(probabilities[kept], DRAWS - probabilities[kept].sum())
    counts, means = counts[means > 1], means[means > 1]
    chi_square, freedom = ((counts - means) ** 2 / means).sum(), len(means) - 1
    assert abs(chi_square - freedom) / np.sqrt(2 * freedom) < 4.0


def test_a_wrong_residual_is_found(monkeypatch):
    """The negative control: drawing again from p itself is not the distribution."""
    monkeypatch.setattr("a3_jax.decoding.speculative.residual", lambda target, draft: target)
    with pytest.raises(AssertionError, match=r"4\.0"):
        test_the_distribution_is_the_chains(3, (2, 0, 4, 1, 3), {})


def test_residual():
    target, draft = (
        jnp.log(jnp.asarray(probabilities)) for probabilities in ([0.5, 0.3, 0.2], [0.2, 0.6, 0.2])
    )
    np.testing.assert_allclose(np.exp(residual(target, draft)), [1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(residual(target, target), target)


@pytest.mark.parametrize("order", ["l2r", "random", "spread"])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_greedy_is_the_sequential_argmax(order, window):
    """Token for token what one token a forward gives; the same log-probabilities; fewer forwards."""
    rng = np.random.default_rng(1)
    items = [{"tokens": blanks(rng, length)} for length in (7, 15, 12)]
    options = {"order": order, "seed": 3}
    one_by_one = generate(tiny_checkpoint(), items, group_size=1, **options)
    results = generate(tiny_checkpoint(), items, strategy="speculative", window=window, **options)
    for item, result, expected in zip(items, results, one_by_one, strict=True):
        assert result["tokens"] == expected["tokens"]
        assert result["commit_rank"] == expected["commit_rank"]
        assert result["forwards"] <= expected["forwards"] == item["tokens"].count(None)
        assert result["logprob"] == pytest.approx(expected["logprob"], abs=1e-4)
        assert result["acceptance"] is None or 0 <= result["acceptance"] <= 1


def test_batch_mates_change_nothing():
    rng = np.random.default_rng(2)
    items = [{"tokens": blanks(rng, length)} for length in (6, 13, 16)]
    options = {"strategy": "speculative", "window": 3, "temperature": 1.0, "order": "random"}
    together = generate(tiny_checkpoint(), items, **options)
    alone = generate(tiny_checkpoint(), [*items[:1]], **options)
    assert together[0]["tokens"] == alone[0]["tokens"]
    assert together[0]["forwards"] == alone[0]["forwards"]


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_context_blind_model_accepts_everything(window):
    """Every token drawn apart: drafts are never wrong, the first forward commits one, others window + 1."""
    blind = jnp.broadcast_to(random_tables()[:, :1], random_tables().shape)
    options = GenerateOptions(strategy="speculative", window=window, temperature=1.0)
    state = run_steps_of(model_of_tables(blind), options, M, 64, V)
    assert jnp.array_equal(state.drafts.accepted, state.drafts.proposed)
    assert set(np.asarray(state.forwards)) == {1 + -(-(M - 1) // (window + 1))}


SYMBOLS, BLANKS = 16, 64


@pytest.fixture(scope="module")
def transition():
    return transition_matrix(SYMBOLS, seed=0)


@pytest.mark.parametrize(("order", "most"), [("l2r", 64), ("random", 20), ("spread", 10)])
def test_forwards_on_a_chain_whose_conditionals_are_exact(transition, order, most):
    """16 symbols, 64 blanks, window 8: orders far apart leave little for one token to say of the next."""
    options = GenerateOptions(strategy="speculative", window=8, temperature=1.0, order=order)
    state = run_steps_of(exact_model_fns(transition, BLANKS), options, BLANKS, 64, SYMBOLS)
    assert float(jnp.mean(state.forwards)) <= most
    assert int(state.forwards.max()) <= BLANKS


def test_what_is_drawn_on_the_chain_has_its_pairs(transition):
    """Neighbours follow the transition matrix, whatever the order they were drawn in."""
    options = GenerateOptions(strategy="speculative", window=8, temperature=1.0, order="random")
    state = run_steps_of(exact_model_fns(transition, BLANKS), options, BLANKS, 512, SYMBOLS)
    tokens = np.asarray(state.tokens)
    pairs = np.zeros((SYMBOLS, SYMBOLS))
    np.add.at(pairs, (tokens[:, 20:-21].ravel(), tokens[:, 21:-20].ravel()), 1)
    found = pairs / pairs.sum()
    stationary = np.linalg.matrix_power(transition, 500)[0]
    assert 0.5 * np.abs(found - stationary[:, None] * transition).sum() < 0.05


@pytest.mark.parametrize("bound", [0.5, 1.5, 2.2, 3.0])
def test_what_the_rule_commits_on_the_chain_stays_below_its_bound(transition, bound):
    """Pairs at several distances: KL(joint | product), enumerated, of a pair that is committed together."""
    stationary = np.linalg.matrix_power(transition, 500)[0]
    for gap in (1, 2, 5):
        joint = stationary[:, None] * np.linalg.matrix_power(transition, gap)
        distributions = np.stack([joint.sum(1), joint.sum(0)])
        entropies = jnp.asarray(-(distributions * np.log(distributions)).sum(1), jnp.float32)[None]
        found = choose(
            CommitPolicy(2, entropy_bound=bound), -entropies, entropies,
            jnp.asarray(distributions.max(1))[None],
            jnp.array([[0, gap]]), jnp.ones((1, 2), bool),
        )  # fmt: skip
        assert bool(found.all()) == (float(entropies.min()) <= bound), "sum H - max H of two"
        if found.all():
            assert (joint * np.log(joint / np.outer(*distributions))).sum() <= bound


def test_spread_halves_its_strides():
    assert spread(8, 1).tolist() == [0, 4, 2, 5, 1, 6, 3, 7]
    for length, size in itertools.product((1, 2, 5, 8, 13, 64), (1, 2, 4, 9)):
        ranks = spread(length, size)
        assert set(ranks) == set(range(ranks.max() + 1))
        levels, placed = max(length - 1, 0).bit_length(), 0
        for rank in range(ranks.max() + 1):
            group = np.flatnonzero(ranks == rank)
            assert len(group) <= max(1, min(size, placed))
            level = {0 if i == 0 else levels - ((i & -i).bit_length() - 1) for i in group.tolist()}
            assert len(level) == 1, "a group never crosses a level"
            assert len(group) == 1 or np.diff(group).min() >= 2 ** (levels - level.pop() + 1)
            placed += len(group)
        assert sorted(np.argsort(spread(length, 1))) == list(range(length))
