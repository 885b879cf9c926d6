"""One optimiser step: rows to intervals, intervals to loss, loss to new parameters.

    batch [B, T] --split--> M microbatches of B / M rows
    each: ranks --bounds--> start, limit --two streams--> hidden --head--> (sum, weight), gradient of the sum
    sum of gradients / sum of weights --clip, AdamW--> parameters

Gradients of sums are added and divided once, by the weight of the whole batch: microbatches with
different numbers of predicted tokens give the same step as one large batch.

A stage may add a next-token loss of the content rows (`content_loss_weight`): then a step minimises
(query sum + weight * content sum) / predicted tokens, and reports both losses apart.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from a3_jax.model.sharding import replicated
from a3_jax.model.two_stream import Rows, TwoStream, run_rows
from a3_jax.ordering.curriculum import Stage
from a3_jax.ordering.intervals import bounds
from a3_jax.training.loss import cross_entropy
from a3_jax.training.train_state import TrainState, state_shardings

Batch = dict[str, Any]  # tokens, positions, segment_ids, ranks: int32 [B, T]; weights: float32 [B, T]
Pairs = dict[str, tuple[jax.Array, jax.Array]]  # loss -> (sum in nats, sum of weights): float32 scalars


def any_order_loss(model: TwoStream, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of every token given the groups before its own, from the query stream.

    Returns:
      (sum in nats, sum of weights), float32 scalars.
    """
    content, query = _rows(batch)
    outputs = run_rows(model, params, content, query)
    return _loss(model, params, outputs.query, batch["tokens"], batch["weights"])


