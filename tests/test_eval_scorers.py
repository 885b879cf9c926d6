"""Scorers of a part of a text: ranks drawn by hand, and sums against loops and brute force in NumPy."""

import itertools
import types

import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.models.any_order import AnyOrder
from a3_jax.evaluation.models.interface import ScoreTarget
from a3_jax.evaluation.models.scorers import level_masks, level_weights, make_scorer
from tests import oracles
from tests.tiny import CONFIG, params
from tests.tiny_checkpoint import tiny_checkpoint

BOS = 22
TOKENIZER = types.SimpleNamespace(bos_id=BOS)
# BOS, three given tokens, a part of four, and one given token behind it.
TEXT = np.array([BOS, 4, 17, 9, 3, 3, 11, 8, 6], np.int32)
PART = ScoreTarget(TEXT[:8], 4, 8, seed=5)
INSIDE = ScoreTarget(TEXT, 4, 8, seed=5)


def model(scorer="chain", weights=None, **options):
    checkpoint = tiny_checkpoint(tokenizer=TOKENIZER)
    checkpoint.params = params() if weights is None else weights
    return AnyOrder(checkpoint, scorer, options)


def passes(name, target=PART, bos=True, **options):
    return list(make_scorer(name, options).passes(target, bos))


def dense(tokens, ranks):
    """[T] float64: log p(token | tokens of lower rank), by the oracle."""
    return oracles.any_order_logprobs(params(), CONFIG, tokens, ranks)


