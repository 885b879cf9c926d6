"""Held-out losses of both streams, on rows and orders that stay the same for the whole run."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

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
    """Nats a predicted token, by name: three orders of the query stream, the AR stream, masked tokens.

    Args:
      losses: objective -> compiled (params, batch) -> (sum, weight), see `step.make_loss`; those that
        are to be taken.
      params: parameter tree.
      batches: (objective, order, group size) -> batches on the device, the same at every call.
      should_stop: asked before each batch.

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


def _mean(pairs) -> float | None:
    total, weight = np.sum(np.asarray(pairs, np.float64), axis=0)
    return float(total / weight) if weight else None
