"""Models under evaluation: any order and left to right, against oracles, in batches of any size."""

import json

import numpy as np
import pytest

from a3_jax.decoding.batching import fewest, length_bucket, padded_count
from a3_jax.errors import InputError
from a3_jax.evaluation.models.any_order import AnyOrder
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.evaluation.models.left_to_right import LeftToRight
from a3_jax.evaluation.models.opening import open_model
from tests import oracles
from tests.tiny import CONFIG, ModelConfig
from tests.tiny_checkpoint import tiny_checkpoint, with_bytes
from tests.tiny_hf import write_tiny_llama

NOTHING = np.zeros(0, np.int32)
LONGEST = CONFIG.max_length


@pytest.fixture(scope="module")
def checkpoint():
    return with_bytes()


def texts(rng, count, shortest=9, longest=16):
    """Targets of one padded shape."""
    lengths = rng.integers(shortest, longest + 1, count)
    return [
        ScoreTarget(
            rng.integers(0, 256, length).astype(np.int32), int(length - rng.integers(1, 9)), int(length), seed
        )
        for seed, length in enumerate(lengths)
    ]


def blanks(rng, count=8):
    """Of several lengths, but of one padded shape: each shape is a loop to compile."""
    return [
        TextBlank(
            rng.integers(0, 256, rng.integers(5, 7)).astype(np.int32),
            rng.integers(0, 256, rng.integers(0, 3)).astype(np.int32),
            length=int(rng.integers(2, 5)),
            seed=2**32 - 1 - seed,
        )
        for seed in range(count)
    ]


def test_left_to_right_against_the_oracle(checkpoint):
    """The content stream; what stands right of the part is not read."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, 12).astype(np.int32)
    dense = oracles.left_logprobs(checkpoint.params, checkpoint.config, tokens)
    model = LeftToRight(checkpoint)
    parts = [(1, 12), (4, 9), (11, 12)]
    targets = [ScoreTarget(tokens, *part) for part in parts]
    for part, logprobs, score in zip(parts, model.token_logprobs(targets), model.score(targets)):
        np.testing.assert_allclose(logprobs, dense[slice(*part)], atol=1e-4)
        assert score == pytest.approx(dense[slice(*part)].sum(), abs=1e-4)
    cut = ScoreTarget(tokens[:9], 4, 9)
    assert model.score([cut]) == pytest.approx(model.score([targets[1]]), abs=1e-6)


def test_two_streams_read_both_sides(checkpoint):
    """The tokens to the right of a part are given to the any-order model's score, not to `token_logprobs`."""
    tokens = np.random.default_rng(1).integers(0, 256, 9).astype(np.int32)
    model = AnyOrder(checkpoint, "ctx0_chain")
    inside, cut = ScoreTarget(tokens, 3, 6), ScoreTarget(tokens[:6], 3, 6)
    scores = model.score([inside, cut])
    assert abs(scores[0] - scores[1]) > 1e-3
    left = model.token_logprobs([inside, cut])
    np.testing.assert_allclose(*left, atol=1e-6)
    dense = oracles.any_order_logprobs(checkpoint.params, checkpoint.config, tokens[:6], range(6))
    np.testing.assert_allclose(left[0], dense[3:], atol=1e-4)


@pytest.mark.parametrize(
    "make", [LeftToRight, AnyOrder, lambda *a, **o: AnyOrder(*a, "mask32", {"levels": 2}, **o)]
)
def test_batch_size_changes_no_score(checkpoint, make):
    """One by one, by twos and all together, in float32."""
    targets = texts(np.random.default_rng(2), 12)
    together = make(checkpoint, dtype="float32").score(targets)
    for batch_size in (1, 3):
        model = make(checkpoint, dtype="float32", batch_size=batch_size)
        np.testing.assert_allclose(model.score(targets), together, atol=1e-5, rtol=0)
    assert np.ptp(together) > 1


def test_lengths_mix(checkpoint):
    """Requests come back in the order they were asked, whatever their padded shapes."""
    rng = np.random.default_rng(9)
    targets = texts(rng, 3) + texts(rng, 3, 33, 48)
    shuffled = rng.permutation(6)
    model = LeftToRight(checkpoint)
    scores = np.array(model.score(targets))
    np.testing.assert_allclose(model.score([targets[i] for i in shuffled]), scores[shuffled], atol=1e-5)
    dense = [oracles.left_logprobs(checkpoint.params, checkpoint.config, target.tokens) for target in targets]
    expected = [values[t.start : t.stop].sum() for t, values in zip(targets, dense)]
    np.testing.assert_allclose(scores, expected, atol=1e-3)


