"""Which blanks a step looks at, and which of them it commits: pure functions of the state.

A strategy is a pair, and the loop knows nothing else about it:

    offer(state)                    the candidates of a step, before its forward: `Offer`
    accept(state, offer, judge)     what is committed, after it: the new state

`speculative` is one more such pair, in a module of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3_jax.decoding.state import State, commit, compact


class Offer(NamedTuple):
    """The candidates of a step, [B, Q] each.

    Attributes:
      columns: int32.
      real: bool, False where there is no candidate.
      behind: int32, how many of the step's drafts a candidate sees; all that is committed, in any case.
    """

    columns: Any
    real: Any
    behind: Any


class Strategy(NamedTuple):
    offer: Callable[[State], Offer]
    accept: Callable[[State, Offer, Any], State]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How many of the best candidates a dynamic step commits: the longest run allowed, the first in any case.

    Bounds read the distribution that tokens are drawn from, after temperature (1 if it is 0) and filters.

    Attributes:
      max_commit: at most so many.
      entropy_bound: while sum H - max H of the run stays at most this, in nats. It bounds the divergence
        of the joint from the product of the run's conditionals, not the other way round (EB-Sampler,
        arXiv 2505.24857).
      threshold: while the largest probability is at least this (Fast-dLLM, arXiv 2505.22618).
      factor: while (n + 1) (1 - smallest largest probability of the n) is below this (the same).
      min_gap: positions between two of a step, at least; 1 is no demand (arXiv 2506.19037).
    """

    max_commit: int = 1
    entropy_bound: float | None = None
    threshold: float | None = None
    factor: float | None = None
    min_gap: int = 1


ONE_BEST = Rule()


def groupwise(query_rows: int) -> Strategy:
    """Fixed groups: offers the unfilled columns of the lowest planned rank, and commits them all."""

    def accept(state, offer, judge):
        judged = judge(offer)
        return commit(state, offer.columns, offer.real, judged.token, judged.logprob)

    return Strategy(lambda state: _lowest(state, query_rows), accept)


def dynamic(query_rows: int, rule: Rule) -> Strategy:
    """Offers the unfilled columns of the lowest planned rank, and commits the best of them by a rule."""

    def accept(state, offer, judge):
        judged = judge(offer)
        positions = jnp.take_along_axis(state.positions, offer.columns, axis=1)
        chosen = choose(rule, judged.score, judged.entropy, judged.confidence, positions, offer.real)
        return commit(state, offer.columns, chosen, judged.token, judged.logprob)

    return Strategy(lambda state: _lowest(state, query_rows), accept)


def choose(rule: Rule, scores, entropy, confidence, positions, real):
    """The candidates with the highest scores, as many as the rule allows, the best in any case.

    Args:
      rule: as it says.
      scores: float32, higher = sooner; ties go to the lower index, that is the lower position.
      entropy: float32, nats.  confidence: float32, the largest probability.
      positions: int32.  real: bool, False where there is no candidate. [B, Q] each.

    Returns:
      [B, Q] bool.
    """
    index = jnp.arange(scores.shape[1])

    def pick(number, carry):
        open_, chosen, going, total, largest, lowest = carry
        best = jnp.argmax(jnp.where(open_, scores, -jnp.inf), axis=1)[:, None]
        h, c, at = (jnp.take_along_axis(array, best, axis=1) for array in (entropy, confidence, positions))
        total, largest, lowest = total + h, jnp.maximum(largest, h), jnp.minimum(lowest, c)
        going &= jnp.any(open_, axis=1, keepdims=True)
        going &= (number == 0) | _allows(rule, number + 1, total - largest, c, lowest)
        here = index == best
        chosen |= here & going
        open_ &= ~here & (jnp.abs(positions - at) >= rule.min_gap)
        return open_, chosen, going, total, largest, lowest

    nothing = jnp.zeros((scores.shape[0], 1), jnp.float32)
    carry = (real, jnp.zeros_like(real), nothing == 0, nothing, nothing, nothing + 1)
    return jax.lax.fori_loop(0, rule.max_commit, pick, carry)[1]


def _allows(rule: Rule, count, excess, confidence, lowest):
    """Whether a run of `count` candidates may be committed, by each bound that is set."""
    allowed = jnp.ones(excess.shape, bool)
    if rule.entropy_bound is not None:
        allowed &= excess <= rule.entropy_bound
    if rule.threshold is not None:
        allowed &= confidence >= rule.threshold
    if rule.factor is not None:
        allowed &= (count + 1) * (1.0 - lowest) < rule.factor
    return allowed


def _lowest(state: State, query_rows: int) -> Offer:
    none = jnp.iinfo(state.plan.dtype).max
    rank = jnp.min(jnp.where(state.unfilled, state.plan, none), axis=1, keepdims=True)
    columns, real = compact(state.unfilled & (state.plan == rank), query_rows)
    return Offer(columns, real, jnp.zeros_like(columns))
