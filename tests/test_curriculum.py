"""Stages as data: presets, configs, which stage a step belongs to."""

import dataclasses
import json

import pytest

from a3_jax.errors import InputError
from a3_jax.ordering import curriculum
from a3_jax.ordering.curriculum import (
    Order,
    Stage,
    paper_stages,
    release_stages,
    stage_at,
    stages_from_config,
    trained_context,
)


def test_paper_preset():
    stages = paper_stages()
    assert [(stage.orders[0].order, stage.orders[0].group_sizes) for stage in stages] == [
        ("l2r", (1,)), ("contiguous", (2,)), ("contiguous", (4,)), ("random", (4,)),
    ]  # fmt: skip
    assert curriculum.total_steps(stages) * 256 * 2048 == pytest.approx(2.0e9, rel=0.01)
    assert [stage.steps for stage in paper_stages([1, 2, 3, 4])] == [1, 2, 3, 4]
    assert not any(stage.one_order_per_batch or stage.reset_optimizer for stage in stages)


def test_release_preset():
    """What the authors' code does: six strategies, the HF Trainer's defaults, one order a batch."""
    stages = release_stages()
    assert [
        [(order.order, order.group_sizes, order.weight) for order in stage.orders] for stage in stages
    ] == [
        [("l2r", (1,), 1.0)],
        [("contiguous", (2,), 1.0)],
        [("contiguous", (4,), 1.0)],
        [("random", (4,), 1.0)],
        [("random", (8,), 1.0)],
        [("random", (8,), 1.0), ("contiguous", (8,), 1.0)],
    ]
    for stage in stages:
        assert (stage.steps, stage.warmup_steps, stage.schedule) == (800, 50, "linear")
        assert stage.restart_schedule and stage.reset_optimizer and stage.one_order_per_batch
        assert stage.learning_rate is None


def test_stage_at():
    stages = paper_stages([2, 1, 3, 1])
    found = [stage_at(stages, step) for step in range(7)]
    assert [index for index, _, _ in found] == [0, 0, 1, 2, 2, 2, 3]
    assert [first for _, _, first in found] == [0, 0, 2, 3, 3, 3, 6]
    assert all(stages[index] is stage for index, stage, _ in found)
    for step in (-1, 7):
        with pytest.raises(ValueError, match="outside the 7 steps"):
            stage_at(stages, step)


@pytest.mark.parametrize("preset", curriculum.PRESETS)
def test_stages_survive_json(preset):
    stages = curriculum.PRESETS[preset]()
    fields = json.loads(json.dumps([dataclasses.asdict(stage) for stage in stages]))
    assert stages_from_config(fields) == stages


def test_every_field_survives_json():
    orders = (
        Order("spread", (1, 2, 4, 8, 16), 0.5, ("none", "both", "blocks"), "group"),
        Order("l2r", context_shapes=("prefix",)),
    )
    stages = (Stage("a", 3, orders=orders, bos_given=True, absent=0.25, content_loss_weight=0.1),)
    fields = json.loads(json.dumps([dataclasses.asdict(stage) for stage in stages]))
    assert stages_from_config(fields) == stages


def test_the_presets_give_nothing_beforehand():
    """The paper's and the release's stages: all of a document is predicted, by the query stream alone."""
    for stage in (*paper_stages(), *release_stages()):
        assert (stage.bos_given, stage.absent, stage.content_loss_weight) == (False, 0, 0)
        assert not any(order.context_shapes for order in stage.orders)


def test_context_that_a_stage_was_trained_with():
    """Recorded where all that draw a context agree, and generation knows it."""

    def trained(*modes, **fields):
        orders = [Order("random", context_shapes=("prefix",), context=mode) for mode in modes]
        return trained_context(Stage("a", 1, orders=(Order("random", context="l2r"), *orders), **fields))

    assert trained() is None
    assert (trained("flat"), trained("l2r"), trained("l2r", "l2r")) == ("flat", "l2r", "l2r")
    assert trained("flat", "l2r") is None
    assert trained("group") is None
    assert trained("l2r", objective="ar") is None


