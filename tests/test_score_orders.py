"""Scoring under several orders, and with tokens absent: against the dense model, and as laws."""

import itertools

import numpy as np
import pytest

from a3_jax.decoding import score, scoring
from a3_jax.decoding.options import ScoreOptions
from a3_jax.decoding.requests import item_lines, score_requests
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from tests import oracles
from tests.tiny_checkpoint import tiny_checkpoint, with_bytes

TOKENS = [7, 2, 19, 4, 11, 3, 3, 16, 8, 21]
KEYS = ["logprobs", "logprob", "log_mean_exp", "order_gap", "orders"]


def ranks_of(item, orders):
    """[M, T]: the ranks of each order of an item."""
    (request,) = score_requests(item_lines([item]), tiny_checkpoint(), ScoreOptions(orders=orders))
    return np.stack([request.ranks(number) for number in range(orders)])


def dense(tokens, ranks, positions=None):
    checkpoint = tiny_checkpoint()
    return oracles.any_order_logprobs(checkpoint.params, checkpoint.config, tokens, ranks, positions)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"group_size": 1, "seed": 5},
        {"order": "random", "group_size": 2, "context": 3},
        {"group_size": 1, "scored": [1, 0] * 5},
        {"order": "block", "group_size": 1, "seed": 9},
    ],
    ids=str,
)
def test_each_order_is_the_dense_models(fields):
    """Means, sums, mixture and gap, each by its formula from the dense log-probabilities of every order."""
    item = {"tokens": TOKENS, **fields}
    scored = np.asarray(fields.get("scored", [1] * 10), bool) & (np.arange(10) >= fields.get("context", 0))
    table = np.stack([dense(TOKENS, ranks) for ranks in ranks_of(item, 4)])[:, scored]
    (result,) = score(tiny_checkpoint(), [item], orders=4)
    assert list(result) == KEYS
    assert [value is not None for value in result["logprobs"]] == scored.tolist()
    joints = table.sum(axis=1)
    values = [value for value in result["logprobs"] if value is not None]
    np.testing.assert_allclose(values, table.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(result["orders"], joints, atol=1e-3)
    assert result["logprob"] == pytest.approx(sum(result["orders"]) / 4) == pytest.approx(sum(values))
    assert result["log_mean_exp"] == pytest.approx(np.log(np.exp(joints).mean()), abs=1e-3)
    assert result["order_gap"] == pytest.approx(joints.std() / scored.sum(), abs=1e-4)
    assert result["log_mean_exp"] > result["logprob"]
    assert len(set(result["orders"])) == 4


def test_order_zero_is_a_plain_runs():
    """And M orders are the first M of more; neither batch mates nor other lines' seeds change them."""
    items = [{"tokens": TOKENS[:length], "seed": length, "group_size": 1} for length in (4, 7, 10)]
    plain = score(tiny_checkpoint(), [{**item, "order": "random"} for item in items])
    few, many = (score(tiny_checkpoint(), items, orders=count) for count in (2, 5))
    for item, one, two, five in zip(items, plain, few, many, strict=True):
        assert list(one) == ["logprobs", "logprob"]
        (alone,) = score(tiny_checkpoint(), [item], orders=5)
        assert two["orders"][0] == pytest.approx(one["logprob"], abs=1e-5)
        assert two["orders"] == pytest.approx(five["orders"][:2], abs=1e-5)
        assert alone["orders"] == pytest.approx(five["orders"], abs=1e-5)


def test_orders_are_permutations_and_differ():
    drawn = ranks_of({"tokens": TOKENS, "group_size": 1}, 200)
    assert (np.sort(drawn, axis=1) == np.arange(10)).all()
    assert len({tuple(ranks) for ranks in drawn}) == 200
    first = np.bincount(drawn.argmin(axis=1), minlength=10)
    assert first.min() > 5, "every token comes first now and then"
    other = ranks_of({"tokens": TOKENS, "group_size": 1, "seed": 1}, 200)
    assert not {tuple(ranks) for ranks in drawn} & {tuple(ranks) for ranks in other}


def test_blocks_stay_in_reading_order():
    drawn = ranks_of({"tokens": [1] * 50, "order": "block", "group_size": 1}, 6)
    assert (np.sort(drawn[:, :32], axis=1) == np.arange(32)).all()
    assert len({tuple(ranks) for ranks in drawn}) == 6


def test_a_mixture_of_orders_is_a_likelihood():
    """Over all values of a subset exp(log_mean_exp) adds up to 1; exp of the mean does not."""
    config = ModelConfig(**{**tiny_checkpoint().config.to_dict(), "vocab_size": 5})
    items = [
        {"tokens": [4, 2, *values], "context": 2, "group_size": 1}
        for values in itertools.product(range(5), repeat=3)
    ]
    results = score(tiny_checkpoint(config), items, orders=4)
    assert np.exp([result["log_mean_exp"] for result in results]).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.exp([result["logprob"] for result in results]).sum() < 0.999


def test_the_gap_of_a_model_that_does_not_look():
    """Without attention every order says the same; with one group there is one order."""
    blind = tiny_checkpoint()
    blind.params = {
        **blind.params,
        "layers": {**blind.params["layers"], "o": 0 * blind.params["layers"]["o"]},
        "last_layer": {**blind.params["last_layer"], "o": 0 * blind.params["last_layer"]["o"]},
    }
    item = {"tokens": TOKENS, "group_size": 1}
    assert score(blind, [item], orders=3)[0]["order_gap"] < 1e-6
    assert score(tiny_checkpoint(), [item], orders=3)[0]["order_gap"] > 1e-2
    (one_group,) = score(tiny_checkpoint(), [{**item, "group_size": 10}], orders=3)
    assert one_group["log_mean_exp"] == pytest.approx(one_group["logprob"], abs=1e-5)
    (nothing,) = score(tiny_checkpoint(), [{**item, "context": 10}], orders=3)
    assert nothing == {
        "logprobs": [None] * 10, "logprob": 0.0, "log_mean_exp": 0.0, "order_gap": 0.0, "orders": [0.0] * 3
    }  # fmt: skip


def test_a_mixture_of_tiny_likelihoods():
    """exp(-2000) is no number."""
    (request,) = score_requests(item_lines([{"tokens": [1, 2]}]), tiny_checkpoint(), ScoreOptions())
    tally = scoring._Tally(request)
    for joint in (-2000.0, -2001.0):
        tally.add(np.array([joint, 0.0]))
    result = scoring._result(tally)
    assert result["log_mean_exp"] == pytest.approx(-2000 + np.log((1 + np.exp(-1)) / 2))
    assert (result["logprob"], result["order_gap"]) == (-2000.5, 0.25)


@pytest.mark.parametrize(
    ("item", "options", "field"),
    [
        ({"ranks": [0] * 10}, {"orders": 2}, "ranks"),
        ({"order": "l2r"}, {"orders": 2}, "order"),
        ({"order": "spread"}, {"orders": 2}, "order"),
        ({"order": "sprad"}, {"orders": 2}, "order"),
        ({}, {"orders": 2, "model": "ar"}, "orders"),
        ({}, {"orders": 0}, "orders"),
        ({}, {"orders": True}, "orders"),
        ({}, {"orders": "2"}, "orders"),
        ({}, {"order": 2}, "order"),
    ],
    ids=str,
)
def test_what_several_orders_contradict(item, options, field):
    with pytest.raises(InputError) as caught:
        score(tiny_checkpoint(), [{"tokens": TOKENS, **item}], **options)
    assert caught.value.field == field
    if options.get("orders") != 2 or field == "orders":
        return
    score(tiny_checkpoint(), [{"tokens": TOKENS}], **options)  # the line was to blame


def test_one_order_takes_them_all():
    for fields in ({"ranks": [0] * 10}, {"order": "l2r"}, {"order": "spread"}):
        score(tiny_checkpoint(), [{"tokens": TOKENS, **fields}], orders=1)
    score(tiny_checkpoint(), [{"tokens": TOKENS}], orders=1, model="ar")


ABSENT = [0, 1, 0, 0, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"group_size": 1}, {}),
        ({"order": "random", "group_size": 2, "seed": 3}, {}),
        ({"order": "spread", "group_size": 2}, {}),
        ({"order": "block", "group_size": 1}, {}),
        ({"ranks": [4, 9, 0, 0, 9, 9, 1, 7, 4, 9]}, {}),
        ({"positions": [30, 2, 5, 9, 1, 0, 12, 11, 40, 41], "group_size": 1}, {}),
        ({"scored": [1, 0, 1, 0, 0, 0, 0, 1, 1, 0], "group_size": 1}, {}),
        ({"group_size": 1}, {"context": "l2r"}),
        ({"group_size": 1}, {"orders": 3}),
        ({}, {"model": "ar"}),
    ],
    ids=str,
)
def test_absent_tokens_are_left_out(fields, options):
    """As the line without them that has the positions of the others; whatever the absent tokens are."""
    present = [place for place in range(10) if not ABSENT[place]]
    without = {name: [values[place] for place in present] if isinstance(values, list) else values
               for name, values in {"positions": list(range(10)), **fields}.items()}  # fmt: skip
    other = [token if not absent else 22 for token, absent in zip(TOKENS, ABSENT, strict=True)]
    for context in (0, 2):
        item = {**fields, "tokens": TOKENS, "absent": ABSENT, "context": context + (context > 1)}
        short = {**without, "tokens": [TOKENS[place] for place in present], "context": context}
        (result,) = score(tiny_checkpoint(), [item], **options)
        assert score(tiny_checkpoint(), [{**item, "tokens": other}], **options) == [result]
        (expected,) = score(tiny_checkpoint(), [short], **options)
        assert [result["logprobs"][place] for place in present] == expected.pop("logprobs")
        assert all(value is None for value, gone in zip(result.pop("logprobs"), ABSENT, strict=True) if gone)
        assert result == expected


