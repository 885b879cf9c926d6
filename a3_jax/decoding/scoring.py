"""The log-probability of any tokens given any others, in one forward.

    p(x_A | x_B):  content rows for B and A, query rows for A alone, sorted by rank

Tokens neither given nor scored are absent: they have no row, while positions keep their gap.

    token           the  cat  sat  .          p(cat, sat | the): the point is absent
    rank             0    2    1
    content rows    the  sat  cat             sorted by rank
    query rows           sat  cat             each sees the content rows of lower rank

A request of several orders is as many rows of a batch, like several requests.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from a3_jax.decoding.batching import batches, bucket
from a3_jax.decoding.options import ScoreOptions, make_options
from a3_jax.decoding.requests import ScoreRequest, item_lines, score_requests
from a3_jax.decoding.sampling import map_rows
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import axis_parts, mesh_of
from a3_jax.model.two_stream import Rows, logits, make_two_stream, run_rows
from a3_jax.ordering.intervals import bounds, sort_order, take_rows


def score(checkpoint, items, **options) -> list[dict[str, Any]]:
    """Returns exact log-probabilities under any grouping and order.

        score(checkpoint, [{"tokens": [5, 7, 2], "ranks": [1, 0, 1]}])
        score(checkpoint, [{"text": "The cat sat.", "order": "random", "group_size": 2, "context": 1}])
        score(checkpoint, [{"text": "The cat sat.", "seed": 3}], orders=8)

    Args:
      checkpoint: a `Checkpoint`, see `a3_jax.open_checkpoint`.
      items: dicts with "tokens" or "text", and "ranks" or "order", "group_size", "seed"; also "context",
        "scored", "absent", "positions".
      options: fields of `ScoreOptions`.

    Returns:
      For each item {"logprobs", "logprob"} in natural logarithms, lists in the item's token order, None
      where not scored; items of text also carry "tokens". With `orders` above 1 they are means over the
      orders, and there are also "orders" (the log-probability under each), "log_mean_exp" (that of the
      orders' mixture) and "order_gap" (their standard deviation, nats per scored token).

    Raises:
      InputError: a bad item or option, before anything is computed.
    """
    return score_lines(checkpoint, item_lines(items), make_options(ScoreOptions, options))


def score_lines(checkpoint, lines, options: ScoreOptions) -> list[dict[str, Any]]:
    """Runs `score` of lines that know their file and number."""
    requests = score_requests(lines, checkpoint, options)
    passes = [_Pass(request, number) for request in requests for number in range(options.orders)]
    tallies = [_Tally(request) for request in requests]
    for index, scores in run_passes(
        checkpoint, passes, _shape_of, _rows_of, model=options.model, dtype=options.compute_dtype
    ):
        tallies[index // options.orders].add(scores.logprobs)
    return [_result(tally) for tally in tallies]


@dataclasses.dataclass(frozen=True)
class PassRows:
    """The input of one forward: T tokens in any order, all of them present.

    Attributes:
      tokens, positions, ranks: [T] int32.
      scored: [T] bool.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ranks: np.ndarray
    scored: np.ndarray


class PassScores(NamedTuple):
    """Scores of the Q scored tokens of a pass, in the order of its tokens.

    Attributes:
      logprobs: [Q] float32, in nats.
      likeliest: [Q] bool, whether no other token is likelier, or as likely and of a lower id.
    """

    logprobs: np.ndarray
    likeliest: np.ndarray


def run_passes(
    checkpoint,
    passes,
    shape_of,
    rows_of,
    *,
    model: str,
    dtype: str,
    most: int | None = None,
    padded_count=lambda shape, count: bucket(count, 1),
) -> Iterator[tuple[int, PassScores]]:
    """Runs forwards, those of one padded shape together.

    Args:
      checkpoint: a `Checkpoint`.
      passes: anything.
      shape_of: a pass -> its (content rows, query rows), padded.
      rows_of: a pass -> `PassRows`, asked for when its batch is made.
      model: "a3" scores with query rows; "ar" with the content row before, `ranks` being the reading order.
      dtype: that of the computation, by name.
      most: passes per batch, at most; None: as many as their rows allow.
      padded_count: (padded shape, passes of a batch) -> batch size after padding.

    Yields:
      (index into `passes`, `PassScores` [Q]), in order within a shape.
    """
    logprobs_of = left_logprobs if model == "ar" else any_order_logprobs
    waiting: list[tuple[list[int], Any, np.ndarray]] = []
    for shape, indices, _ in batches(passes, shape_of, most):
        with mesh_of(checkpoint.params):
            rows = math.lcm(padded_count(shape, len(indices)), axis_parts("batch"))
            # Rows of a request are made when their batch is packed: those of all orders may not fit memory.
            batch = _pack([rows_of(passes[index]) for index in indices], shape, rows)
            out = logprobs_of(checkpoint.params, batch, config=checkpoint.config, dtype=dtype)
        waiting.append((indices, out, batch.is_scored))
        if len(waiting) > 1:  # read a batch late: the next one is packed while this one is computed
            yield from _read(*waiting.pop(0))
    for dispatched in waiting:
        yield from _read(*dispatched)


def _read(indices, out, is_scored) -> Iterator[tuple[int, PassScores]]:
    logprobs, likeliest = np.asarray(out.logprobs), np.asarray(out.likeliest)
    for row, index in enumerate(indices):
        yield index, PassScores(logprobs[row, is_scored[row]], likeliest[row, is_scored[row]])


class _Pass(NamedTuple):
    """A request under one of its orders: one forward."""

    request: ScoreRequest
    number: int


class _Tally:
    """Sums over the orders of a request so far; they come in the order of their numbers.

    Attributes:
      logprobs: [Q] float64, those of the Q scored tokens, summed over the orders.
      joints: under each order, the log-probability of all of them.
    """

    def __init__(self, request: ScoreRequest):
        self.request = request
        self.logprobs = np.zeros(int(request.scored.sum()))
        self.joints: list[float] = []

    def add(self, scored_logprobs) -> None:
        """Adds another order's log-probabilities; their sum is taken in float64."""
        values = np.asarray(scored_logprobs, np.float64)
        self.logprobs += values
        self.joints.append(float(sum(values.tolist())))


def _shape_of(pass_: _Pass) -> tuple[int, int]:
    """Returns (content rows, query rows), padded: rows of what is present, and of what is scored."""
    request = pass_.request
    return bucket(int(request.present.sum())), bucket(int(request.scored.sum()))


def _rows_of(pass_: _Pass) -> PassRows:
    request, number = pass_
    present = request.present
    columns = (request.tokens, request.positions, request.ranks(number), request.scored)
    return PassRows(*(column[present] for column in columns))


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


class Scored(NamedTuple):
    """`PassScores` of a batch, padding and all: [B, Tq] each."""

    logprobs: Any
    likeliest: Any


def _pack(passes: list[PassRows], shape, batch_size) -> Batch:
    rows, scored_rows = shape
    batch = Batch(
        *(np.zeros((batch_size, rows), np.int32) for _ in range(4)),
        scored=np.zeros((batch_size, scored_rows), np.int32),
        is_scored=np.zeros((batch_size, scored_rows), bool),
    )
    for index, pass_ in enumerate(passes):
        length, columns = len(pass_.tokens), np.flatnonzero(pass_.scored)
        batch.tokens[index, :length] = pass_.tokens
        batch.positions[index, :length] = pass_.positions
        batch.ranks[index, :length] = pass_.ranks
        batch.segment_ids[index, :length] = 1
        batch.scored[index, : len(columns)] = columns
        batch.is_scored[index, : len(columns)] = True
    return batch


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def any_order_logprobs(params, batch: Batch, *, config: ModelConfig, dtype: str):
    """Returns `Scored` [B, Tq]: log p(scored token | tokens of lower rank), from query rows of its own."""
    model = make_two_stream(config, dtype)
    content, visible, sorted_row_BQ = _sorted_rows(batch)
    limit_BQ = jnp.take_along_axis(visible.query_limit, sorted_row_BQ, axis=1)
    limit_BQ = jnp.where(batch.is_scored, limit_BQ, 0)
    query = Rows(
        positions=jnp.take_along_axis(batch.positions, batch.scored, axis=1),
        start=jnp.zeros_like(limit_BQ),  # one request per row of the batch: its keys begin at 0
        limit=limit_BQ,
    )
    out = run_rows(model, params, content, query)
    return _target_logprobs(params, batch, out.query, config, model.precision)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def left_logprobs(params, batch: Batch, *, config: ModelConfig, dtype: str):
    """Returns `Scored` [B, Tq]: log p(scored token | tokens to its left), from the content row before it.

    `batch.ranks` are the reading order; the first token of a request is never scored.
    """
    model = make_two_stream(config, dtype)
    content, _, sorted_row_BQ = _sorted_rows(batch)
    out = run_rows(model, params, content, outputs="content")
    before_BQ1 = jnp.maximum(sorted_row_BQ - 1, 0)[..., None]
    hidden_BQD = jnp.take_along_axis(out.content, before_BQ1, axis=1)
    return _target_logprobs(params, batch, hidden_BQD, config, model.precision)


def _sorted_rows(batch: Batch):
    """Returns content rows sorted by rank, their `Bounds` [B, T], and where scored tokens are, [B, Tq]."""
    order_BT = sort_order(batch.ranks, batch.segment_ids)
    tokens_BT, positions_BT, ranks_BT, segments_BT = take_rows(
        order_BT, batch.tokens, batch.positions, batch.ranks, batch.segment_ids
    )
    visible = bounds(ranks_BT, ranks_BT, segments_BT)
    content = Rows(positions_BT, visible.start, visible.content_limit, tokens_BT)
    # `order` lists the input's columns as they are sorted; its inverse says which sorted row a column is.
    return content, visible, jnp.take_along_axis(jnp.argsort(order_BT, axis=1), batch.scored, axis=1)


def _target_logprobs(params, batch, hidden_BQD, config, precision) -> Scored:
    def one_row(hidden_D, target):
        scores_V = logits(params, config, hidden_D, precision)
        score, ids_V = scores_V[target], jnp.arange(config.vocab_size)
        better_V = (scores_V > score) | ((scores_V == score) & (ids_V < target))
        # No log-softmax of all V is written down.
        return Scored(score - jax.nn.logsumexp(scores_V), ~jnp.any(better_V))

    targets_BQ = jnp.take_along_axis(batch.tokens, batch.scored, axis=1)
    return map_rows(one_row, (hidden_BQD, targets_BQ), config.vocab_size)


def _result(tally: _Tally) -> dict[str, Any]:
    """Makes one output object: means over the orders, and how several orders differ."""
    request, count = tally.request, len(tally.joints)
    values = iter((tally.logprobs / count).tolist())
    result: dict[str, Any] = {"tokens": request.tokens.tolist()} if request.from_text else {}
    result |= {
        "logprobs": [next(values) if scored else None for scored in request.scored],
        "logprob": float(np.mean(tally.joints)),
    }
    return result if count == 1 else result | _spread(tally)


def _spread(tally: _Tally) -> dict[str, Any]:
    """Returns how the orders of a line differ.

    Returns:
      log_mean_exp: log(1/M sum exp(joint)), the likelihood of the mixture of the M orders; at least
        the mean of the joints.
      order_gap: standard deviation of the joints over the number of scored tokens, in nats per token; 0
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
