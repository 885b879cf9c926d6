"""Which blanks a step looks at, and which of them it commits: pure functions of the state.

A strategy is a pair, and the loop knows nothing else about it:

    offer(state)                    the candidates of a step, before its forward: `Candidates`
    accept(state, candidates, sampler)     what is committed, after it: the new state

`speculative` is one more such pair, in a module of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3_jax.decoding.decode_state import DecodeState, commit, compact


class Candidates(NamedTuple):
    """The candidates of a step, [B, Q] each.

    Attributes:
      columns: int32.
      real: bool, False where there is no candidate.
      behind: int32, how many of the step's drafts a candidate sees; all that is committed, in any case.
    """

    columns: Any
    valid: Any
    num_visible_drafts: Any


class Strategy(NamedTuple):
    offer: Callable[[DecodeState], Candidates]
    accept: Callable[[DecodeState, Candidates, Any], DecodeState]


@dataclasses.dataclass(frozen=True)
class CommitPolicy:
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


ONE_BEST = CommitPolicy()


def groupwise(query_rows: int) -> Strategy:
    """Fixed groups: offers the unfilled columns of the lowest planned rank, and commits them all."""

    def accept(state, candidates, sampler):
        sampled = sampler(candidates)
        return commit(state, candidates.columns, candidates.valid, sampled.token, sampled.logprob)

    return Strategy(lambda state: _lowest(state, query_rows), accept)


def dynamic(query_rows: int, policy: CommitPolicy) -> Strategy:
    """Offers the unfilled columns of the lowest planned rank, and commits the best of them by a rule."""

    def accept(state, candidates, sampler):
        sampled = sampler(candidates)
        positions = jnp.take_along_axis(state.positions, candidates.columns, axis=1)
        chosen = choose(
            policy, sampled.score, sampled.entropy, sampled.confidence, positions, candidates.valid
        )
        return commit(state, candidates.columns, chosen, sampled.token, sampled.logprob)

    return Strategy(lambda state: _lowest(state, query_rows), accept)


def choose(policy: CommitPolicy, scores, entropy, confidence, positions, valid):
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
        going &= (number == 0) | _allows(policy, number + 1, total - largest, c, lowest)
        here = index == best
        chosen |= here & going
        open_ &= ~here & (jnp.abs(positions - at) >= policy.min_gap)
        return open_, chosen, going, total, largest, lowest

    nothing = jnp.zeros((scores.shape[0], 1), jnp.float32)
    carry = (valid, jnp.zeros_like(valid), nothing == 0, nothing, nothing, nothing + 1)
    return jax.lax.fori_loop(0, policy.max_commit, pick, carry)[1]


def _allows(policy: CommitPolicy, count, excess, confidence, lowest):
    """Whether a run of `count` candidates may be committed, by each bound that is set."""
    allowed = jnp.ones(excess.shape, bool)
    if policy.entropy_bound is not None:
        allowed &= excess <= policy.entropy_bound
    if policy.threshold is not None:
        allowed &= confidence >= policy.threshold
    if policy.factor is not None:
        allowed &= (count + 1) * (1.0 - lowest) < policy.factor
    return allowed


def _lowest(state: DecodeState, query_rows: int) -> Candidates:
    none = jnp.iinfo(state.planned_rank.dtype).max
    rank = jnp.min(jnp.where(state.unfilled, state.planned_rank, none), axis=1, keepdims=True)
    columns, valid = compact(state.unfilled & (state.planned_rank == rank), query_rows)
    return Candidates(columns, valid, jnp.zeros_like(columns))