@pytest.mark.parametrize(
    ("name", "options", "target", "bos", "ranks"),
    [
        ("chain", {}, PART, True, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("chain", {}, PART, False, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("chain", {}, INSIDE, True, [0, 1, 2, 3, 5, 6, 7, 8, 4]),
        ("chain", {}, ScoreTarget(TEXT[:3], 0, 3), True, [0, 1, 2]),
        ("chain_s", {"group_size": 2}, PART, True, [0, 1, 1, 2, 3, 3, 4, 4]),
        ("chain_s", {"group_size": 4}, PART, True, [0, 1, 1, 1, 2, 2, 2, 2]),
        ("chain_s", {"group_size": 2}, PART, False, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("chain_s", {"group_size": 2}, INSIDE, True, [0, 1, 1, 2, 3, 3, 4, 4, 2]),
        ("ctx0_chain", {}, PART, True, [0, 1, 1, 1, 2, 3, 4, 5]),
        ("ctx0_chain", {}, PART, False, [0, 0, 0, 0, 1, 2, 3, 4]),
        ("ctx0_chain", {}, INSIDE, True, [0, 1, 1, 1, 2, 3, 4, 5, 1]),
        ("ctx0_chain", {}, ScoreTarget(TEXT[:3], 1, 3), True, [0, 1, 2]),
        ("ctx0_chain", {}, ScoreTarget(TEXT[1:4], 0, 3), False, [0, 1, 2]),
        ("one_shot", {}, PART, True, [0, 1, 1, 1, 2, 2, 2, 2]),
        ("one_shot", {}, INSIDE, False, [0, 0, 0, 0, 1, 1, 1, 1, 0]),
    ],
)
def test_ranks_of_one_forward(name, options, target, bos, ranks):
    (one,) = passes(name, target, bos, **options)
    assert one.ranks.tolist() == ranks
    assert one.ranks.dtype == np.int32
    assert np.flatnonzero(one.scored).tolist() == list(range(target.start, target.stop))
    assert one.weight == 1


def test_drawn_orders_and_partitions():
    """Each draw orders the part alone; groups have the size asked for; a seed gives its draws again."""
    for size in (1, 3):
        drawn = passes("mc_order", draws=6, group_size=size)
        assert [one.weight for one in drawn] == [1 / 6] * 6
        for one in drawn:
            assert one.ranks[:4].tolist() == [0, 1, 1, 1]
            assert sorted(one.ranks[4:]) == [2 + place // size for place in range(4)]
        assert len({tuple(one.ranks) for one in drawn}) > 1
        again = passes("mc_order", draws=6, group_size=size)
        assert all((one.ranks == other.ranks).all() for one, other in zip(drawn, again))
    other_seed = passes("mc_order", ScoreTarget(PART.tokens, 4, 8, seed=6), draws=6)
    assert any((one.ranks != other.ranks).any() for one, other in zip(passes("mc_order"), other_seed))


def test_levels_of_masking():
    """The masked tokens are the last group and alone scored; the others of the part join the context."""
    drawn = passes("mask32", INSIDE, levels=40)
    assert drawn[0].scored.sum() == 4, "at t = 1 everything is masked"
    for one in drawn:
        assert not one.scored[[0, 1, 2, 3, 8]].any() and one.scored.any()
        assert (one.ranks == np.where(one.scored, 2, np.arange(9) > 0)).all()
        assert one.weight == pytest.approx(4 / one.scored.sum() / 40)
    shares = level_masks(10_000, 8, np.random.default_rng(0)).mean(axis=1)
    np.testing.assert_allclose(shares, np.arange(8, 0, -1) / 8, atol=0.02)


def test_weights_of_levels():
    """By hand: four levels over three tokens, the third of them empty."""
    masks = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]], bool)
    expected = {
        ("none", "zero"): np.array([1, 3, 0, 3]) / 4,
        ("none", "skip"): np.array([1, 3, 0, 3]) / 3,
        ("inv_t", "zero"): np.array([1, 4 / 3, 0, 4]) / 4,
        ("inv_t", "skip"): np.array([1, 4 / 3, 0, 4]) / 3,
    }
    for (weight, empty), values in expected.items():
        np.testing.assert_allclose(level_weights(masks, weight, empty), values)


@pytest.mark.parametrize("target", [PART, ScoreTarget(TEXT[1:8], 3, 7), ScoreTarget(TEXT[:5], 1, 5)])
def test_chain_is_a_loop_over_prefixes(target):
    """Token after token, each text cut behind it and read by the oracle."""
    loop = [
        dense(target.tokens[: place + 1], range(place + 1))[-1] for place in range(target.start, target.stop)
    ]
    network = model()
    (score,), (logprobs,) = network.score([target]), network.token_logprobs([target])
    assert score == pytest.approx(sum(loop), abs=1e-4)
    np.testing.assert_allclose(logprobs, loop, atol=1e-4)
    assert np.std(loop) > 0.1


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("chain", {}, [0, 1, 2, 3, 5, 6, 7, 8, 4]),
        ("chain_s", {"group_size": 2}, [0, 1, 1, 2, 3, 3, 4, 4, 2]),
        ("ctx0_chain", {}, [0, 1, 1, 1, 2, 3, 4, 5, 1]),
        ("one_shot", {}, [0, 1, 1, 1, 2, 2, 2, 2, 1]),
    ],
)
def test_one_forward_against_the_oracle(name, options, ranks):
    (score,) = model(name, **options).score([INSIDE])
    assert score == pytest.approx(dense(TEXT, ranks)[4:8].sum(), abs=1e-4)


def test_orders_against_brute_force():
    """Enough draws of three tokens hold each of the six orders: each by the oracle, weighted by its draws."""
    target = ScoreTarget(TEXT[:7], 4, 7, seed=1)
    drawn = [tuple(one.ranks[4:] - 2) for one in passes("mc_order", target, draws=60)]
    orders = list(itertools.permutations(range(3)))
    assert set(drawn) == set(orders)
    joints = {order: dense(target.tokens, [0, 1, 1, 1, *np.array(order) + 2])[4:].sum() for order in orders}
    (score,) = model("mc_order", draws=60).score([target])
    assert score == pytest.approx(np.mean([joints[order] for order in drawn]), abs=1e-4)
    assert np.ptp(list(joints.values())) > 0.05
    assert abs(score - np.mean(list(joints.values()))) < np.ptp(list(joints.values())) / 2


