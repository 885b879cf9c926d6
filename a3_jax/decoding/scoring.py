"""The log-probability of any tokens given any others, in one forward.

    p(x_A | x_B):  content rows for B and A, query rows for A alone, sorted by rank

Tokens neither given nor scored are simply absent: no row, while positions keep their gap. A request of
several orders is as many rows of a batch, like several requests.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from a3_jax.decoding.batching import batches, bucket
from a3_jax.decoding.loop import default_dtype, two_stream
from a3_jax.decoding.options import ScoreOptions, make_options
from a3_jax.decoding.requests import ScoreRequest, item_lines, score_requests
from a3_jax.decoding.sampling import map_rows
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import axis_parts, mesh_of
from a3_jax.model.two_stream import Rows, logits, run_rows
from a3_jax.ordering.intervals import bounds, sort_order, take_rows


def score(checkpoint, items, **options) -> list[dict[str, Any]]:
    """Exact log-probabilities under any grouping and order.

        score(checkpoint, [{"tokens": [5, 7, 2], "ranks": [1, 0, 1]}])
        score(checkpoint, [{"text": "The cat sat.", "order": "random", "group_size": 2, "context": 1}])
        score(checkpoint, [{"text": "The cat sat.", "seed": 3}], orders=8)

    Args:
      checkpoint: of `a3_jax.open_checkpoint`.
      items: dicts with "tokens" or "text", and "ranks" or "order", "group_size", "seed"; also "context",
        "scored", "absent", "positions".
      options: fields of `ScoreOptions`.

    Returns:
      For each item {"logprobs", "logprob"} in natural logarithms, lists in the item's token order, None
      where not scored; items of text also carry "tokens". With `orders` above 1 they are means over the
      orders, and there are also "orders" (the log-probability under each), "log_mean_exp" (that of the
      orders' mixture) and "order_gap" (their standard deviation, nats a scored token).

    Raises:
      InputError: a bad item or option, before anything is computed.
    """
    return score_lines(checkpoint, item_lines(items), make_options(ScoreOptions, options))


def score_lines(checkpoint, lines, options: ScoreOptions) -> list[dict[str, Any]]:
    """`score` of lines that know where they stand."""
    requests = score_requests(lines, checkpoint, options)
    dtype = options.dtype or default_dtype()
    logprobs_of = left_logprobs if options.model == "ar" else any_order_logprobs
    passes = [_Pass(request, number) for request in requests for number in range(options.orders)]
    tallies = [_Tally(request) for request in requests]
    for shape, indices, batch_size in batches(passes, _shape_of):
        with mesh_of(checkpoint.params):
            rows = math.lcm(batch_size, axis_parts("batch"))
            batch = _pack([passes[index] for index in indices], shape, rows)
            logprobs = logprobs_of(checkpoint.params, batch, config=checkpoint.config, dtype=dtype)
        logprobs = np.asarray(logprobs)
        for row, index in enumerate(indices):
            tallies[index // options.orders].add(logprobs[row])
    return [_result(tally) for tally in tallies]


class _Pass(NamedTuple):
    """A request under one of its orders: what one forward computes."""

    request: ScoreRequest
    number: int


class _Tally:
    """What the orders of a request gave so far; they come in the order of their numbers.

    Attributes:
      logprobs: [Q] float64, of the Q scored tokens, summed over the orders.
      joints: the log-probability of all of them, of each order.
    """

    def __init__(self, request: ScoreRequest):
        self.request = request
        self.logprobs = np.zeros(int(request.scored.sum()))
        self.joints: list[float] = []

    def add(self, scored_logprobs) -> None:
        """Another order's log-probabilities, padding behind them; their sum is taken in float64."""
        values = np.asarray(scored_logprobs[: len(self.logprobs)], np.float64)
        self.logprobs += values
        self.joints.append(float(sum(values.tolist())))


def _shape_of(pass_: _Pass) -> tuple[int, int]:
    """(content rows, query rows), padded: rows of what is present, and of what is scored."""
    request = pass_.request
    return bucket(int(request.present.sum())), bucket(int(request.scored.sum()))


@struct.dataclass
class Batch:
    """Padded requests in the input's order, what is absent left out.

    Attributes:
      tokens, positions, ranks: [B, T] int32.
      segment_ids: [B, T] int32, 1, or 0 at padding.
      scored: [B, Tq] int32, the columns to score; any column at padding.
      is_scored: [B, Tq] bool, False at padding.
    """

    tokens: Any
    positions: Any
    ranks: Any
    segment_ids: Any
    scored: Any
    is_scored: Any


def _pack(passes: list[_Pass], shape, batch_size) -> Batch:
    rows, scored_rows = shape
    batch = Batch(
        *(np.zeros((batch_size, rows), np.int32) for _ in range(4)),
        scored=np.zeros((batch_size, scored_rows), np.int32),
        is_scored=np.zeros((batch_size, scored_rows), bool),
    )
    for index, (request, number) in enumerate(passes):
        present = request.present
        length, columns = int(present.sum()), np.flatnonzero(request.scored[present])
        batch.tokens[index, :length] = request.tokens[present]
        batch.positions[index, :length] = request.positions[present]
        batch.ranks[index, :length] = request.ranks(number)[present]
        batch.segment_ids[index, :length] = 1
        batch.scored[index, : len(columns)] = columns
        batch.is_scored[index, : len(columns)] = True
    return batch


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def any_order_logprobs(params, batch: Batch, *, config: ModelConfig, dtype: str):
    """[B, Tq] float32: log p(scored token | tokens of lower rank), from query rows of the scored tokens."""
    model = two_stream(config, dtype)
    content, visible, order = _sorted_rows(batch)
    place = jnp.take_along_axis(jnp.argsort(order, axis=1), batch.scored, axis=1)
    limit = jnp.where(batch.is_scored, jnp.take_along_axis(visible.query_limit, place, axis=1), 0)
    query = Rows(
        positions=jnp.take_along_axis(batch.positions, batch.scored, axis=1),
        start=jnp.zeros_like(limit),
        limit=limit,
    )
    out = run_rows(model, params, content, query)
    return _target_logprobs(params, batch, out.query, config, model.precision)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def left_logprobs(params, batch: Batch, *, config: ModelConfig, dtype: str):
    """[B, Tq] float32: log p(scored token | tokens to its left), from the content row before it.

    `batch.ranks` are the reading order; the first token of a request is never scored.
    """
    model = two_stream(config, dtype)
    content, _, order = _sorted_rows(batch)
    place = jnp.take_along_axis(jnp.argsort(order, axis=1), batch.scored, axis=1)
    out = run_rows(model, params, content, outputs="content")
    before = jnp.take_along_axis(out.content, jnp.maximum(place - 1, 0)[..., None], axis=1)
    return _target_logprobs(params, batch, before, config, model.precision)


def _sorted_rows(batch: Batch):
    """Content rows sorted by rank, their `Bounds`, and the permutation: [B, T] each."""
    order = sort_order(batch.ranks, batch.segment_ids)
    tokens, positions, ranks, segments = take_rows(
        order, batch.tokens, batch.positions, batch.ranks, batch.segment_ids
    )
    visible = bounds(ranks, ranks, segments)
    return Rows(positions, visible.start, visible.content_limit, tokens), visible, order


def _target_logprobs(params, batch, hidden_BTD, config, precision):
    def one_row(hidden_D, target):
        scores_V = logits(params, config, hidden_D, precision)
        return scores_V[target] - jax.nn.logsumexp(scores_V)  # no log-softmax of all V is written down

    targets = jnp.take_along_axis(batch.tokens, batch.scored, axis=1)
    return map_rows(one_row, (hidden_BTD, targets), config.vocab_size)


def _result(tally: _Tally) -> dict[str, Any]:
    """One output object: means over the orders, and what several orders say of each other."""
    request, count = tally.request, len(tally.joints)
    values = iter((tally.logprobs / count).tolist())
    result: dict[str, Any] = {"tokens": request.tokens.tolist()} if request.from_text else {}
    result |= {
        "logprobs": [next(values) if scored else None for scored in request.scored],
        "logprob": float(np.mean(tally.joints)),
    }
    return result if count == 1 else result | _spread(tally)


def _spread(tally: _Tally) -> dict[str, Any]:
    """How the orders of a line differ.

    Returns:
      log_mean_exp: log(1/M sum exp(joint)), the likelihood of the mixture of the M orders; at least
        the mean of the joints.
      order_gap: standard deviation of the joints over the number of scored tokens, in nats a token; 0
        for a model that is consistent over these orders.
      orders: the joints, by the number of the order.
    """
    joints = np.array(tally.joints)
    largest = joints.max()  # taken out, lest all exponentials underflow
    return {
        "log_mean_exp": float(largest + np.log(np.mean(np.exp(joints - largest)))),
        "order_gap": float(joints.std() / max(len(tally.logprobs), 1)),
        "orders": tally.joints,
    }
