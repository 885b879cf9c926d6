"""Samplers of masked diffusion: which tokens are committed when, by a dense reference and by their laws."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.models.diffusion import MaskedDiffusion
from a3_jax.evaluation.models.diffusion_sampler import SAMPLERS, fill_blanks, make_sampler
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from tests import tiny
from tests.oracles import log_softmax, two_stream_logits

MASK, V = 3, tiny.CONFIG.vocab_size
CONFIGS = {
    shift: dataclasses.replace(tiny.CONFIG, mask_token=MASK, logit_shift=shift) for shift in (False, True)
}
RNG = np.random.default_rng(0)
BLANKS = [
    TextBlank(RNG.integers(0, V, p).astype(np.int32), RNG.integers(0, V, s).astype(np.int32), n, seed)
    for seed, (p, n, s) in enumerate([(4, 6, 3), (1, 3, 0), (0, 7, 5), (8, 1, 2)])
]


def fill(name, shift=False, blanks=BLANKS, params=None, most=None, **options):
    config = CONFIGS[shift]
    params = tiny.params(config) if params is None else params
    return fill_blanks(params, config, blanks, make_sampler(name, options), "float32", most)


def laws(config, blank, chosen, masked):
    """[n, V] log p of the blank's tokens as it is, in float64."""
    shown = np.where(masked, MASK, chosen)
    tokens = np.concatenate([blank.prefix, shown, blank.suffix]).astype(int)
    reading = np.arange(len(tokens))
    content, _ = two_stream_logits(tiny.params(config), config, tokens, reading, np.zeros_like(reading))
    columns = len(blank.prefix) + np.arange(blank.length)
    return log_softmax(content[np.maximum(columns - config.logit_shift, 0)])


def best(score, masked, count):
    """The best of the masked, the first on a tie."""
    return sorted(np.flatnonzero(masked), key=lambda place: (-score[place], place))[:count]