def test_each_order_alike():
    """The draws of many seeds favour no order of three tokens."""
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for seed in range(300):
        for one in passes("mc_order", ScoreTarget(TEXT[:7], 4, 7, seed=seed), draws=4):
            counts[tuple(one.ranks[4:].tolist()[i] - 2 for i in range(3))] += 1
    assert min(counts.values()) > 150 and max(counts.values()) < 250  # of 200 each, deviation 13


@pytest.mark.parametrize("empty", ["zero", "skip"])
@pytest.mark.parametrize("weight", ["none", "inv_t"])
def test_masking_a_uniform_model(weight, empty):
    """Without a head every token has probability 1/V: what is left is the factor of the empty levels."""
    weights = {**params(), "head": np.zeros_like(params()["head"])}
    network = model("mask32", weights, loss_weight=weight, empty_level=empty)
    targets = [ScoreTarget(TEXT[: 4 + count], 4, 4 + count, seed) for count in (1, 2, 4) for seed in range(4)]
    for target, score in zip(targets, network.score(targets)):
        count = target.stop - 4
        masked = level_masks(count, 32, np.random.default_rng(target.seed)).sum(axis=1)
        levels = 32 if empty == "zero" else np.count_nonzero(masked)
        share = (
            np.count_nonzero(masked)
            if weight == "none"
            else (masked / count * 32 / np.arange(32, 0, -1)).sum()
        )
        assert score == pytest.approx(-count * np.log(CONFIG.vocab_size) * share / levels, rel=1e-5)


def test_empty_levels_shrink_short_parts():
    """The share of levels that mask something, over many draws: about n/(n+1), .52 for one token."""
    for count, expected in ((1, 0.52), (2, 0.68), (5, 0.85), (10, 0.92), (20, 0.97)):
        rng = np.random.default_rng(count)
        share = np.mean([level_masks(count, 32, rng).any(axis=1).mean() for _ in range(2000)])
        assert share == pytest.approx(expected, abs=0.01)


def test_masking_against_the_oracle():
    """Level by level, by the dense masks; the weights of the released script written out."""
    total = 0.0
    for mask in level_masks(4, 6, np.random.default_rng(INSIDE.seed)):
        if mask.any():
            ranks = np.array([0, 1, 1, 1, *np.where(mask, 2, 1), 1])
            total += dense(TEXT, ranks)[4:8][mask].mean() * 4 / 6
    (score,) = model("mask32", levels=6).score([INSIDE])
    assert score == pytest.approx(total, abs=1e-4)


def test_several_targets_keep_apart():
    """Many passes of several targets in common batches: each gets its own."""
    targets = [ScoreTarget(TEXT[: 5 + n], 4, 5 + n, seed=n) for n in range(5)]
    network = model("mc_order", draws=3)
    together = network.score(targets)
    alone = [network.score([target])[0] for target in reversed(targets)]
    np.testing.assert_allclose(together, alone[::-1], atol=1e-5)
    assert len(set(together)) == 5


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("chian", {}, "scorer: must be one of chain, .*did you mean 'chain'"),
        ("mask32", {"level": 3}, "level: no such option; did you mean 'levels'"),
        ("mask32", {"loss_weight": "1/t"}, "loss_weight: must be one of none, inv_t"),
        ("mask32", {"empty_level": "none"}, "empty_level"),
        ("mc_order", {"draws": 0}, "draws: must be a whole number, at least 1, got 0"),
        ("chain_s", {"group_size": 0}, "group_size"),
        ("chain", {"group_size": 2}, "group_size: no such option"),
    ],
)
def test_bad_scorers(name, options, complaint):
    with pytest.raises(InputError, match=complaint):
        make_scorer(name, options)
