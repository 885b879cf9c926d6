"""The objective of masked diffusion: draws, loss and gradients by a dense model, a run to its end."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from a3_jax.checkpoints.a3_format import save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.data.batches import BatchPlan, arrange
from a3_jax.data.table import FILLER, GIVEN
from a3_jax.errors import InputError
from a3_jax.evaluation.models.diffusion import MaskedDiffusion
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.model.flops import train_step_flops
from a3_jax.model.two_stream import TwoStream
from a3_jax.ordering.curriculum import Order, Stage, trained_context
from a3_jax.ordering.ranks import draw
from a3_jax.training.config import RunConfig, model_config, with_mask
from a3_jax.training.step import gradients, masked_loss, step_loss
from a3_jax.training.train import train
from tests import tiny
from tests.oracles import log_softmax, two_stream_logits
from tests.tiny_hf import write_tiny_llama
from tests.training_fixtures import LINES, tiny_run

MASK, SEED = 3, 11
STAGE = Stage("masked", 1, objective="masked_diffusion")
CONFIGS = {
    shift: dataclasses.replace(tiny.CONFIG, mask_token=MASK, logit_shift=shift) for shift in (False, True)
}
NAMES = ("tokens", "positions", "segment_ids", "ranks", "weights")


def batch_of(lengths=(6, 1, 4), padding=2, rows=4, roles=None):
    tokens, positions, segments, _ = tiny.packed_row(np.random.default_rng(0), lengths, padding)
    arrays = [np.tile(array, (rows, 1)) for array in (tokens, positions, segments)]
    roles = None if roles is None else np.tile(roles, (rows, 1)).astype(np.uint8)
    return arrange(_plan(rows), np.arange(rows, dtype=np.int64), *arrays, roles)


def _plan(rows):
    class Table:
        num_rows = 1

    return BatchPlan(Table(), (STAGE,), SEED, rows)


def test_masks_are_drawn_by_document():
    """A share t of each document's tokens, which count 1/t; the others -1, padding 0; in reading order."""
    batch = batch_of(lengths=(400, 300), padding=50, rows=8)
    weights, segments = batch["weights"], batch["segment_ids"]
    assert (batch["ranks"] == 0).all() and (weights[segments == 0] == 0).all()
    assert (np.diff(batch["positions"][:, :400], axis=1) == 1).all()
    shares = []
    for row, document in zip(*np.nonzero([[1, 1]] * 8), strict=True):
        of = weights[row, segments[row] == document + 1]
        masked = of > 0
        assert len(set(of[masked])) == 1 and (of[~masked] == -1).all()
        shares.append(1 / of[masked][0])
        assert abs(masked.mean() - shares[-1]) < 0.12
    assert len(set(shares)) == 16 and min(shares) < 0.3 and max(shares) > 0.7


def test_masked_weights_add_up_to_the_tokens():
    """In the mean: so a batch's loss is an unbiased bound; and the draw is a function of (seed, number)."""
    positions, segments = np.arange(40), np.ones(40, int)
    drawn = [draw(STAGE, positions, segments, 5, index).predicted for index in range(3000)]
    sums = [one[one > 0].sum() for one in drawn]
    assert abs(np.mean(sums) - 40) < 4 * np.std(sums) / 3000**0.5
    again = draw(STAGE, positions, segments, 5, 17).predicted
    np.testing.assert_array_equal(again, drawn[17])
    assert (draw(STAGE, positions, segments, 6, 17).predicted != again).any()


def test_an_example_has_its_masks_on_every_host():
    """Whatever else is in the batch: a run that goes on, or on more hosts, masks the same."""
    whole = batch_of(rows=4)
    tokens, positions, segments, _ = tiny.packed_row(np.random.default_rng(0), (6, 1, 4), 2)
    last = arrange(_plan(4), np.array([3]), *(array[None] for array in (tokens, positions, segments)))
    for name, array in last.items():
        np.testing.assert_array_equal(array[0], whole[name][3])
    assert (whole["weights"][3] != whole["weights"][2]).any()