def test_defaults():
    stage = stages_from_config([{"name": "a", "steps": 3, "orders": [{"order": "random"}, {}]}])[0]
    assert stage.orders == (Order("random", (4,)), Order("l2r", (1,)))
    assert stages_from_config([{"name": "a", "steps": 3, "objective": "ar"}])[0].orders == (Order("l2r"),)


BAD_CONFIGS = [
    ([], "stages: .*at least one"),
    ("paper", "stages: .*list"),
    ([3], r"stages\[0\]: .*mapping"),
    ([{"name": "a"}], r"stages\[0\].steps: is missing"),
    ([{"name": "a", "stesp": 3}], r"stages\[0\].stesp: .*did you mean 'steps'"),
    ([{"name": "a", "steps": 0}], r"stages\[0\].steps: .*at least 1"),
    ([{"name": "a", "steps": True}], r"stages\[0\].steps"),
    ([{"name": "", "steps": 1}], r"stages\[0\].name"),
    ([{"name": "a", "steps": 1}, {"name": "a", "steps": 1}], "two stages are called 'a'"),
    ([{"name": "a", "steps": 1, "objective": "arr"}], "objective: .*did you mean 'ar'"),
    ([{"name": "a", "steps": 1, "schedule": "cosin"}], "schedule: .*did you mean 'cosine'"),
    ([{"name": "a", "steps": 1, "learning_rate": 0}], "learning_rate"),
    ([{"name": "a", "steps": 1, "warmup_steps": -1}], "warmup_steps"),
    ([{"name": "a", "steps": 1, "reset_optimizer": 1}], "reset_optimizer"),
    ([{"name": "a", "steps": 1, "orders": []}], "orders"),
    ([{"name": "a", "steps": 1, "orders": "random"}], "orders"),
    ([{"name": "a", "steps": 1, "orders": 3}], "orders"),
    ([{"name": "a", "steps": 1, "orders": [{"order": "contigous"}]}], r"orders\[0\].order: .*'contiguous'"),
    ([{"name": "a", "steps": 1, "orders": [{"ordr": "l2r"}]}], r"orders\[0\].ordr: .*did you mean 'order'"),
    ([{"name": "a", "steps": 1, "orders": [{"order": "l2r", "group_sizes": [2]}]}], "use order='contiguous'"),
    ([{"name": "a", "steps": 1, "orders": [{"order": "random", "group_sizes": [0]}]}], "group_sizes"),
    ([{"name": "a", "steps": 1, "orders": [{"order": "random", "group_sizes": 4}]}], "group_sizes"),
    ([{"name": "a", "steps": 1, "orders": [{"order": "spraed"}]}], "did you mean 'spread'"),
    ([{"name": "a", "steps": 1, "orders": [{"context": "lr"}]}], r"orders\[0\].context: .*flat, l2r, group"),
    (
        [{"name": "a", "steps": 1, "orders": [{"context_shapes": ["prefx"]}]}],
        "context_shapes: .*did you mean 'prefix'",
    ),
    ([{"name": "a", "steps": 1, "orders": [{"context_shapes": "prefix"}]}], "context_shapes: .*list"),
    ([{"name": "a", "steps": 1, "bos_given": 1}], r"stages\[0\].bos_given: .*True or False"),
    ([{"name": "a", "steps": 1, "absent": 1.5}], r"stages\[0\].absent: .*at least 0 and at most 1, got 1.5"),
    ([{"name": "a", "steps": 1, "absent": True}], "absent"),
    ([{"name": "a", "steps": 1, "content_loss_weight": -1}], "content_loss_weight: .*at least 0"),
    ([{"name": "a", "steps": 1, "content_loss_weight": float("nan")}], "content_loss_weight"),
    (
        [{"name": "a", "steps": 1, "objective": "ar", "content_loss_weight": 0.1}],
        "content_loss_weight: .*objective 'ar'",
    ),
    ([{"name": "a", "steps": 1, "orders": [{"weight": 0}]}], "weight"),
    ([{"name": "a", "steps": 1, "orders": [{"weight": float("nan")}]}], "weight"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_bad_configs(config, message):
    with pytest.raises(InputError, match=message):
        stages_from_config(config)


def test_bad_preset_steps():
    with pytest.raises(InputError, match="expected 4 numbers"):
        paper_stages([1, 2])
    with pytest.raises(InputError, match="steps"):
        Stage("a", -1)
