"""Which blanks a step looks at, and which of them it commits: pure functions of the state.

A strategy is a pair, and the loop knows nothing else about it:

    offer(state)                           the candidates of a step, before its forward: `Candidates`
    accept(state, candidates, sampler)     the new state, after it, with what is committed

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
      valid: bool, False at padding.
      num_visible_drafts: int32, how many of the step's drafts a candidate sees, besides what is committed.
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
      max_commit: the most to commit.
      entropy_bound: while sum H - max H of the run stays at most this, in nats. It bounds the divergence
        of the joint from the product of the run's conditionals, not the other way round (EB-Sampler,
        arXiv 2505.24857).
      threshold: while the largest probability is at least this (Fast-dLLM, arXiv 2505.22618).
      factor: while (n + 1) (1 - smallest largest probability of the n) is below this (the same).
      min_gap: positions between two of a step, at least; 1 demands nothing (arXiv 2506.19037).
    """

    max_commit: int = 1
    entropy_bound: float | None = None
    threshold: float | None = None
    factor: float | None = None
    min_gap: int = 1


ONE_BEST = CommitPolicy()


def groupwise(query_rows: int) -> Strategy:
    """Makes the strategy of fixed groups: offers the blanks of lowest planned rank, commits them all."""

    def accept(state, candidates, sampler):
        sampled = sampler(candidates)
        return commit(state, candidates.columns, candidates.valid, sampled.token, sampled.logprob)

    return Strategy(lambda state: _lowest(state, query_rows), accept)


def dynamic(query_rows: int, policy: CommitPolicy) -> Strategy:
    """Makes a strategy that offers blanks [B, Q] of lowest planned rank, and commits the best of them."""

    def accept(state, candidates, sampler):
        sampled = sampler(candidates)
        positions_BQ = jnp.take_along_axis(state.positions, candidates.columns, axis=1)
        chosen_BQ = choose(
            policy, sampled.score, sampled.entropy, sampled.confidence, positions_BQ, candidates.valid
        )
        return commit(state, candidates.columns, chosen_BQ, sampled.token, sampled.logprob)

    return Strategy(lambda state: _lowest(state, query_rows), accept)


def choose(policy: CommitPolicy, scores_BQ, entropy_BQ, confidence_BQ, positions_BQ, valid_BQ):
    """Marks the candidates with the highest scores, as many as the policy allows, the best in any case.

        score        3    9    7    1
        run          3    1    2    4      in this order they are looked at
        entropy     .2   .4   .1   .0
        sum - max   .3    0   .1   .3      over the run so far
        chosen       .    x    x    .      under entropy_bound = 0.2

    Args:
      policy: how many.
      scores_BQ: float32, higher = sooner; ties go to the lower index, that is the lower position.
      entropy_BQ: float32, nats.  confidence_BQ: float32, the largest probability.
      positions_BQ: int32.  valid_BQ: bool, False at padding. [B, Q] each.

    Returns:
      [B, Q] bool.
    """
    index_Q = jnp.arange(scores_BQ.shape[1])

    def pick(number, carry):
        # One more of each example's run per turn. What was picked, or is too near to it, is no longer
        # available; once a bound stops a run, `going` stays False: a later candidate can't start it again.
        available_BQ, chosen_BQ, going_B1, total_B1, largest_B1, lowest_B1 = carry
        best_B1 = jnp.argmax(jnp.where(available_BQ, scores_BQ, -jnp.inf), axis=1)[:, None]
        entropy_B1, confidence_B1, position_B1 = (
            jnp.take_along_axis(array, best_B1, axis=1) for array in (entropy_BQ, confidence_BQ, positions_BQ)
        )
        total_B1, largest_B1 = total_B1 + entropy_B1, jnp.maximum(largest_B1, entropy_B1)
        lowest_B1 = jnp.minimum(lowest_B1, confidence_B1)
        going_B1 &= jnp.any(available_BQ, axis=1, keepdims=True)
        excess_B1 = total_B1 - largest_B1
        going_B1 &= (number == 0) | _allows(policy, number + 1, excess_B1, confidence_B1, lowest_B1)
        is_best_BQ = index_Q == best_B1
        chosen_BQ |= is_best_BQ & going_B1
        available_BQ &= ~is_best_BQ & (jnp.abs(positions_BQ - position_B1) >= policy.min_gap)
        return available_BQ, chosen_BQ, going_B1, total_B1, largest_B1, lowest_B1

    zeros_B1 = jnp.zeros((scores_BQ.shape[0], 1), jnp.float32)
    carry = (valid_BQ, jnp.zeros_like(valid_BQ), zeros_B1 == 0, zeros_B1, zeros_B1, zeros_B1 + 1)
    return jax.lax.fori_loop(0, policy.max_commit, pick, carry)[1]


def _allows(policy: CommitPolicy, count, excess_B1, confidence_B1, lowest_B1):
    """Marks runs of `count` candidates that may be committed, by each bound that is set: [B, 1] bool."""
    allowed_B1 = jnp.ones(excess_B1.shape, bool)
    if policy.entropy_bound is not None:
        allowed_B1 &= excess_B1 <= policy.entropy_bound
    if policy.threshold is not None:
        allowed_B1 &= confidence_B1 >= policy.threshold
    if policy.factor is not None:
        allowed_B1 &= (count + 1) * (1.0 - lowest_B1) < policy.factor
    return allowed_B1


def _lowest(state: DecodeState, query_rows: int) -> Candidates:
    # Every example has its own lowest rank: one that is further on offers later blanks.
    none = jnp.iinfo(state.planned_rank.dtype).max
    rank_B1 = jnp.min(jnp.where(state.unfilled, state.planned_rank, none), axis=1, keepdims=True)
    columns_BQ, valid_BQ = compact(state.unfilled & (state.planned_rank == rank_B1), query_rows)
    return Candidates(columns_BQ, valid_BQ, jnp.zeros_like(columns_BQ))
