"""Schedules against numbers worked out by hand; AdamW against its formula, Adafactor against the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.errors import InputError
from a3_jax.model.sharding import make_mesh
from a3_jax.ordering.curriculum import Stage
from a3_jax.training import optimizer as optimizers
from a3_jax.training.step import make_train_step
from a3_jax.training.train_state import Numerics, TrainState, abstract_state, init_state, state_shardings
from tests.training_fixtures import TINY, sorted_rows, tiny_state

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


SAVERS = [{"name": "adafactor", "factored_from": 8}, {"moment_dtype": "bfloat16"}]
by_saver = pytest.mark.parametrize("saver", SAVERS, ids=["adafactor", "bfloat16"])


def matrices():
    """A stack of three layers' matrices [L, D, F], one that is too narrow to factor, and a norm."""
    rng = np.random.default_rng(0)
    shapes = {"layers": {"gate": (3, 12, 20), "norm": (3, 12)}, "embed": (16, 4), "final_norm": (12,)}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def trained(optimizer, rate, steps=4, scale=1.0):
    """The parameters after some steps with random gradients, our way: minus rate times the update."""
    tree, rng = matrices(), np.random.default_rng(1)
    state = optimizer.init(tree)
    for _ in range(steps):
        gradient = jax.tree.map(lambda x: scale * rng.normal(size=x.shape).astype(np.float32), tree)
        updates, state = optimizer.update(gradient, state, tree)
        tree = jax.tree.map(lambda p, u: p - rate * u, tree, updates)
    return tree


def test_adafactor_by_hand():
    """Shazeer and Stern's algorithm 4 for each matrix of a stack, in float64; one clip for all."""
    rate, decay = 0.1, 0.2
    ours = optimizers.make_optimizer("adafactor", weight_decay=decay, clip=0, factored_from=8)
    got = trained(ours, rate, steps=4, scale=3.0)["layers"]["gate"]
    value, rng = matrices()["layers"]["gate"].astype(np.float64), np.random.default_rng(1)
    rows, columns = np.zeros((3, 12)), np.zeros((3, 20))
    for step in range(1, 5):
        gradient = jax.tree.map(lambda x: 3.0 * rng.normal(size=x.shape).astype(np.float32), matrices())
        square, keep = gradient["layers"]["gate"].astype(np.float64) ** 2 + 1e-30, 1 - step**-0.8
        rows = keep * rows + (1 - keep) * square.sum(2)
        columns = keep * columns + (1 - keep) * square.sum(1)
        second = rows[:, :, None] * columns[:, None, :] / rows.sum(1)[:, None, None]
        update = gradient["layers"]["gate"] / np.sqrt(second)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        value -= rate * (update + decay * value)
    np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5)


def test_adafactor_is_that_of_optax():
    """Theirs takes the rate inside and does not multiply the decay by it."""
    rate, decay = 0.05, 0.1
    theirs = optax.adafactor(rate, 8, multiply_by_parameter_scale=False, weight_decay_rate=rate * decay,
                             weight_decay_mask=optimizers.is_matrix)  # fmt: skip
    theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs, optax.scale(-1.0))
    ours = optimizers.make_optimizer("adafactor", weight_decay=decay, factored_from=8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), trained(ours, rate), trained(theirs, 1.0)
    )


def test_a_bfloat16_moment_is_that_of_optax():
    rate, decay = 0.05, 0.1
    theirs = optax.adamw(rate, weight_decay=decay, mask=optimizers.is_matrix, mu_dtype=jnp.bfloat16)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs, optax.scale(-1.0))
    got = trained(optimizers.make_optimizer(weight_decay=decay, moment_dtype="bfloat16"), rate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, trained(theirs, 1.0))
    exact = trained(optimizers.make_optimizer(weight_decay=decay), rate)
    difference = np.abs(got["embed"] - exact["embed"]).max()
    assert 1e-6 < difference < 1e-2  # rounded, and no more than that


def state_bytes(**options):
    state = abstract_state(TINY, optimizers.make_optimizer(**options)).opt_state
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def test_savers_keep_less():
    whole = state_bytes()
    assert state_bytes(name="adafactor", factored_from=8) < 0.1 * whole
    assert 0.74 * whole < state_bytes(moment_dtype="bfloat16") < 0.76 * whole
    moments = abstract_state(TINY, optimizers.make_optimizer(moment_dtype="bfloat16")).opt_state[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}


def test_states_are_laid_out_over_a_mesh():
    """Each moment has a sharding that fits it; what is left of a split axis is still split."""
    optimizer = optimizers.make_optimizer(**SAVERS[0])
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = state_shardings(TINY, optimizer, mesh)
    state = init_state(TINY, optimizer, mesh, seed=0)
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), state, shardings)
    assert all(jax.tree.leaves(jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, shardings
    )))  # fmt: skip
    # gate [L, D, F] on (-, fsdp, tensor), as means over F and over D
    factored = shardings.opt_state[1][0]
    gates = [getattr(factored, name)["layers"]["gate"].spec for name in ("v_row", "v_col", "v")]
    assert [tuple(spec) for spec in gates] == [(None, "fsdp"), (None, "tensor"), ()]
    assert factored.v["final_norm"] == shardings.params["final_norm"]


def test_adafactor_has_no_first_moment():
    with pytest.raises(InputError, match="moment_dtype: adafactor has no first moment"):
        optimizers.make_optimizer("adafactor", moment_dtype="bfloat16")
    with pytest.raises(InputError, match="did you mean 'adafactor'"):
        optimizers.make_optimizer("adafator")


@by_saver
def test_a_restored_state_goes_on_as_if_never_saved(saver, tmp_path):
    """Through a checkpoint, split over a mesh, of a state whose leaves are no copies of the parameters."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    rows, rate = sorted_rows(0, batch=2, length=6), np.float32(1e-2)
    with jax.set_mesh(mesh), StepWriter(tmp_path) as writer:
        model, optimizer, state = tiny_state(mesh, **saver)
        step = make_train_step(model, optimizer, mesh, objective="any_order", microbatches=1)
        state, _ = step(state, rows, rate)
        writer.save(1, state.params, {"opt_state": state.opt_state}, Meta(TINY))
        state, metrics = step(state, rows, rate)
        shardings = state_shardings(TINY, optimizer, mesh)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state(TINY, optimizer), shardings,
        )  # fmt: skip
        writer.wait()
        params, rest = writer.restore(1, target.params, {"opt_state": target.opt_state})
        restored = TrainState(np.int32(1), params, rest["opt_state"], Numerics.create())
        again, metrics_again = step(restored, rows, rate)
    assert float(metrics["loss"]) == float(metrics_again["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(again))
