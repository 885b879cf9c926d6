"""Batches as a function of (seed, step).

    step s, place b in the batch -> running number  i = (s + skipped_batches) * batch_size + b
    epoch e = i // R             -> row             permute(i mod R) under (seed, e); see `mixing` for several
    (seed, i)                    -> ranks, absent   ordering.ranks.draw
    ranks                        -> sorted rows     ordering.intervals.sort_order

There is no iterator state: any step costs the same, on any number of hosts, after any restart.
Plain NumPy, but for `stream`, which runs it ahead of the reader through seqio.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from a3_jax.data.mixing import pick
from a3_jax.data.table import FILLER, GIVEN
from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import Order, Stage, stage_at
from a3_jax.ordering.intervals import sort_order, take_rows
from a3_jax.ordering.ranks import draw

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """All that decides a run's batches.

    Attributes:
      table: the rows: a `Table`, `ShardTable` or `Mixture` of them.
      stages: the curriculum's.
      seed: the run's.
      batch_size: B, examples per step over all hosts.
      host, num_hosts: this host has examples [host * B / num_hosts, (host + 1) * B / num_hosts).
      bos_id: the token that a document begins with, where there is one; read by stages that give it.
      skipped_batches: passed over: step s has the rows of step s + this.
    """

    table: Any
    stages: Sequence[Stage]
    seed: int
    batch_size: int
    host: int = 0
    num_hosts: int = 1
    bos_id: int | None = None
    skipped_batches: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.num_hosts:
            message = f"must be a multiple of the {self.num_hosts} hosts, got {self.batch_size}"
            raise InputError(message, field="batch_size")
        if not self.table.num_rows:
            raise InputError("holds no row to train on", field="data")

    def numbers(self, step: int) -> np.ndarray:
        """[B / num_hosts] int64: running numbers of this host's examples at a step."""
        share, batch = self.batch_size // self.num_hosts, step + self.skipped_batches
        return batch * self.batch_size + self.host * share + np.arange(share, dtype=np.int64)


def batch(plan: BatchPlan, step: int) -> Batch:
    """This host's part of the batch at a step: `examples`, then `arrange`."""
    return arrange(plan, **examples(plan, step))


def examples(plan: BatchPlan, step: int) -> Batch:
    """Returns the packed rows of a step, in reading order.

    Returns:
      number: [B] int64, running number of the example over all epochs.
      tokens, positions, segment_ids: [B, T] int32; roles: [B, T] uint8, of rows that have them.
    """
    numbers = plan.numbers(step)
    return {"number": numbers, **pick(plan.table, numbers, plan.seed)}


def arrange(plan: BatchPlan, number, tokens, positions, segment_ids, roles=None) -> Batch:
    """Draws each example's order and sorts its row by it.

    Args:
      plan: all but its table and hosts is read.
      number: [B] int64, examples of one step.
      tokens, positions, segment_ids: [B, T] int32, in reading order.
      roles: [B, T] uint8, see `table`; None: every token is predicted.

    Returns:
      tokens, positions, segment_ids, ranks: [B, T] int32, sorted, absent tokens among the padding;
      weights: [B, T] float32, 1 where a token is predicted, 0 at given tokens, filler and padding; of
        masked diffusion as `ordering.ranks.Drawn.predicted`.
    """
    batch = int(number[0]) // plan.batch_size
    _, stage, _ = stage_at(plan.stages, batch - plan.skipped_batches)
    drawn_by = np.full_like(number, batch * plan.batch_size) if stage.one_order_per_batch else number
    return _sorted_rows(stage, plan, drawn_by, tokens, positions, segment_ids, roles)


def eval_batch(
    table: Any,
    order: str,
    group_size: int,
    seed: int,
    batch_size: int,
    max_batches: int | None = None,
    host: int = 0,
    num_hosts: int = 1,
    *,
    objective: str = "any_order",
    context: str = "flat",
    bos_given: bool = False,
    bos_id: int | None = None,
) -> Iterator[Batch]:
    """Fixed batches of each row once, in the table's order; the last is filled up with padding rows.

    Args:
      table: held-out rows.
      order: one of `ordering.ranks.TRAINING_ORDERS`.
      group_size: tokens per group, not read by "l2r".
      seed: of the random order; row r always has the same.
      batch_size: B, rows a batch over all hosts.
      max_batches: only the first so many.
      host, num_hosts: as in `BatchPlan`.
      objective, bos_given: as in `Stage`. context: as in `Order`, of tokens that the rows give.
      bos_id: as in `BatchPlan`.

    Yields:
      As `arrange`.
    """
    ordered = Order(order, (1,) if order == "l2r" else (group_size,), context=context)
    steps = -(-table.num_rows // batch_size)
    stage = Stage("eval", steps=steps, objective=objective, orders=(ordered,), bos_given=bos_given)
    plan = BatchPlan(table, (stage,), seed, batch_size, host, num_hosts, bos_id)
    for step in range(steps if max_batches is None else min(steps, max_batches)):
        numbers = plan.numbers(step)
        rows = np.minimum(numbers, table.num_rows - 1)
        is_row = (numbers < table.num_rows)[:, None]
        picked = {name: array * is_row for name, array in table.take(rows).items()}
        yield _sorted_rows(stage, plan, numbers, **picked)


def _sorted_rows(stage: Stage, plan: BatchPlan, numbers, tokens, positions, segment_ids, roles=None) -> Batch:
    """Ranks drawn row by row under (seed, number), and everything sorted by them."""
    given = _given(stage, plan.bos_id, tokens, positions, roles)
    known = [None] * len(numbers) if given is None else given
    drawn = [
        draw(stage, positions[row], segment_ids[row], plan.seed, int(number), known[row])
        for row, number in enumerate(numbers)
    ]
    ranks, segment_ids, predicted = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    weights = (predicted if roles is None else predicted * (roles != FILLER)).astype(np.float32)
    names = ("tokens", "positions", "segment_ids", "ranks", "weights")
    order = sort_order(ranks, segment_ids)
    return dict(zip(names, take_rows(order, tokens, positions, segment_ids, ranks, weights), strict=True))


def _given(stage: Stage, bos_id: int | None, tokens, positions, roles) -> np.ndarray | None:
    """[B, T] bool: tokens that are known beforehand; None where no row can have one."""
    of_prompts = None if roles is None else roles == GIVEN
    if not stage.bos_given or bos_id is None:
        return of_prompts
    is_bos = (tokens == bos_id) & (positions == 0)
    return is_bos if of_prompts is None else is_bos | of_prompts
