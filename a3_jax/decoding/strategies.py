"""Which blanks a step looks at, and which of them it commits: pure functions of the state.

A strategy is a pair. `offer(state)` gives the candidates, before the forward: [B, N] bool.
`choose(scores, real)` gives those to commit, after it: [B, Q] bool of [B, Q] candidates.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from a3_jax.decoding.state import State


class Strategy(NamedTuple):
    offer: Callable[[State], Any]
    choose: Callable[[Any, Any], Any]


def groupwise() -> Strategy:
    """Fixed groups: offers the unfilled columns of the lowest planned rank, and commits them all."""
    return Strategy(offer=_offer_next_group, choose=lambda scores, real: real)


def dynamic(step_size: int) -> Strategy:
    """Offers every unfilled column, and commits the `step_size` best by their candidate score."""
    return Strategy(offer=lambda state: state.unfilled, choose=functools.partial(choose_best, step_size))


def _offer_next_group(state: State):
    none = jnp.iinfo(state.plan.dtype).max
    rank = jnp.min(jnp.where(state.unfilled, state.plan, none), axis=1, keepdims=True)
    return state.unfilled & (state.plan == rank)


def choose_best(count: int, scores, real):
    """The `count` highest scores of each example; ties go to the lower index, that is the lower position.

    Args:
      scores: [B, Q] float32.  real: [B, Q] bool, False where there is no candidate.

    Returns:
      [B, Q] bool.
    """
    order = jnp.argsort(jnp.where(real, -scores, jnp.inf), axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    return real & (place < count)
