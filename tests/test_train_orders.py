"""Stages with contexts, absent spans and a content loss in a whole run: what it writes; that it goes on."""

import json

import jax
import numpy as np
import pytest

from a3_jax.checkpoints.a3_format import load_meta
from a3_jax.data.table import GIVEN, PREDICTED, pack
from a3_jax.model.sharding import batch_sharding
from a3_jax.model.two_stream import TwoStream
from a3_jax.training import heldout as evaluation
from a3_jax.training.config import RunConfig
from a3_jax.training.train import train
from tests.training_fixtures import LINES, TINY, one_device, tiny_run

pytestmark = pytest.mark.slow

CONTEXT = {"order": "random", "group_sizes": [1, 2], "context_shapes": ["prefix", "both"], "context": "l2r"}
STAGES = [
    {"name": "l2r", "steps": 2, "content_loss_weight": 0.5},
    {"name": "context", "steps": 2, "orders": [CONTEXT], "bos_given": True, "absent": 0.5},
    {"name": "spread", "steps": 1, "orders": [{"order": "spread"}]},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run at once, and stopped in the midst of its second stage; they compile the same steps."""
    directory = tmp_path_factory.mktemp("orders")
    (directory / "text.txt").write_text("\n\n".join(LINES))
    begun = [STAGES[0], STAGES[1] | {"steps": 1}]
    for name, stages in (("whole", STAGES), ("parts", begun), ("parts", STAGES)):
        config = tiny_run(
            str(directory / "text.txt"), stages=stages, schedule="constant", keep=3,
            compilation_cache=str(directory / "compiled"),
        )  # fmt: skip
        train(config, directory / name, devices=jax.devices()[:1])
    return directory


def rows(runs, name):
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def test_metrics_tell_the_content_loss_where_there_is_one(runs):
    assert [(row["stage"], "content_loss" in row) for row in rows(runs, "whole")] == [
        ("l2r", True), ("l2r", True), ("context", False), ("context", False), ("spread", False),
    ]  # fmt: skip
    assert all(row["content_loss"] > 0 for row in rows(runs, "whole")[:2])


def test_it_goes_on_with_the_same_losses(runs):
    whole, parts = ([row["loss"] for row in rows(runs, name)] for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 5


def test_checkpoints_record_how_contexts_were_ranked(runs):
    metas = [load_meta(runs / "whole" / "checkpoints" / str(step)) for step in (2, 4, 5)]
    found = [(meta.stage, meta.context) for meta in metas]
    assert found == [("l2r", None), ("context", "l2r"), ("spread", None)]


def test_the_resolved_config_reads_back(runs):
    saved = json.loads((runs / "whole" / "config.json").read_text())
    assert RunConfig.from_config(saved).to_dict() == saved
    for stage in saved["stages"]:  # one of before these fields were there goes on as it is
        for field in ("bos_given", "absent"):
            stage.pop(field)
    assert [stage.absent for stage in RunConfig.from_config(saved).stages] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("bos_given", "context"), [(True, "l2r"), (False, "flat")])
def test_held_out_losses_take_as_given_what_training_does(monkeypatch, bos_given, context):
    """BOS where any stage gives it; prompts ranked as all orders do. The AR loss has rank = position."""
    prompt = np.array([GIVEN] * 3 + [PREDICTED] * 3, np.uint8)
    heldout = {
        "bos": pack([np.array([7, 1, 2, 3, 4, 5])] * 4, 6),
        "prompts": pack([np.arange(6)] * 4, 6, roles=[prompt] * 4),
    }
    order = {"order": "random", "context": context}
    stages = [{"name": "a", "steps": 1, "orders": [order]}]
    stages += [{"name": "b", "steps": 1, "orders": [order], "bos_given": bos_given}]
    config = RunConfig.from_config(tiny_run("", stages=stages, seq_len=6))
    monkeypatch.setattr(evaluation, "held_out_losses", lambda losses, params, batches, should_stop: batches)
    first = {}
    for name, table in heldout.items():
        sharding = batch_sharding(one_device())
        batches = evaluation.make_evaluator(config, TwoStream(TINY), table, lambda rows: rows, sharding, 7)(
            None, None
        )
        first[name] = {kind: next(iter(batches(kind, "l2r", 1))) for kind in ("any_order", "ar")}
    assert first["bos"]["any_order"]["weights"][0].tolist() == [not bos_given, 1, 1, 1, 1, 1]
    expected = [0, 1, 2, 3, 4, 5] if context == "l2r" else [0, 0, 0, 1, 2, 3]
    assert first["prompts"]["any_order"]["ranks"][0].tolist() == expected
    assert first["prompts"]["ar"]["ranks"][0].tolist() == [0, 1, 2, 3, 4, 5]
    assert all(made["weights"][0].tolist() == [0, 0, 0, 1, 1, 1] for made in first["prompts"].values())