def ar_loss(model: TwoStream, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of each document's next token, from the content stream alone.

    Rows must be in reading order with rank = position (`Stage.objective == "ar"`). A document's
    first token is not predicted.

    Returns:
      (sum in nats, sum of weights), float32 scalars.
    """
    content, _ = _rows(batch)
    outputs = run_rows(model, params, content, outputs="content")
    segments_BT = batch["segment_ids"]
    has_next_BT = (segments_BT != 0) & (_next_row(segments_BT) == segments_BT)
    has_next_BT = has_next_BT.at[:, -1].set(False)  # what follows there is the row's own beginning
    weights_BT = _next_row(batch["weights"]) * has_next_BT
    return _loss(model, params, outputs.content, _next_row(batch["tokens"]), weights_BT)


def masked_loss(model: TwoStream, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of masked tokens given the rest, each over its document's t.

    Content rows alone, which all see their whole document, as in LLaDA (arXiv 2502.09992, equation 3);
    with `ModelConfig.logit_shift` the row before a token predicts it, except for the first.

    Returns:
      (sum in nats, number of tokens that may be masked), float32 scalars: the mean is a bound.
    """
    # A weight is 1/t at masked tokens, -1 at those that might have been, and 0 elsewhere.
    config, weights_BT = model.config, batch["weights"]
    masked = {**batch, "tokens": jnp.where(weights_BT > 0, config.mask_token or 0, batch["tokens"])}
    hidden_BTD = run_rows(model, params, _rows(masked)[0], outputs="content").content
    if config.logit_shift:
        is_first_BT1 = (batch["positions"] == 0)[..., None]
        hidden_BTD = jnp.where(is_first_BT1, hidden_BTD, jnp.roll(hidden_BTD, 1, axis=1))
    total, _ = _loss(model, params, hidden_BTD, batch["tokens"], jnp.maximum(weights_BT, 0))
    return total, jnp.sum(weights_BT != 0, dtype=jnp.float32)


def mixed_loss(model: TwoStream, params, batch: Batch, content_loss_weight: float) -> tuple[jax.Array, Pairs]:
    """Returns the any-order loss, and the next-token loss of the content rows that may have one, in one pass.

    Returns:
      (sum of both, the content rows' times `content_loss_weight`; each loss by itself): float32 scalars.
    """
    content, query = _rows(batch)
    outputs = run_rows(model, params, content, query, outputs="both")
    any_order = _loss(model, params, outputs.query, batch["tokens"], batch["weights"])
    next_token = _loss(model, params, outputs.content, _next_row(batch["tokens"]), next_token_weights(batch))
    return any_order[0] + content_loss_weight * next_token[0], {"loss": any_order, "content_loss": next_token}


def next_token_weights(batch: Batch) -> jax.Array:
    """Marks the content rows that are trained on their next token, float32 [B, T].

    Those of examples in which every rank is the position: in a larger group, or in another order, a
    content row sees what it would have to predict. Of these, rows that are followed by the next
    position of their own document, if the token there is predicted.

        position   0  1  2  3  |  0  1  .        0  1  2  3  |  0  1  .
        rank       0  1  2  3  |  0  1  .        0  0  1  1  |  0  0  .
        weight     1  1  1  0  |  1  0  0        0  0  0  0  |  0  0  0
    """
    positions_BT, segments_BT = batch["positions"], batch["segment_ids"]
    at_position_BT = (segments_BT == 0) | (batch["ranks"] == positions_BT)
    in_reading_order_B1 = jnp.all(at_position_BT, axis=1, keepdims=True)
    # After the last row comes the first, of position 0, which follows nothing.
    is_next_BT = (_next_row(segments_BT) == segments_BT) & (_next_row(positions_BT) == positions_BT + 1)
    return _next_row(batch["weights"]) * (in_reading_order_B1 & is_next_BT & (segments_BT != 0))


LOSSES: dict[str, Callable] = {
    "any_order": any_order_loss, "ar": ar_loss, "masked_diffusion": masked_loss,
}  # fmt: skip


def step_kind(stage: Stage) -> tuple[str, float]:
    """Returns the settings of a stage that its program depends on: (objective, content loss weight)."""
    return stage.objective, stage.content_loss_weight


def step_loss(objective: str, content_loss_weight: float = 0.0) -> Callable[..., tuple[jax.Array, Pairs]]:
    """Makes the function to minimise: (model, params, batch) -> (sum in nats, its losses), scalars."""
    if content_loss_weight:
        return functools.partial(mixed_loss, content_loss_weight=content_loss_weight)

    def loss(model, params, batch):
        total, weight = LOSSES[objective](model, params, batch)
        return total, {"loss": (total, weight)}

    return loss


def gradients(loss: Callable, params, batch: Batch, microbatches: int):
    """Returns the losses of a batch and the gradient of what is minimised, one microbatch at a time.

    Args:
      loss: (params, batch) -> (sum, pairs), see `step_loss`; the pair "loss" has the weight that the
        gradient of the sum is divided by.
      params: parameter tree.
      batch: arrays [B, T]; B is a multiple of `microbatches`.
      microbatches: M, the number of pieces; activations of one piece are alive at a time.

    Returns:
      (pairs of the whole batch, gradient of the sum per predicted token).
    """

    def split(array):
        # [B, T] -> [B / M, M, T] -> [M, B / M, T]: row b goes to piece b % M. A device has neighbouring
        # rows, so that every piece has some of each device's, and none travels.
        return array.reshape(-1, microbatches, *array.shape[1:]).swapaxes(0, 1)

    def sums(piece):
        (_, pairs), gradient = jax.value_and_grad(loss, has_aux=True)(params, piece)
        return pairs, gradient

    if microbatches == 1:
        pairs, gradient = sums(batch)
    else:
        # Sums start from zeros of the losses' structure, float32 whatever the gradients are in.
        pieces = jax.tree.map(split, batch)
        of_piece = jax.eval_shape(lambda: loss(params, jax.tree.map(lambda rows: rows[0], pieces))[1])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (of_piece, params))
        (pairs, gradient), _ = jax.lax.scan(
            lambda totals, piece: (jax.tree.map(jnp.add, totals, sums(piece)), None), zeros, pieces
        )
    divisor = _divisor(pairs["loss"][1])
    return pairs, jax.tree.map(lambda g: g / divisor, gradient)


