"""The next-token loss of the content rows: on rows that don't see their target; what a step makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.ordering.curriculum import Order, Stage
from a3_jax.ordering.intervals import sort_order, take_rows
from a3_jax.ordering.ranks import draw
from a3_jax.training.step import LOSSES, make_loss, make_train_step, next_token_weights, step_loss
from tests import tiny
from tests.training_fixtures import one_device, sorted_rows, tiny_state

WEIGHT = 0.5
NAMES = ("tokens", "positions", "segment_ids", "ranks", "weights")
ORDERS = {  # and whether their examples count
    "l2r": (Order("l2r"), True),
    "l2r after a prefix in reading order": (Order("l2r", (), 1.0, ("prefix",), "l2r"), True),
    "groups of one": (Order("contiguous", (1,)), True),
    "groups of two": (Order("contiguous", (2,)), False),
    "l2r after a suffix as one group": (Order("l2r", (), 1.0, ("suffix",), "flat"), False),
    "random": (Order("random", (1,)), False),
    "spread": (Order("spread", (1,)), False),
}


def batch_of(order, lengths=(6, 1, 4), padding=2, rows=4, **fields):
    """Packed examples of one order, sorted; the same documents in each row."""
    rng = np.random.default_rng(0)
    tokens, positions, segments, _ = tiny.packed_row(rng, lengths, padding)
    made = []
    for index in range(rows):
        drawn = draw(Stage("test", 1, orders=(order,), **fields), positions, segments, 9, index)
        arrays = (tokens, positions, drawn.segment_ids, drawn.ranks, drawn.predicted.astype(np.float32))
        made.append(take_rows(sort_order(drawn.ranks, drawn.segment_ids), *arrays))
    return dict(zip(NAMES, map(np.stack, zip(*made, strict=True)), strict=True))


def in_reading_order(batch):
    """The batch with rank = position, sorted again."""
    ranks = np.where(batch["segment_ids"] == 0, 0, batch["positions"])
    arrays = {**batch, "ranks": ranks}
    order = sort_order(ranks, batch["segment_ids"])
    return dict(zip(arrays, take_rows(order, *arrays.values()), strict=True))


def test_hand_drawn():
    #         in reading order       larger groups          a gap after 1          0 and 1 given
    positions = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 0], [0, 1, 3, 0, 1, 0], [0, 1, 2, 0, 1, 0]]
    ranks = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 1, 3, 0, 1, 0], [0, 1, 2, 0, 1, 0]]
    weights = [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]
    expected = [[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    batch = {
        "positions": jnp.array(positions),
        "ranks": jnp.array(ranks),
        "weights": jnp.array(weights, jnp.float32),
        "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0]] * 4),
    }
    assert next_token_weights(batch).tolist() == expected


def test_a_full_row_does_not_wrap_around():
    batch = batch_of(Order("l2r"), lengths=(5,), padding=0, rows=1)
    assert np.asarray(next_token_weights(batch)).tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize("name", ORDERS)
def test_no_target_is_visible_to_its_row(name):
    """Changing the next token changes no logit of a row that counts; where rows see it, none counts."""
    order, counts = ORDERS[name]
    batch = batch_of(order)
    row = [batch[column] for column in NAMES[:4]]
    weights = np.asarray(next_token_weights(batch))
    assert weights.any() == counts
    before, seen = tiny.run(row, outputs="content"), False
    for column in range(batch["tokens"].shape[1] - 1):
        other = batch["tokens"].copy()
        other[:, column + 1] = (other[:, column + 1] + 1) % tiny.CONFIG.vocab_size
        changed = np.abs(tiny.run([other, *row[1:]], outputs="content") - before)[:, column].max(axis=-1) > 0
        assert not (changed & (weights[:, column] > 0)).any()
        seen |= bool(changed.any())
    assert seen == (name in ("groups of two", "l2r after a suffix as one group"))


def test_counted_rows_by_the_rule_of_ranks():
    """A counted row's target has a greater rank, is the next position of its document, and is predicted."""
    for order, _ in ORDERS.values():
        batch = batch_of(order, rows=8, absent=0.5)
        weights = np.asarray(next_token_weights(batch))
        for example, column in zip(*np.nonzero(weights), strict=True):
            row, target = (
                {name: array[example, at] for name, array in batch.items()} for at in (column, column + 1)
            )
            assert target["ranks"] > row["ranks"] and target["positions"] == row["positions"] + 1
            assert target["segment_ids"] == row["segment_ids"] > 0 and target["weights"] == 1


