"""Microbatches are an implementation detail: one, four, or unequal ones give the same step."""

import jax
import numpy as np
import pytest

from a3_jax.training.step import gradients, make_reset, make_train_step, step_loss
from tests.training_fixtures import TINY, one_device, sorted_rows, tiny_state


@pytest.fixture(scope="module")
def rows():
    """Eight rows with 0 to 13 of 14 rows predicted: a mean of means would be far off."""
    return sorted_rows(0, batch=8, length=14, group_size=3, padding=(1, 14, 0, 12, 5, 9, 13, 2))


def test_equal_loss_and_update(rows):
    mesh, results = one_device(), []
    for microbatches in (1, 4):
        model, adamw, state = tiny_state(mesh)
        step = make_train_step(model, adamw, mesh, objective="any_order", microbatches=microbatches)
        state, metrics = step(state, rows, np.float32(1e-2))
        results.append((jax.device_get(metrics), jax.device_get(state.params)))
    (one, params_one), (four, params_four) = results
    assert one["tokens"] == four["tokens"] == (rows["segment_ids"] != 0).sum()
    np.testing.assert_allclose(one["loss"], four["loss"], rtol=1e-5)
    np.testing.assert_allclose(one["grad_norm"], four["grad_norm"], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params_one, params_four)


@pytest.mark.parametrize("kind", [("any_order",), ("ar",), ("any_order", 0.5)])
def test_equal_gradients(rows, kind):
    """A content loss too, which here three of the eight examples have: those in reading order."""
    model, _, state = tiny_state(one_device())
    loss = step_loss(*kind)
    rows = {name: array.copy() for name, array in rows.items()}
    if len(kind) > 1:
        for row in (0, 2, 4):
            order = np.argsort(rows["positions"][row] + 99 * (rows["segment_ids"][row] == 0))
            for array in rows.values():
                array[row] = array[row, order]
            rows["ranks"][row] = rows["positions"][row]
    results = [
        jax.jit(lambda params, n=n: gradients(lambda p, b: loss(model, p, b), params, rows, n))(state.params)
        for n in (1, 4)
    ]
    (pairs_one, one), (pairs_four, four) = results
    assert pairs_one.keys() == pairs_four.keys() and len(pairs_one) == len(kind)
    for name, (total, weight) in pairs_one.items():
        np.testing.assert_allclose(total, pairs_four[name][0], rtol=1e-5)
        assert weight == pairs_four[name][1] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, four)
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(one)) > 1e-3


def test_padding_alone_changes_no_parameter():
    """Nothing to predict: a loss and a gradient of zero, no NaN."""
    mesh = one_device()
    model, adamw, state = tiny_state(mesh, weight_decay=0.0)
    before = jax.device_get(state.params)
    nothing = sorted_rows(1, batch=2, length=6, padding=(6, 6))
    step = make_train_step(model, adamw, mesh, objective="any_order", microbatches=2)
    state, metrics = step(state, nothing, np.float32(1.0))
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_one_program_for_orders_and_rates_and_a_reset():
    """New ranks and a new rate compile nothing; a reset clears the moments and leaves the rest."""
    mesh = one_device()
    model, adamw, state = tiny_state(mesh)
    step = make_train_step(model, adamw, mesh, objective="any_order", microbatches=1)
    for seed, rate in ((0, 1e-2), (1, 1e-3)):
        state, _ = step(state, sorted_rows(seed, batch=2, length=6, group_size=seed + 1), np.float32(rate))
    assert step._cache_size() == 1
    params, count = jax.device_get(state.params), int(state.opt_state[1].count)
    state = make_reset(adamw, model, mesh)(state)
    assert (count, int(state.opt_state[1].count), int(state.step)) == (2, 0, 2)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state[1].mu)))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    assert state.params["embed"].shape == (TINY.vocab_size, TINY.d_model)