def committed_now(name, law, masked, step, steps):
    """Which places a step of a greedy sampler commits."""
    count, largest = len(masked), law.max(axis=-1)
    if name == "diffullama":
        worst = sorted(range(count), key=lambda place: (largest[place], place))
        return [p for p in np.flatnonzero(masked) if p not in worst[: count * (steps - 1 - step) // steps]]
    if name == "low_confidence":
        return best(largest, masked, count // steps + (step < count % steps))
    times = np.linspace(1, 1e-3, steps + 1)
    share = 1.0 if step == steps - 1 else 1 - times[step + 1] / times[step]
    two = np.sort(np.exp(law), axis=-1)[:, -2:]
    score = {
        "maskgit_plus": largest,
        "entropy": np.sum(np.exp(law) * law, axis=-1),
        "topk_margin": two[:, 1] - two[:, 0],
    }[name]
    return best(score, masked, int(masked.sum() * share))


@pytest.mark.parametrize(
    ("name", "shift"),
    [("diffullama", True), ("low_confidence", False), ("maskgit_plus", True), ("topk_margin", False),
     ("entropy", True)],
)  # fmt: skip
def test_greedy_equals_the_dense_reference(name, shift):
    """Token by token and step by step, blanks of several lengths in a batch, with few and many steps."""
    for steps in ("length", 4, 10):
        filled = fill(name, shift, steps=steps, temperature=0.0)
        for blank, ours in zip(BLANKS, filled, strict=True):
            chosen, masked = np.zeros(blank.length, int), np.ones(blank.length, bool)
            total = blank.length if steps == "length" else steps
            for step in range(total):
                law = laws(CONFIGS[shift], blank, chosen, masked)
                now = committed_now(name, law, masked, step, total)
                assert np.flatnonzero(ours.committed == step).tolist() == sorted(now)
                chosen[now], masked[now] = law.argmax(axis=-1)[now], False
            assert not masked.any() and ours.tokens.tolist() == chosen.tolist()


def test_commits_a_step():
    """At most so many masked after each step of DiffuLLaMA's; LLaDA's evenly; Dream's last takes the rest."""
    blank = [TextBlank(np.array([5], np.int32), np.array([6], np.int32), 7, seed) for seed in range(4)]

    def counts(name, steps):
        return [
            np.bincount(one.committed, minlength=steps).tolist()
            for one in fill(name, blanks=blank, steps=steps)
        ]

    for count in counts("diffullama", 5):
        left = 7 - np.cumsum(count)
        assert all(left <= np.floor(7 * np.arange(4, -1, -1) / 5))
    for name in ("low_confidence", "random"):
        assert counts(name, 3) == [[3, 2, 2]] * 4
        assert counts(name, 9) == [[1] * 7 + [0, 0]] * 4
    for name in ("maskgit_plus", "entropy", "topk_margin"):
        assert counts(name, 7) == [[0, 1, 1, 1, 1, 1, 2]] * 4  # int(7 * (1 - s/t)) is 0 at first
    for name in ("origin", "diffullama_random"):
        assert all(sum(count) == 7 and len(count) == 4 for count in counts(name, 4))


def test_random_commits_are_even_over_the_steps():
    blanks = [TextBlank(np.array([5], np.int32), np.zeros(0, np.int32), 8, seed) for seed in range(200)]
    for name in ("origin", "diffullama_random"):
        steps = np.concatenate([one.committed for one in fill(name, blanks=blanks, steps=4)])
        share = np.bincount(steps, minlength=4) / len(steps)
        np.testing.assert_allclose(share, 0.25, atol=0.05)
    first = np.array([np.argmin(one.committed) for one in fill("random", blanks=blanks)])
    assert np.bincount(first, minlength=8).min() > 5  # any place may come first


@pytest.mark.parametrize("name", ["diffullama", "random", "origin"])
def test_same_seed_same_tokens(name):
    """In another order, with another batch size; another seed gives others."""
    together = [one.tokens.tolist() for one in fill(name, temperature=1.0)]
    apart = fill(name, blanks=BLANKS[::-1], most=1, temperature=1.0)[::-1]
    assert [one.tokens.tolist() for one in apart] == together
    others = [dataclasses.replace(blank, seed=blank.seed + 50) for blank in BLANKS]
    assert [one.tokens.tolist() for one in fill(name, blanks=others, temperature=1.0)] != together


def test_every_sampler_is_told_apart():
    assert {make_sampler(name).name for name in SAMPLERS} == set(SAMPLERS)
    with pytest.raises(InputError, match="entropy"):
        make_sampler("entropi")


def test_a_blank_of_one_follows_the_law():
    """Sampled frequencies are the model's, at temperature 2 and with top-p."""
    config, rows = CONFIGS[True], 600
    one = TextBlank(np.array([5, 9], np.int32), np.array([4], np.int32), 1)
    blanks = [dataclasses.replace(one, seed=seed) for seed in range(rows)]
    law = laws(config, one, np.zeros(1, int), np.ones(1, bool))[0]
    hot = np.exp(law / 2) / np.exp(law / 2).sum()
    drawn = np.bincount(
        [f.tokens[0] for f in fill("maskgit_plus", True, blanks, temperature=2.0)], minlength=V
    )
    assert np.abs(drawn / rows - hot).max() < 4 * np.sqrt(hot.max() / rows)
    order = np.argsort(-law)
    kept = order[: int(np.searchsorted(np.cumsum(np.exp(law[order])), 0.5)) + 1]
    some = {int(f.tokens[0]) for f in fill("origin", True, blanks, temperature=1.0, top_p=0.5)}
    assert some <= set(kept.tolist()) and len(some) > len(kept) // 2


def test_two_steps_follow_the_chain_rule():
    """Of two blanks filled one at a time, in either order: the joint law by brute force over all pairs."""
    config, rows = CONFIGS[False], 2000
    one = TextBlank(np.array([5], np.int32), np.array([4], np.int32), 2)
    blanks = [dataclasses.replace(one, seed=seed) for seed in range(rows)]
    joint, both = np.zeros((V, V)), laws(config, one, np.zeros(2, int), np.ones(2, bool))
    for place, token in itertools.product(range(2), range(V)):
        chosen, masked = np.full(2, token), np.array([place == 1, place == 0])
        second = laws(config, one, chosen, masked)[1 - place]
        pair = np.exp(both[place, token] + second) / 2
        joint[(token, slice(None)) if place == 0 else (slice(None), token)] += pair
    np.testing.assert_allclose(joint.sum(), 1)
    drawn = np.zeros((V, V))
    for filled in fill("random", blanks=blanks, steps=2, temperature=1.0):
        drawn[tuple(filled.tokens)] += 1
    assert np.abs(drawn / rows - joint).sum() / 2 < 0.5 * np.sqrt(V * V / rows)
    assert abs(np.sum(drawn / rows * np.log(joint)) - np.sum(joint * np.log(joint))) < 0.15


def model(sampler=None, **options):
    tokenizer = types.SimpleNamespace(eos_id=1, bos_id=0)
    config = CONFIGS[False]
    checkpoint = types.SimpleNamespace(params=tiny.params(config), config=config, tokenizer=tokenizer)
    return MaskedDiffusion(checkpoint, None, None, sampler, options)


def test_the_model_fills():
    """Given tokens that are the mask token stay given; every blank has its length."""
    filled = model("low_confidence").fill(BLANKS)
    assert [len(tokens) for tokens in filled] == [blank.length for blank in BLANKS]
    expected = [one.tokens.tolist() for one in fill("low_confidence")]
    assert [tokens.tolist() for tokens in filled] == expected
    masks = TextBlank(np.full(3, MASK, np.int32), np.full(2, MASK, np.int32), 2)
    one = fill("entropy", blanks=[masks])[0]
    assert sorted(one.committed) == [1, 1] and one.tokens.dtype == np.int32


def test_settings_change_and_are_told():
    base = model("entropy", temperature=0.5)
    other = base.with_generate(steps=3, top_p=0.9)
    assert base.describe()["sampler"] == {
        "name": "entropy", "steps": "length", "temperature": 0.5, "top_p": 1.0,
    }  # fmt: skip
    assert other.describe()["sampler"] == {"name": "entropy", "steps": 3, "temperature": 0.5, "top_p": 0.9}
    released = other.with_generate("diffullama_random").describe()["sampler"]
    assert released == {"name": "diffullama_random", "steps": "length", "temperature": 0.9, "top_p": 0.9}
    assert model().sampler.name == "diffullama"


def test_greedy_is_what_the_surest_token_at_a_time_gives():
    filled = fill("low_confidence", blanks=BLANKS[:2])
    targets = []
    for blank, one in zip(BLANKS, filled, strict=False):
        tokens = np.concatenate([blank.prefix, one.tokens, blank.suffix]).astype(np.int32)
        targets.append(ScoreTarget(tokens, len(blank.prefix), len(blank.prefix) + blank.length))
    wrong = targets[0].tokens.copy()
    wrong[targets[0].start] = (wrong[targets[0].start] + 1) % V
    targets.append(dataclasses.replace(targets[0], tokens=wrong))
    results = model().score_and_greedy(targets)
    assert [greedy for _, greedy in results] == [True, True, False]
    np.testing.assert_allclose([score for score, _ in results], model().score(targets))


BAD = {
    "steps": ("entropy", {"steps": 0}), "a word": ("entropy", {"steps": "many"}),
    "temperature": ("origin", {"temperature": -1}), "top_p": ("origin", {"top_p": 0}),
    "not a number": ("origin", {"top_p": "x"}), "another's option": ("random", {"group_size": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case):
    name, options = BAD[case]
    with pytest.raises(InputError) as error:
        make_sampler(name, options)
    assert error.value.field
