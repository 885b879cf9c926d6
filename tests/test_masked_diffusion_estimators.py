"""Estimators of masked diffusion: against the dense float64 model, exact values, and their laws."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.models.diffusion import MaskedDiffusion
from a3_jax.evaluation.models.interface import ScoreTarget
from a3_jax.evaluation.models.scorers import ESTIMATORS, make_estimator, usual_estimator
from tests import tiny
from tests.oracles import log_softmax, two_stream_logits

MASK, EOS, V = 3, 1, tiny.CONFIG.vocab_size
CONFIGS = {
    shift: dataclasses.replace(tiny.CONFIG, mask_token=MASK, logit_shift=shift) for shift in (False, True)
}
TOKENIZER = types.SimpleNamespace(eos_id=EOS, bos_id=0)
RNG = np.random.default_rng(0)
TARGETS = [
    ScoreTarget(RNG.integers(0, V, length).astype(np.int32), start, stop, seed)
    for seed, (length, start, stop) in enumerate([(9, 4, 9), (9, 0, 2), (13, 6, 7), (15, 3, 11)])
]


def checkpoint_of(config, uniform=False):
    params = tiny.params(config)
    params = params | {"head": jnp.zeros_like(params["head"])} if uniform else params
    return types.SimpleNamespace(params=params, config=config, tokenizer=TOKENIZER)


def model_of(estimator, shift=False, uniform=False, batch_size=None, **options):
    checkpoint = checkpoint_of(CONFIGS[shift], uniform)
    return MaskedDiffusion(checkpoint, estimator, options, batch_size=batch_size, dtype="float32")


def dense_logprobs(config, tokens, masked, columns):
    """log p of the true tokens at some columns, the masked ones hidden; rows see everything."""
    shown, nothing = np.where(masked, MASK, tokens), np.zeros(len(tokens), int)
    content, _ = two_stream_logits(tiny.params(config), config, shown, np.arange(len(tokens)), nothing)
    rows = np.maximum(columns - config.logit_shift, 0)
    return log_softmax(content[rows])[np.arange(len(columns)), tokens[columns]]


@pytest.mark.parametrize("shift", CONFIGS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_estimate_is_that_of_the_dense_model(name, shift):
    """The same masks, one forward at a time in float64, summed as the sources have it."""
    options = {"levels": {"levels": 6}, "ar_ftb": {}}.get(name, {"draws": 4, "stratum": 2})
    ours = model_of(name, shift, **options).score(TARGETS)
    for target, score in zip(TARGETS, ours, strict=True):
        count, part = target.stop - target.start, np.arange(target.start, target.stop)
        tokens = np.append(target.tokens, EOS) if name == "dream" else target.tokens
        masks = make_estimator(name, options).masks(count, np.random.default_rng(target.seed))
        expected = 0.0
        for masked, scored, weight in zip(*masks, strict=True):
            hidden = np.isin(np.arange(len(tokens)), part[masked])
            expected += weight * dense_logprobs(CONFIGS[shift], tokens, hidden, part[scored]).sum()
        np.testing.assert_allclose(score, expected, atol=1e-4 * max(1, abs(expected)))


def test_what_a_mask_counts():
    """levels: n times the mean of the masked, over all levels or those that mask; inv_t: the sum over t."""
    rng = lambda: np.random.default_rng(5)  # noqa: E731
    drawn = rng().random((8, 3)) < (np.arange(8, 0, -1) / 8)[:, None]
    some = drawn.any(axis=1)
    assert not some.all()
    counts, times = drawn.sum(axis=1)[some], (np.arange(8, 0, -1) / 8)[some]
    for options, weights in (
        ({}, 3 / counts / 8),
        ({"empty_level": "skip"}, 3 / counts / some.sum()),
        ({"loss_weight": "inv_t"}, 1 / times / 8),
    ):
        masks = make_estimator("levels", {"levels": 8, **options}).masks(3, rng())
        np.testing.assert_array_equal(masks.masked, drawn[some])
        np.testing.assert_allclose(masks.weights, weights)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_a_uniform_model_levels_give_log_v_times_the_empty_factor(count):
    """Exactly log V a token without empty levels; with them, in the mean, the share of levels that mask."""
    levels, seeds = 8, range(200)
    tokens = np.arange(count + 2, dtype=np.int32)
    targets = [ScoreTarget(tokens, 1, 1 + count, seed) for seed in seeds]
    exact = model_of("levels", uniform=True, levels=levels, empty_level="skip").score(targets)
    np.testing.assert_allclose(exact, -count * np.log(V), rtol=1e-6)
    factor = np.mean([1 - (1 - t / levels) ** count for t in range(1, levels + 1)])
    scores = -np.array(model_of("levels", uniform=True, levels=levels).score(targets)) / np.log(V) / count
    whole = scores * levels
    np.testing.assert_allclose(whole, np.round(whole), atol=1e-5)  # a number of levels
    assert abs(scores.mean() - factor) < 4 * scores.std() / len(seeds) ** 0.5 + 1e-6
    if count == 1:
        assert abs(factor - 0.5625) < 1e-9


def test_of_a_uniform_model_the_others_give_log_v():
    tokens = np.arange(9, dtype=np.int32)
    targets = [ScoreTarget(tokens, 2, 7, seed) for seed in range(40)]
    for name, options in (("llada", {"draws": 8}), ("ar_ftb", {})):
        scores = model_of(name, uniform=True, **options).score(targets)
        np.testing.assert_allclose(scores, -5 * np.log(V), rtol=1e-6)
    for name, options in (("dream", {"draws": 32}), ("levels", {"loss_weight": "inv_t"})):
        scores = np.array(model_of(name, uniform=True, **options).score(targets)) / (-5 * np.log(V))
        assert abs(scores.mean() - 1) < 4 * scores.std() / 40**0.5 and scores.std() > 0.01


@pytest.mark.parametrize(("count", "stratum"), [(4, 4), (5, 32), (1, 32), (40, 32)])
def test_llada_spreads_its_counts(count, stratum):
    draws = 2 * stratum
    masks = make_estimator("llada", {"draws": draws, "stratum": stratum}).masks(
        count, np.random.default_rng(1)
    )
    counts = masks.masked.sum(axis=1)
    np.testing.assert_allclose(masks.weights, count / counts / len(counts))
    assert len(counts) == (1 if count == 1 else draws) and counts.min() >= 1
    for part in counts.reshape(-1, min(stratum, len(counts))):
        if stratum % count == 0:
            assert np.bincount(part, minlength=count + 1)[1:].tolist() == [1] * count
        elif count > stratum:  # no two alike
            assert len(set(part)) == stratum
    if count == 5:  # any subset may be masked
        assert len({tuple(row) for row in masks.masked[counts == 2]}) > 5


def test_dream_draws_stratified_times():
    masks = make_estimator("dream", {"draws": 64, "stratum": 32}).masks(400, np.random.default_rng(2))
    shares = 1 / masks.weights / 64
    for part in shares.reshape(2, 32):
        np.testing.assert_allclose(np.diff(np.sort((part - 1e-3) / (1 - 1e-3))), 1 / 32, rtol=1e-6)
    np.testing.assert_allclose(masks.masked.mean(axis=1), shares, atol=0.13)


@pytest.mark.parametrize("shift", CONFIGS)
def test_ar_ftb_is_a_distribution(shift):
    """exp(score) over all values of two tokens adds up to 1, whatever stands to their right."""
    model, text = model_of("ar_ftb", shift), np.array([5, 0, 0, 9, 2], np.int32)
    targets = []
    for pair in itertools.product(range(V), repeat=2):
        tokens = text.copy()
        tokens[1:3] = pair
        targets.append(ScoreTarget(tokens, 1, 3))
    assert abs(np.exp(model.score(targets)).sum() - 1) < 1e-4
    left = model.token_logprobs(targets[:3])
    assert abs(np.exp([one.sum() for one in model.token_logprobs(targets)]).sum() - 1) < 1e-4
    cut = [dataclasses.replace(target, tokens=target.tokens[: target.stop]) for target in targets[:3]]
    np.testing.assert_allclose([one.sum() for one in left], model.score(cut), atol=1e-5)


def test_no_other_knows_exact_conditionals():
    with pytest.raises(InputError, match="ar_ftb"):
        model_of("levels").token_logprobs(TARGETS)


@pytest.mark.parametrize("name", ["levels", "llada", "dream"])
def test_a_score_depends_on_its_seed_and_on_nothing_beside_it(name):
    model = model_of(name)
    together = model.score(TARGETS)
    np.testing.assert_allclose([model.score([target])[0] for target in TARGETS], together, atol=1e-5)
    np.testing.assert_allclose(model_of(name, batch_size=3).score(TARGETS[::-1])[::-1], together, atol=1e-5)
    other = model.score([dataclasses.replace(target, seed=99) for target in TARGETS])
    assert (np.abs(np.subtract(other, together))[[0, 3]] > 1e-3).all()


def test_a_mask_token_in_the_text_is_a_token():
    """Neither a context full of mask ids nor a part of them changes how much is scored."""
    tokens = np.full(8, MASK, np.int32)
    for name in ("llada", "ar_ftb"):
        score = model_of(name, uniform=True).score([ScoreTarget(tokens, 3, 6)])[0]
        np.testing.assert_allclose(score, -3 * np.log(V), rtol=1e-6)


def test_dream_shows_eos_behind_the_text():
    target = TARGETS[0]
    shown = dataclasses.replace(target, tokens=np.append(target.tokens, np.int32(EOS)))
    with_eos, without = (model_of("dream", eos=eos).score([target])[0] for eos in (True, False))
    assert abs(with_eos - without) > 1e-4
    np.testing.assert_allclose(model_of("dream", eos=False).score([shown])[0], with_eos, atol=1e-5)
    full = ScoreTarget(np.zeros(tiny.CONFIG.max_length, np.int32), 3, 6)
    assert np.isfinite(model_of("dream").score([full])[0])


BAD = {
    "a word": ("levels", {"loss_weight": "t"}), "no draws": ("llada", {"draws": 0}),
    "an unknown option": ("dream", {"levels": 3}), "a stratum that does not fit": ("llada", {"draws": 48}),
    "an unknown name": ("level", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case):
    name, options = BAD[case]
    with pytest.raises(InputError) as error:
        model_of(name, **options)
    assert error.value.field


def test_bad_targets_and_checkpoints_are_refused():
    model = model_of("levels")
    for target in (
        ScoreTarget(np.zeros(tiny.CONFIG.max_length + 1, np.int32), 0, 1),
        ScoreTarget(np.zeros(4, np.int32), 2, 2),
        ScoreTarget(np.array([0, V], np.int32), 0, 1),
    ):
        with pytest.raises(InputError):
            model.score([target])
    with pytest.raises(InputError, match="mask token"):
        MaskedDiffusion(checkpoint_of(tiny.CONFIG))


def test_settings_are_told():
    described = model_of("levels", True, loss_weight="inv_t").describe()
    assert described["scorer"] == {
        "name": "levels", "levels": 32, "loss_weight": "inv_t", "empty_level": "zero",
    }  # fmt: skip
    assert described["mask_token"] == MASK and described["logit_shift"] is True
    usual = {
        family: usual_estimator(types.SimpleNamespace(family=family)) for family in ("llada", "qwen2", "gpt2")
    }
    assert usual == {"llada": "llada", "qwen2": "dream", "gpt2": "levels"}
    assert jax.default_backend() != "cpu" or described["dtype"] == "float32"
