"""Schedules against numbers worked out by hand; AdamW against its formula; reset and restart."""

import jax
import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import Stage
from a3_jax.training import optimizer as optimizers

RUN = {"learning_rate": 1.0, "warmup_steps": 2, "schedule": "linear"}


def rates(*stages, **changes):
    run = RUN | changes
    return [
        optimizers.learning_rate(stages, step, **run) for step in range(sum(stage.steps for stage in stages))
    ]


def test_linear():
    assert rates(Stage("a", steps=6)) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        rates(Stage("a", steps=6), schedule="cosine"), [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    )


def test_constant():
    assert rates(Stage("a", steps=4), schedule="constant") == [0.5, 1.0, 1.0, 1.0]


def test_one_schedule_spans_stages_that_do_not_restart_it():
    assert rates(Stage("a", steps=2), Stage("b", steps=4)) == rates(Stage("c", steps=6))


def test_restart_begins_again_with_warm_up():
    one = rates(Stage("a", steps=3))
    assert one == [0.5, 1.0, 1.0]
    assert rates(Stage("a", steps=3), Stage("b", steps=3, restart_schedule=True)) == one + one


def test_a_stage_has_its_own_rate_warm_up_and_schedule():
    own = Stage("b", steps=3, learning_rate=10.0, warmup_steps=0, schedule="constant", restart_schedule=True)
    assert rates(Stage("a", steps=3), own) == [0.5, 1.0, 1.0, 10.0, 10.0, 10.0]


def test_more_warm_up_than_steps():
    assert rates(Stage("a", steps=2), warmup_steps=4) == [0.25, 0.5]


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(InputError, match="linear"):
        optimizers.decay("lineer", 5, warmup_steps=0, steps=9)


def params():
    return {
        "embed": np.full((2, 3), 2.0, np.float32),
        "final_norm": np.full(3, 2.0, np.float32),
        "layers": {"attn_norm": np.full((2, 3), 2.0, np.float32)},
        "query_embed": np.ones(3, np.float32),
    }


def test_two_steps_of_adamw_by_hand():
    b1, b2, eps, decay, rate = 0.9, 0.99, 1e-6, 0.1, 0.5
    adamw = optimizers.make_optimizer(b1=b1, b2=b2, eps=eps, weight_decay=decay, clip=0)
    tree = params()
    state, value, m, v = adamw.init(tree), 2.0, 0.0, 0.0
    for count, gradient in enumerate((0.3, -0.7), start=1):
        updates, state = adamw.update(
            jax.tree.map(lambda x, g=gradient: np.full_like(x, g), tree), state, tree
        )
        tree = jax.tree.map(lambda p, u: p - rate * u, tree, updates)
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        value -= rate * ((m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps) + decay * value)
        np.testing.assert_allclose(tree["embed"], value, rtol=1e-5)


def test_only_matrices_decay():
    adamw = optimizers.make_optimizer(weight_decay=0.1)
    zero = jax.tree.map(np.zeros_like, params())
    updates, _ = adamw.update(zero, adamw.init(params()), params())
    decayed = jax.tree.map(lambda u: bool(np.any(u)), updates)
    assert decayed == {
        "embed": True,
        "final_norm": False,
        "layers": {"attn_norm": False},
        "query_embed": False,
    }


def test_clip_bounds_the_global_norm():
    """The first update of Adam is its gradient's sign: look at the moment instead."""
    adamw = optimizers.make_optimizer(b1=0.0, clip=1.0)
    gradient = jax.tree.map(lambda x: 100.0 * np.ones_like(x), params())
    _, state = adamw.update(gradient, adamw.init(params()), params())
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(state[1].mu)))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)