def test_given_tokens_and_filler_are_never_masked():
    roles = np.ones(13, int)
    roles[:3], roles[5], roles[8] = GIVEN, FILLER, GIVEN
    batch = batch_of(roles=roles, rows=40)
    for column in range(13):
        free = column not in (0, 1, 2, 5, 8, 11, 12)
        assert (batch["weights"][:, column] > 0).any() == free == (batch["weights"][:, column] < 0).any()


def dense_loss(params, config, batch):
    """(sum, tokens that may be masked): float64, one row and one document at a time."""
    total, count = 0.0, 0
    for tokens, positions, segments, _, weights in zip(*(batch[name] for name in NAMES), strict=True):
        for document in range(1, segments.max() + 1):
            own = segments == document
            shown = np.where(weights[own] > 0, MASK, tokens[own])
            reading = positions[own]
            content, _ = two_stream_logits(params, config, shown, reading, np.zeros_like(reading))
            rows = np.maximum(reading - config.logit_shift, 0)
            scores = log_softmax(content[rows])[reading, tokens[own]]
            total -= np.sum(np.maximum(weights[own], 0) * scores)
            count += int(np.sum(weights[own] != 0))
    return total, count


@pytest.mark.parametrize("shift", CONFIGS)
def test_loss_and_gradient_equal_the_dense_model(shift):
    """The gradient by central differences of the float64 loss, along random directions of every leaf."""
    config, batch = CONFIGS[shift], batch_of()
    params = tiny.params(config)
    model = TwoStream(config, precision=jax.lax.Precision.HIGHEST)
    loss = lambda p, piece: step_loss("masked_diffusion")(model, p, piece)  # noqa: E731
    pairs, gradient = jax.jit(lambda p: gradients(loss, p, batch, 2))(params)
    total, count = dense_loss(params, config, batch)
    np.testing.assert_allclose(pairs["loss"], (total, count), rtol=1e-5)
    assert count == 4 * 11

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    leaves, tree = jax.tree.flatten(wide)
    rng = np.random.default_rng(2)
    for index, slope in enumerate(jax.tree.leaves(gradient)):
        direction = rng.normal(size=leaves[index].shape)

        def at(step, index=index, direction=direction):
            moved = [leaf + step * direction if i == index else leaf for i, leaf in enumerate(leaves)]
            return dense_loss(jax.tree.unflatten(tree, moved), config, batch)[0] / count

        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(slope) * direction), expected, rtol=2e-3, atol=2e-4)
    assert not np.asarray(gradient["query_embed"]).any()


def test_masked_tokens_are_not_seen():
    """Another token in a masked place changes its own target alone: no logit of any row."""
    config, batch = CONFIGS[False], batch_of()
    model, params = TwoStream(config), tiny.params(config)
    row, column = map(int, np.argwhere(batch["weights"] > 0)[0])
    other = batch["tokens"].copy()
    other[row, column] = (other[row, column] + 1) % tiny.CONFIG.vocab_size
    without = batch["weights"].copy()
    without[row, column] = 1e-30  # masked, and counted for nothing
    loss = jax.jit(
        lambda tokens: masked_loss(model, params, {**batch, "tokens": tokens, "weights": without})[0]
    )
    losses = [loss(tokens) for tokens in (batch["tokens"], other)]
    assert losses[0] == losses[1]


def test_at_the_start_the_loss_is_log_v():
    from a3_jax.model.two_stream import init_params

    config, batch = CONFIGS[False], batch_of(lengths=(30, 20), padding=2, rows=32)
    params = init_params(config, jax.random.key(0))
    total, _ = jax.jit(lambda p: masked_loss(TwoStream(config), p, batch))(params)
    weights = batch["weights"]
    mean = float(total) / weights[weights > 0].sum()
    assert abs(mean - np.log(config.vocab_size)) < 0.6


def test_flops_are_the_content_streams_on_all_pairs():
    both, ar, masked = (
        train_step_flops(tiny.CONFIG, 64, objective=objective).total
        for objective in ("any_order", "ar", "masked_diffusion")
    )
    assert ar < masked < both


BAD_STAGES = {
    "two losses": {"content_loss_weight": 0.5},
    "another word": {"objective": "masked"},
}