def train_step(model, optimizer, loss, microbatches, state: TrainState, batch: Batch, learning_rate):
    """Does one optimiser step; parameters and optimiser stay as they are without a finite loss and gradient.

    So they do in a batch with nothing to predict, which counts as a step all the same.

    Args:
      model, optimizer, microbatches: static; see `make_train_step`.
      loss: a function made by `step_loss`.
      state: donated: its buffers are used again.
      batch: arrays [B, T].
      learning_rate: float32 scalar, traced: a new rate compiles nothing.

    Returns:
      (new state, metrics), metrics being float32 scalars: `loss` in nats per predicted token (and
      `content_loss`, if there is one, in nats per content row that counts; 0 where none does),
      `grad_norm` before clipping, `tokens`: rows that are not padding, `predicted`: the weight of those
      whose loss it is (at 0 there is no loss, and `loss` means nothing), `skipped`: consecutive steps, up
      to this one, without a finite loss and gradient.
    """
    pairs, gradient = gradients(
        lambda params, piece: loss(model, params, piece), state.params, batch, microbatches
    )
    losses = {name: total / _divisor(weight) for name, (total, weight) in pairs.items()}
    grad_norm = optax.tree.norm(gradient)
    # The norm is finite only if every gradient is: one number to test, and one to log.
    finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
    predicted = pairs["loss"][1]
    learns = finite & (predicted != 0)  # momentum and weight decay alone would move the parameters too
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        # Chosen by `where`, not by a branch: the update is made in any case, and no device value is read.
        params, opt_state = jax.tree.map(
            functools.partial(jnp.where, learns), (params, opt_state), (state.params, state.opt_state)
        )
    numerics = dataclasses.replace(
        state.numerics,
        in_a_row=jnp.where(finite, 0, state.numerics.in_a_row + 1),
        skipped=state.numerics.skipped + ~finite,
    )
    metrics = {
        **losses,
        "grad_norm": grad_norm,
        "tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
        "predicted": predicted,
        "skipped": numerics.in_a_row.astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, numerics), metrics


def make_train_step(
    model: TwoStream,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    objective: str,
    microbatches: int,
    content_loss_weight: float = 0.0,
):
    """Returns the compiled `(state, batch, learning_rate) -> (state, metrics)` of an objective, on a mesh."""
    loss = step_loss(objective, content_loss_weight)

    def step(state, batch, learning_rate):
        return train_step(model, optimizer, loss, microbatches, state, batch, learning_rate)

    shardings = state_shardings(model.config, optimizer, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_reset(optimizer: optax.GradientTransformation, model: TwoStream, mesh: Mesh):
    """Returns the compiled `state -> state` with a fresh optimiser: zero moments, count 0."""
    shardings = state_shardings(model.config, optimizer, mesh)
    return jax.jit(
        lambda state: dataclasses.replace(state, opt_state=optimizer.init(state.params)),
        out_shardings=shardings,
    )


def make_loss(model: TwoStream, *, objective: str):
    """Returns the compiled `(params, batch) -> (sum in nats, weight)` of an objective, without gradient."""

    def loss(params, batch):
        return LOSSES[objective](model, params, batch)

    return jax.jit(loss)


def _divisor(weight):
    return jnp.maximum(weight, 1e-6)  # nothing to predict: a loss and gradient of zero


def _next_row(array):
    """Returns an array shifted by one row: each row's successor, and the first row after the last."""
    return jnp.roll(array, shift=-1, axis=1)


def _rows(batch):
    """Returns content and query rows of a sorted batch: the same tokens, with or without their own group."""
    with jax.named_scope("intervals"):
        start, content_limit, query_limit = bounds(batch["ranks"], batch["ranks"], batch["segment_ids"])
    positions = batch["positions"]
    content = Rows(positions=positions, start=start, limit=content_limit, tokens=batch["tokens"])
    return content, Rows(positions=positions, start=start, limit=query_limit)


def _loss(model, params, hidden_BTD, targets_BT, weights_BT):
    c = model.config
    return cross_entropy(
        hidden_BTD, params["embed" if c.tie_embeddings else "head"], targets_BT, weights_BT,
        vocab_first=c.tie_embeddings, softcap=c.final_softcap, precision=model.precision,
    )  # fmt: skip