@pytest.fixture(scope="module")
def model_and_params():
    model, _, state = tiny_state(one_device())
    return model, jax.device_get(state.params)


def value_and_gradient(loss, model, params, batch):
    return jax.jit(jax.value_and_grad(lambda p: loss(model, p, batch), has_aux=True))(params)


def test_equals_the_left_to_right_loss_in_reading_order(model_and_params):
    """Both losses and the gradient of their sum, against `any_order_loss` and `ar_loss` by themselves."""
    model, params = model_and_params
    batch = in_reading_order(sorted_rows(0, batch=3, length=8, padding=(0, 3, 7)))
    (total, pairs), gradient = value_and_gradient(step_loss("any_order", WEIGHT), model, params, batch)
    alone = {name: value_and_gradient(LOSSES[name], model, params, batch) for name in LOSSES}
    ((query, query_weight), d_query), ((ahead, ahead_weight), d_ahead) = alone["any_order"], alone["ar"]
    np.testing.assert_allclose(pairs["loss"], (query, query_weight), rtol=1e-5)
    np.testing.assert_allclose(pairs["content_loss"], (ahead, ahead_weight), rtol=1e-5)
    np.testing.assert_allclose(total, query + WEIGHT * ahead, rtol=1e-5)
    expected = jax.tree.map(lambda q, a: q + WEIGHT * a, d_query, d_ahead)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4), gradient, expected)
    assert ahead_weight == 7 + 4 + 0


def test_is_nothing_in_larger_groups(model_and_params):
    model, params = model_and_params
    batch = sorted_rows(0, batch=3, length=8, group_size=2)
    (total, pairs), gradient = value_and_gradient(step_loss("any_order", WEIGHT), model, params, batch)
    (query, _), expected = value_and_gradient(LOSSES["any_order"], model, params, batch)
    assert [float(value) for value in pairs["content_loss"]] == [0.0, 0.0]
    np.testing.assert_allclose(total, query, rtol=1e-6)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4), gradient, expected)


def test_metrics_of_a_step():
    """`loss` stays the query stream's; `content_loss` is there with a weight alone, 0 where no row counts."""
    mesh = one_device()
    groups, found = sorted_rows(0, batch=4, length=8, group_size=2), {}
    batches = {"none": groups, "all": in_reading_order(groups)}
    for weight in (0.0, WEIGHT):
        model, adamw, state = tiny_state(mesh)
        step = make_train_step(
            model, adamw, mesh, objective="any_order", microbatches=2, content_loss_weight=weight
        )
        for name, batch in batches.items():
            state, metrics = step(state, batch, np.float32(0.0))  # a rate of 0: the same parameters
            found[name, weight] = jax.device_get(metrics)
    for name in batches:
        without, having = found[name, 0.0], found[name, WEIGHT]
        assert having.keys() - without.keys() == {"content_loss"} and without.keys() <= having.keys()
        np.testing.assert_allclose(without["loss"], having["loss"], rtol=1e-5)
    assert found["none", WEIGHT]["content_loss"] == 0.0
    ahead, weight = make_loss(model, objective="ar")(state.params, batches["all"])
    np.testing.assert_allclose(found["all", WEIGHT]["content_loss"], ahead / weight, rtol=1e-5)