@pytest.mark.parametrize("case", BAD_STAGES)
def test_bad_stages_are_refused(case):
    with pytest.raises(InputError) as error:
        Stage(**{"name": "m", "steps": 1, "objective": "masked_diffusion", **BAD_STAGES[case]})
    assert error.value.field in ("content_loss_weight", "objective")


def test_the_context_of_other_stages_is_not_that_of_this():
    orders = (Order("random", (2,), context_shapes=("prefix",)),)
    assert trained_context(Stage("a", 1, orders=orders)) == "flat"
    assert trained_context(Stage("a", 1, objective="masked_diffusion", orders=orders)) is None


def masked_run(data, **changes):
    stages = [{"name": "masked", "steps": 8, "objective": "masked_diffusion"}]
    config = {"stages": stages, "schedule": "constant", "eval_every": 8, "mask_token": 258, "batch_size": 8}
    return tiny_run(str(data), **config) | changes


def test_which_id_masks(tmp_path):
    """One of the vocabulary, or one more; never none, nor one farther away."""
    run = RunConfig.from_config(masked_run(tmp_path))
    added = with_mask(run, model_config(run, 258))
    assert (added.vocab_size, added.mask_token, added.logit_shift) == (259, 258, False)
    own = dataclasses.replace(run, mask_token=9, logit_shift=True)
    known = with_mask(own, model_config(own, 258))
    assert (known.vocab_size, known.mask_token, known.logit_shift) == (258, 9, True)
    for mask in (-1, 300):
        bad = dataclasses.replace(run, mask_token=mask)
        with pytest.raises(InputError) as error:
            with_mask(bad, model_config(bad, 258))
        assert error.value.field == "mask_token"
    kept = with_mask(dataclasses.replace(run, mask_token=-1), added)
    assert kept == added  # of a checkpoint that has one


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory of a run of 8 steps, its last checkpoint)."""
    root = tmp_path_factory.mktemp("run")
    (root / "lines.txt").write_text("\n".join(LINES * 3))
    return root / "run", train(masked_run(root / "lines.txt"), root / "run", jax.devices()[:1])


def test_a_run_lowers_its_loss(run):
    first, *_, last = [json.loads(line) for line in (run[0] / "eval.jsonl").read_text().splitlines()]
    assert 0.5 * np.log(259) < first["masked_diffusion"] < 2 * np.log(259)
    assert last["masked_diffusion"] < first["masked_diffusion"] - 0.5
    assert len((run[0] / "metrics.jsonl").read_text().splitlines()) == 8


def test_the_checkpoint_is_one_to_evaluate(run):
    """What was trained scores its own kind of text above another, and fills blanks with bytes."""
    checkpoint = open_checkpoint(run[1])
    assert checkpoint.config.mask_token == 258
    model = MaskedDiffusion(checkpoint, "ar_ftb")
    text = np.array(checkpoint.tokenizer.encode(LINES[0]), np.int32)
    own, other = model.score([ScoreTarget(text, 4, 12), ScoreTarget(text[::-1].copy(), 4, 12)])
    assert own < 0 and np.isfinite(other)
    np.testing.assert_allclose(model.token_logprobs([ScoreTarget(text[:12], 4, 12)])[0].sum(),
                               model.score([ScoreTarget(text[:12], 4, 12)])[0], atol=1e-4)  # fmt: skip
    filled = model.fill([TextBlank(text[:4], text[8:], 4)])[0]
    assert filled.shape == (4,) and filled.max() < 259


def test_it_goes_to_hugging_face_and_back(run, tmp_path):
    """The mask token and the shift become fields of config.json, whether the model came from there or not."""
    convert(run[1], tmp_path / "hf", to="hf")
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["mask_token_id"], said["logit_shift"]) == (258, False)
    again = open_checkpoint(tmp_path / "hf").config
    assert again == open_checkpoint(run[1]).config

    write_tiny_llama(tmp_path / "llama")
    source = open_checkpoint(tmp_path / "llama")
    trained = dataclasses.replace(source.config, mask_token=7, logit_shift=False)
    meta = dataclasses.replace(source.meta, model=trained)
    save_checkpoint(tmp_path / "a3", source.params, meta, source.tokenizer)
    convert(tmp_path / "a3", tmp_path / "back", to="hf")
    assert open_checkpoint(tmp_path / "back").config == trained