@pytest.mark.parametrize(
    "generate",
    [
        {"temperature": 0.9, "top_p": 0.9},
        {"group_size": 2, "order": "random", "temperature": 1.0},
        {"strategy": "dynamic", "temperature": 0.9},
        {"strategy": "speculative", "temperature": 1.0, "window": 3},
        {"model": "ar", "temperature": 0.9},
    ],
)
def test_a_blank_alone_or_in_company(checkpoint, generate):
    """The same tokens, whatever the batch; a blank's seed decides what is drawn, and so does the options'."""
    wanted = blanks(np.random.default_rng(3))
    left = generate.get("model") == "ar"
    options = {name: value for name, value in generate.items() if name != "model"}
    model = LeftToRight(checkpoint, options) if left else AnyOrder(checkpoint, generate=options)
    together = model.fill(wanted)
    assert [len(tokens) for tokens in together] == [blank.length for blank in wanted]
    for index in (7, 2):
        np.testing.assert_array_equal(model.fill([wanted[index]])[0], together[index])
    reseeded = [TextBlank(blank.prefix, blank.suffix, blank.length, seed=1) for blank in wanted]
    for others in (model.fill(reseeded), model.with_generate(seed=1).fill(wanted)):
        assert any((other != tokens).any() for other, tokens in zip(others, together))
    backwards = model.fill(wanted[::-1])[::-1]
    assert all((other == tokens).all() for other, tokens in zip(backwards, together))


def test_greedy_fills_against_the_oracles(checkpoint):
    """Any order: both sides given, from the left one by one. Left to right: the prefix alone."""
    (blank,) = blanks(np.random.default_rng(5), 1)
    blank = TextBlank(blank.prefix[:5], np.array([5, 9], np.int32), 3)
    front = len(blank.prefix)
    tokens = [*blank.prefix.tolist(), None, None, None, 5, 9]
    ranks = [0] * front + [1, 2, 3] + [0, 0]
    filled, _ = oracles.greedy_groupwise(checkpoint.params, checkpoint.config, tokens, ranks)
    assert AnyOrder(checkpoint).fill([blank])[0].tolist() == filled[front : front + 3]
    text = blank.prefix.tolist()
    for _ in range(3):
        reading = np.arange(len(text))
        content, _ = oracles.two_stream_logits(checkpoint.params, checkpoint.config, text, reading, reading)
        text.append(int(content[-1].argmax()))
    assert LeftToRight(checkpoint).fill([blank])[0].tolist() == text[front:]


def test_greedy_is_what_greedy_decoding_gives(checkpoint):
    """Of a continuation by the model itself, and of the same with another last token."""
    prefix = np.array([7, 80, 200, 31, 5], np.int32)
    for model in (LeftToRight(checkpoint), AnyOrder(checkpoint, generate={"context": "l2r"})):
        (likeliest,) = model.fill([TextBlank(prefix, NOTHING, 3)])
        other = np.r_[likeliest[:-1], (likeliest[-1] + 1) % 256]
        targets = [ScoreTarget(np.r_[prefix, tail].astype(np.int32), 5, 8) for tail in (likeliest, other)]
        (score, greedy), (other_score, other_greedy) = model.score_and_greedy(targets)
        assert (greedy, other_greedy) == (True, False)
        assert [score, other_score] == pytest.approx(model.score(targets), abs=1e-6)
    sampled = AnyOrder(checkpoint, "mc_order", generate={"context": "l2r"})
    assert [greedy for _, greedy in sampled.score_and_greedy(targets)] == [True, False]
    assert [score for score, _ in sampled.score_and_greedy(targets)] == sampled.score(targets)


def test_the_longest_text():
    """A left-to-right model scores one token more than it reads, rotary positions or learned ones."""
    rng = np.random.default_rng(6)
    for positions in ("rotary", "learned"):
        config = ModelConfig(**{**with_bytes().config.to_dict(), "positions": positions})
        checkpoint = tiny_checkpoint(config, tokenizer=with_bytes().tokenizer)
        tokens = rng.integers(0, 256, LONGEST + 2).astype(np.int32)
        model = LeftToRight(checkpoint)
        whole, shorter = ScoreTarget(tokens[: LONGEST + 1], LONGEST - 1, LONGEST + 1), ScoreTarget(
            tokens[:LONGEST], LONGEST - 1, LONGEST
        )  # fmt: skip
        first, second = model.token_logprobs([whole, shorter])
        assert np.isfinite(first).all()
        assert first[0] == pytest.approx(second[0], abs=1e-5)
        with pytest.raises(InputError, match=f"{LONGEST + 2} tokens, the model's context is {LONGEST + 1}"):
            model.score([ScoreTarget(tokens, 1, LONGEST + 2)])
        with pytest.raises(InputError, match=f"{LONGEST + 1} tokens, the model's context is {LONGEST}"):
            AnyOrder(checkpoint).score([whole])
        with pytest.raises(InputError, match=f"{LONGEST + 1} tokens"):
            model.fill([TextBlank(tokens[:LONGEST], NOTHING, 1)])


