"""Held-out losses of both streams, on rows and orders that stay the same for the whole run."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from a3_jax.model.two_stream import TwoStream
from a3_jax.ordering.curriculum import stage_at
from a3_jax.runtime.coordination import run_on_process_zero
from a3_jax.runtime.distributed import rows_of_process
from a3_jax.training.config import RunConfig
from a3_jax.training.run_log import JsonLines, RunLog, numbers
from a3_jax.training.step import LOSSES, make_loss

GROUP_SIZE = 4  # of the contiguous and random orders: the size that the paper's curriculum ends with

# name in eval.jsonl -> (objective, order, group size)
HELD_OUT = {
    "l2r": ("any_order", "l2r", 1),
    "contiguous": ("any_order", "contiguous", GROUP_SIZE),
    "random": ("any_order", "random", GROUP_SIZE),
    "ar": ("ar", "l2r", 1),
    "masked_diffusion": ("masked_diffusion", "l2r", 1),
}


def held_out_losses(
    losses: Mapping[str, Callable],
    params: Any,
    batches: Callable[[str, str, int], Iterable[Mapping[str, Any]]],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """Returns nats per predicted token: in three orders of the query stream, as AR, and of masked tokens.

    Args:
      losses: objective -> compiled (params, batch) -> (sum, weight), see `step.make_loss`; objectives that
        are absent are left out.
      params: parameter tree.
      batches: (objective, order, group size) -> batches on the device, the same at every call.
      should_stop: called before each batch.

    Returns:
      A loss for each name of `HELD_OUT` whose objective is in `losses`: sums over all batches, divided
      once; None where there is nothing to predict. None if it was stopped.
    """
    sums: dict[str, list] = {}
    for name, (objective, order, group_size) in HELD_OUT.items():
        if objective not in losses:
            continue
        sums[name] = []
        for batch in batches(objective, order, group_size):
            if should_stop():
                return None
            sums[name].append(losses[objective](params, batch))
    return {name: _mean(pairs) for name, pairs in jax.device_get(sums).items()}


def make_evaluator(run: RunConfig, model: TwoStream, heldout, put: Callable, sharding, bos_id: int | None):
    """Returns a function (params, should_stop) -> held-out losses, or None if there are no held-out rows.

    Tokens that a stage takes as given are not scored.

    Args:
      run: the run.
      model: the module.
      heldout: table of the held-out rows, or None.
      put: puts a batch of NumPy arrays on the devices.
      sharding: that of a batch.
      bos_id: the tokenizer's.
    """
    if heldout is None:
        return None
    from a3_jax.data.batches import eval_batch

    bos_given = any(stage.bos_given for stage in run.stages)
    contexts = {order.context for stage in run.stages for order in stage.orders}
    context = contexts.pop() if len(contexts) == 1 else "flat"
    batch_size = run.batch_size // run.microbatches
    host, num_hosts = rows_of_process(sharding, batch_size)

    def batches(objective, order, group_size):
        rows = eval_batch(
            heldout, order, group_size, run.seed, batch_size, run.eval_batches,
            host=host, num_hosts=num_hosts,
            objective=objective, context=context, bos_given=bos_given, bos_id=bos_id,
        )  # fmt: skip
        return map(put, rows)

    masks = model.config.mask_token is not None
    objectives = [objective for objective in LOSSES if masks or objective != "masked_diffusion"]
    losses = {objective: make_loss(model, objective=objective) for objective in objectives}
    return lambda params, should_stop: held_out_losses(losses, params, batches, should_stop)


def stage_due(run: RunConfig, first_step: int, restored: bool, evaluations: JsonLines) -> str:
    """Returns the stage whose held-out losses are missing at the step a run begins with; "" if none are."""
    if not run.eval_every:
        return ""
    _, stage, stage_first = stage_at(run.stages, first_step)
    if run_on_process_zero("evaluated", lambda: evaluations.has(first_step)):
        return ""
    if not restored:
        return stage.name
    due = first_step == stage_first or first_step % run.eval_every == 0
    return stage_at(run.stages, first_step - 1)[1].name if due else ""


def write_losses(records: RunLog, step: int, stage: str, losses: Mapping[str, float | None]) -> None:
    """Writes the held-out losses after a step."""
    row = {"step": step, "stage": stage, **losses}
    records.evaluations.append(row)
    records.tensorboard.write(step, numbers(row, "held_out/"))
    shown = {name: "none" if loss is None else f"{loss:.4f}" for name, loss in losses.items()}
    records.progress.note(f"held out at step {step}: " + "  ".join(map(" ".join, shown.items())))
    if "none" in shown.values():
        names = ", ".join(name for name, loss in losses.items() if loss is None)
        records.progress.note(f"warning: the held-out rows have nothing to predict, so no loss: {names}")


def _mean(pairs) -> float | None:
    total, weight = np.sum(np.asarray(pairs, np.float64), axis=0)
    return float(total / weight) if weight else None
