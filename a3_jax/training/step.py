"""One optimiser step: rows to intervals, intervals to loss, loss to new parameters.

    batch [B, T] --split--> M microbatches of B / M rows
    each: ranks --bounds--> start, limit --two streams--> hidden --head--> (sum, weight), gradient of the sum
    sum of gradients / sum of weights --clip, AdamW--> parameters

Gradients of sums are added and divided once, by the weight of the whole batch: microbatches with
different numbers of predicted tokens give the same step as one large batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from a3_jax.model.sharding import replicated
from a3_jax.model.two_stream import Rows, TwoStream, run_rows
from a3_jax.ordering.intervals import bounds
from a3_jax.training.loss import cross_entropy
from a3_jax.training.state import TrainState, state_shardings

Batch = dict[str, Any]  # tokens, positions, segment_ids, ranks: int32 [B, T]; weights: float32 [B, T]


def any_order_loss(model: TwoStream, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every token given the groups before its own, from the query stream.

    Returns:
      (sum in nats, sum of weights), float32 scalars.
    """
    content, query = _rows(batch)
    outputs = run_rows(model, params, content, query)
    return _loss(model, params, outputs.query, batch["tokens"], batch["weights"])


def ar_loss(model: TwoStream, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each document's next token, from the content stream alone.

    Rows must be in reading order with rank = position (`Stage.objective == "ar"`). A document's
    first token is not predicted.

    Returns:
      (sum in nats, sum of weights), float32 scalars.
    """
    content, _ = _rows(batch)
    outputs = run_rows(model, params, content, outputs="content")
    segments, next_row = batch["segment_ids"], functools.partial(jnp.roll, shift=-1, axis=1)
    has_next = (segments != 0) & (next_row(segments) == segments)
    has_next = has_next.at[:, -1].set(False)  # what follows there is the row's own beginning
    return _loss(
        model, params, outputs.content, next_row(batch["tokens"]), next_row(batch["weights"]) * has_next
    )


LOSSES: dict[str, Callable] = {"any_order": any_order_loss, "ar": ar_loss}


def gradients(loss: Callable, params, batch: Batch, microbatches: int):
    """The loss of a batch and its gradient, a microbatch at a time.

    Args:
      loss: (params, batch) -> (sum, weight).
      params: parameter tree.
      batch: arrays [B, T]; B is a multiple of `microbatches`.
      microbatches: how many pieces; activations of one piece are alive at a time.

    Returns:
      (mean loss in nats a predicted token, sum of weights, gradient of the mean).
    """

    def split(array):  # row b goes to piece b % M: the rows of a device stay on it
        return array.reshape(-1, microbatches, *array.shape[1:]).swapaxes(0, 1)

    def sums(piece):
        (loss_sum, weight), gradient = jax.value_and_grad(loss, has_aux=True)(params, piece)
        return loss_sum, weight, gradient

    if microbatches == 1:
        loss_sum, weight, gradient = sums(batch)
    else:
        zero = jnp.zeros((), jnp.float32)
        totals = (zero, zero, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
        (loss_sum, weight, gradient), _ = jax.lax.scan(
            lambda totals, piece: (jax.tree.map(jnp.add, totals, sums(piece)), None),
            totals,
            jax.tree.map(split, batch),
        )
    divisor = jnp.maximum(weight, 1e-6)  # nothing to predict: a loss and gradient of zero
    return loss_sum / divisor, weight, jax.tree.map(lambda g: g / divisor, gradient)


def train_step(model, optimizer, loss, microbatches, state: TrainState, batch: Batch, learning_rate):
    """One optimiser step.

    Args:
      model, optimizer, loss, microbatches: static; see `make_train_step`.
      state: is given up, its buffers are used again.
      batch: arrays [B, T].
      learning_rate: float32 scalar, traced: another rate is no other program.

    Returns:
      (new state, metrics), metrics being float32 scalars: `loss` in nats a predicted token,
      `grad_norm` before clipping, `tokens`: rows that are not padding.
    """
    mean, _, gradient = gradients(
        lambda params, piece: loss(model, params, piece), state.params, batch, microbatches
    )
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
    metrics = {
        "loss": mean,
        "grad_norm": optax.tree.norm(gradient),
        "tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
    }
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def make_train_step(
    model: TwoStream,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    objective: str,
    microbatches: int,
):
    """The compiled `(state, batch, learning_rate) -> (state, metrics)` of an objective, on a mesh."""
    loss = LOSSES[objective]

    def step(state, batch, learning_rate):
        return train_step(model, optimizer, loss, microbatches, state, batch, learning_rate)

    shardings = state_shardings(model.config, optimizer, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_reset(optimizer: optax.GradientTransformation, model: TwoStream, mesh: Mesh):
    """The compiled `state -> state` with a fresh optimiser: zero moments, count 0."""
    shardings = state_shardings(model.config, optimizer, mesh)
    return jax.jit(
        lambda state: state.replace(opt_state=optimizer.init(state.params)), out_shardings=shardings
    )


def make_loss(model: TwoStream, *, objective: str):
    """The compiled `(params, batch) -> (sum in nats, weight)` of an objective, without gradient."""

    def loss(params, batch):
        return LOSSES[objective](model, params, batch)

    return jax.jit(loss)


def _rows(batch):
    """Content and query rows of a sorted batch: the same tokens, seen from their own group or before it."""
    with jax.named_scope("intervals"):
        start, content_limit, query_limit = bounds(batch["ranks"], batch["ranks"], batch["segment_ids"])
    positions = batch["positions"]
    content = Rows(positions=positions, start=start, limit=content_limit, tokens=batch["tokens"])
    return content, Rows(positions=positions, start=start, limit=query_limit)


def _loss(model, params, hidden, targets, weights):
    tied = model.config.tie_embeddings
    head = params["embed" if tied else "head"]
    return cross_entropy(hidden, head, targets, weights, vocab_first=tied, precision=model.precision)