def test_settings_stand_in_the_description(checkpoint):
    """Plain JSON; a changed option changes it, and only in the copy."""
    model = AnyOrder(checkpoint, "mask32", {"levels": 8}, {"strategy": "dynamic"}, "bfloat16", 4)
    told = json.loads(json.dumps(model.describe()))
    assert told["scorer"] == {
        "name": "mask32", "levels": 8, "loss_weight": "none", "empty_level": "zero"
    }  # fmt: skip
    assert (told["model"], told["dtype"], told["batch_size"]) == ("a3", "bfloat16", 4)
    assert (told["generate"]["strategy"], told["generate"]["context"]) == ("dynamic", "flat")
    other = model.with_generate(temperature=0.5)
    assert other.describe()["generate"] == {**told["generate"], "temperature": 0.5}
    assert model.describe() == told
    ar = LeftToRight(checkpoint).describe()
    assert (ar["model"], ar["generate"]["temperature"], ar["dtype"]) == ("ar", 0, "float32")


def test_padded_lengths():
    """Half octaves from 16 on; batches hold each request once; those of few rows are filled up."""
    assert [length_bucket(n) for n in (1, 16, 17, 24, 25, 32, 33, 48, 49, 64, 97)] == [
        16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 128
    ]  # fmt: skip
    assert [length_bucket(n, 8) for n in (1, 9, 12, 13)] == [8, 12, 12, 16]
    assert [fewest(shape) for shape in ((16, 8), (16, 128), (96, 16), (128, 8), (1024, 8), (4096, 8))] == [
        16, 1, 8, 4, 1, 1
    ]  # fmt: skip
    assert [padded_count((64, 64), count) for count in (1, 3, 5, 9, 13)] == [2, 3, 6, 12, 16]


@pytest.mark.parametrize(
    ("ask", "complaint"),
    [
        (lambda c: AnyOrder(c).score([ScoreTarget(np.array([3, 4]), 1, 1)]), "target: tokens 1:1 of 2"),
        (lambda c: AnyOrder(c).score([ScoreTarget(np.array([3, 4]), 1, 3)]), "target: tokens 1:3 of 2"),
        (
            lambda c: AnyOrder(c).score([ScoreTarget(np.array([3, 400]), 1, 2)]),
            "tokens: token id 400 is outside",
        ),
        (lambda c: LeftToRight(c).score([ScoreTarget(np.array([3, 4]), 0, 2)]), "put BOS before it"),
        (
            lambda c: LeftToRight(c).fill([TextBlank(NOTHING, NOTHING, 2)]),
            "prefix: a left-to-right model needs",
        ),
        (lambda c: AnyOrder(c).fill([TextBlank(NOTHING, NOTHING, 0)]), "length: must be a whole number"),
        (lambda c: AnyOrder(c, generate={"num_samples": 2}), "num_samples: no option"),
        (lambda c: AnyOrder(c, generate={"temprature": 1}), "did you mean 'temperature'"),
        (lambda c: LeftToRight(c, {"strategy": "dynamic"}), "strategy: 'dynamic' contradicts model 'ar'"),
        (lambda c: AnyOrder(c, dtype="float16"), "dtype"),
        (lambda c: AnyOrder(c, batch_size=0), "batch_size: must be a whole number, at least 1"),
        (lambda c: AnyOrder(tiny_checkpoint()), "checkpoint: the checkpoint has no tokenizer"),
    ],
)
def test_bad_requests(checkpoint, ask, complaint):
    with pytest.raises(InputError, match=complaint):
        ask(checkpoint)


def test_opening(tmp_path):
    """A directory as either model; options that contradict it are refused before any question."""
    write_tiny_llama(tmp_path, query_embed=True, max_length=64)
    model = open_model(tmp_path, scorer="mc_order", scorer_options={"draws": 2}, batch_size=4)
    assert isinstance(model, AnyOrder) and model.max_length == 64
    assert model.describe()["scorer"] == {"name": "mc_order", "draws": 2, "group_size": 1}
    assert isinstance(open_model(tmp_path, "ar", generate={"temperature": 0.5}), LeftToRight)
    for options, complaint in [
        ({"model": "arr"}, "model: must be one of a3, ar, masked_diffusion, got 'arr'; did you mean 'ar'"),
        ({"model": "ar", "scorer": "mask32"}, "scorer: 'mask32' is no scorer of a left-to-right model"),
        ({"model": "masked_diffusion"}, "model: 'masked_diffusion', but the checkpoint has no mask token"),
    ]:
        with pytest.raises(InputError, match=complaint):
            open_model(tmp_path, **options)