def test_absent_against_the_dense_model():
    (result,) = score(tiny_checkpoint(), [{"tokens": TOKENS, "absent": ABSENT, "group_size": 1}])
    present = [place for place in range(10) if not ABSENT[place]]
    expected = dense([TOKENS[place] for place in present], range(6), present)
    np.testing.assert_allclose([result["logprobs"][place] for place in present], expected, atol=1e-4)
    whole = dense(TOKENS, range(10))[present]
    assert np.abs(whole - expected).max() > 0.05, "the absent tokens would have mattered"


def test_absent_tokens_of_a_text():
    """The list counts BOS; the output repeats every token; ranks of absent tokens are not read."""
    item = {"text": "abcd", "absent": [0, 0, 1, 0, 0], "ranks": [0, 1, None, 2, 2]}
    (result,) = score(with_bytes(), [item], bos="yes")
    assert result["tokens"] == [256, *b"abcd"]
    assert [value is None for value in result["logprobs"]] == [True, False, True, False, False]


@pytest.fixture
def forwards(monkeypatch):
    """The batches that the model is run on."""
    batches, run = [], scoring.any_order_logprobs

    def recorded(params, batch, **options):
        batches.append(batch)
        return run(params, batch, **options)

    monkeypatch.setattr(scoring, "any_order_logprobs", recorded)
    return batches


