"""Batches as a function of (seed, step).

    step s, place b in the batch -> running number  i = s * batch_size + b
    epoch e = i // R             -> row             permute(i mod R) under (seed, e)
    (seed, i)                    -> ranks           ordering.ranks.draw
    ranks                        -> sorted rows     ordering.intervals.sort_order

There is no iterator state: any step costs the same, on any number of hosts, after any restart.
Plain NumPy, but for `stream`, which runs it ahead of the reader through seqio.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from a3_jax.data.table import Table
from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import Order, Stage, stage_at
from a3_jax.ordering.intervals import sort_order, take_rows
from a3_jax.ordering.ranks import draw

Batch = dict[str, np.ndarray]

_FEISTEL_ROUNDS = 8
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that decides a run's batches.

    Attributes:
      table: the rows.
      stages: of the curriculum.
      seed: of the run.
      batch_size: B, examples a step over all hosts.
      host, num_hosts: this host has examples [host * B / num_hosts, (host + 1) * B / num_hosts).
    """

    table: Table
    stages: Sequence[Stage]
    seed: int
    batch_size: int
    host: int = 0
    num_hosts: int = 1

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.num_hosts:
            message = f"must be a multiple of the {self.num_hosts} hosts, got {self.batch_size}"
            raise InputError(message, field="batch_size")
        if not self.table.num_rows:
            raise InputError("holds no row to train on", field="data")

    def numbers(self, step: int) -> np.ndarray:
        """[B / num_hosts] int64: running numbers of this host's examples at a step."""
        share = self.batch_size // self.num_hosts
        return step * self.batch_size + self.host * share + np.arange(share, dtype=np.int64)


def batch(plan: Plan, step: int) -> Batch:
    """This host's part of the batch at a step: `examples`, then `arrange`."""
    return arrange(plan, **examples(plan, step))


def examples(plan: Plan, step: int) -> Batch:
    """The packed rows of a step, in reading order.

    Returns:
      number: [B] int64, running number of the example over all epochs.
      tokens, positions, segment_ids: [B, T] int32.
    """
    numbers = plan.numbers(step)
    epochs, places = np.divmod(numbers, plan.table.num_rows)
    rows = permute(places, plan.table.num_rows, plan.seed, epochs)
    table = plan.table
    return {
        "number": numbers,
        "tokens": table.tokens[rows],
        "positions": table.positions[rows],
        "segment_ids": table.segment_ids[rows],
    }


def arrange(plan: Plan, number, tokens, positions, segment_ids) -> Batch:
    """Draws each example's order and sorts its row by it.

    Args:
      plan: stages, seed and batch size are read.
      number: [B] int64, examples of one step.
      tokens, positions, segment_ids: [B, T] int32, in reading order.

    Returns:
      tokens, positions, segment_ids, ranks: [B, T] int32, sorted; weights: [B, T] float32, 1 where
      a token is predicted, 0 at padding.
    """
    step = int(number[0]) // plan.batch_size
    _, stage, _ = stage_at(plan.stages, step)
    drawn_by = np.full_like(number, step * plan.batch_size) if stage.one_order_per_batch else number
    return _sorted_rows(stage, plan.seed, drawn_by, tokens, positions, segment_ids)


def stream(
    table: Table,
    stages: Sequence[Stage],
    seed: int,
    batch_size: int,
    first_step: int = 0,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[Batch]:
    """`batch` of every step from `first_step` to the end of the curriculum, prepared ahead.

    Args:
      table, stages, seed, batch_size, host, num_hosts: as in `Plan`.
      first_step: counted from 0 over all stages.

    Yields:
      As `arrange`, B / num_hosts rows each.

    Raises:
      InputError: a batch size that the hosts can't share evenly.
    """
    from a3_jax.data.feature_converter import iterate  # TensorFlow: only when training data is read

    return iterate(Plan(table, stages, seed, batch_size, host, num_hosts), first_step)


def eval_batch(
    table: Table,
    order: str,
    group_size: int,
    seed: int,
    batch_size: int,
    max_batches: int | None = None,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[Batch]:
    """Fixed batches of each row once, in the table's order; the last is filled up with padding rows.

    Args:
      table: held-out rows.
      order: "l2r", "contiguous" or "random".
      group_size: tokens a group, not read by "l2r".
      seed: of the random order; row r always has the same.
      batch_size: B, rows a batch over all hosts.
      max_batches: only the first so many.
      host, num_hosts: as in `Plan`.

    Yields:
      As `arrange`.
    """
    sizes = (1,) if order == "l2r" else (group_size,)
    stage = Stage("eval", steps=-(-table.num_rows // batch_size), orders=(Order(order, sizes),))
    plan = Plan(table, (stage,), seed, batch_size, host, num_hosts)
    for step in range(stage.steps if max_batches is None else min(stage.steps, max_batches)):
        numbers = plan.numbers(step)
        rows = np.minimum(numbers, table.num_rows - 1)
        is_row = (numbers < table.num_rows)[:, None]
        picked = (array[rows] * is_row for array in (table.tokens, table.positions, table.segment_ids))
        yield _sorted_rows(stage, seed, numbers, *picked)


def permute(places, num_rows: int, seed: int, epochs) -> np.ndarray:
    """A keyed bijection of 0..num_rows-1, another for each (seed, epoch).

    A Feistel network over the smallest even number of bits that holds them all; what falls outside
    goes through again until it falls inside.

    Args:
      places: [n] int, each in 0..num_rows-1.
      num_rows: R.
      seed: of the run.
      epochs: [n] int.

    Returns:
      [n] int64, rows.
    """
    half_bits = np.uint64(max(1, (int(num_rows - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = _mix(_mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF)) ^ np.asarray(epochs).astype(np.uint64))
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right, key = values[outside] >> half_bits, values[outside] & mask, keys[outside]
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key + np.uint64(turn)) ^ right) & mask)
        values[outside] = left << half_bits | right
        outside = values >= num_rows
    return values.astype(np.int64)


def _mix(words):
    """SplitMix64's finaliser: a bijection of 64-bit words in which every bit depends on every other."""
    with np.errstate(over="ignore"):
        words = words + _GOLDEN_RATIO
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def _sorted_rows(stage: Stage, seed: int, numbers, tokens, positions, segment_ids) -> Batch:
    """Ranks drawn row by row under (seed, number), and everything sorted by them."""
    ranks = np.stack(
        [
            draw(stage, row, segments, seed, int(number))
            for row, segments, number in zip(positions, segment_ids, numbers, strict=True)
        ]
    )
    order = sort_order(ranks, segment_ids)
    names = ("tokens", "positions", "segment_ids", "ranks")
    batch = dict(zip(names, take_rows(order, tokens, positions, segment_ids, ranks)))
    return batch | {"weights": (batch["segment_ids"] != 0).astype(np.float32)}