def test_lines_and_orders_share_forwards(forwards):
    """Twenty lines of several lengths under three orders are one batch."""
    rng = np.random.default_rng(0)
    items = [{"tokens": rng.integers(0, 23, rng.integers(1, 17)).tolist()} for _ in range(20)]
    score(tiny_checkpoint(), items, orders=3)
    (batch,) = forwards
    assert batch.tokens.shape == (64, 16)
    assert batch.segment_ids.sum() == batch.is_scored.sum() == 3 * sum(len(item["tokens"]) for item in items)


def test_rows_only_where_needed(forwards):
    """No query row but of scored tokens, no content row of absent ones; up to the padding of a bucket."""
    tokens = [1] * 64
    score(tiny_checkpoint(), [{"tokens": tokens, "scored": [1] * 5 + [0] * 59}])
    score(tiny_checkpoint(), [{"tokens": tokens, "context": 47}])
    score(tiny_checkpoint(), [{"tokens": tokens, "absent": [1] * 24 + [0] * 40, "context": 60}])
    score(tiny_checkpoint(), [{"tokens": tokens, "absent": [1] * 50 + [0] * 14}])
    assert [(batch.tokens.shape[1], batch.scored.shape[1]) for batch in forwards] == [
        (64, 16), (64, 32), (64, 16), (16, 16)
    ]  # fmt: skip
    assert [batch.is_scored.sum() for batch in forwards] == [5, 17, 4, 14]
    assert [batch.segment_ids.sum() for batch in forwards] == [64, 64, 40, 14]
