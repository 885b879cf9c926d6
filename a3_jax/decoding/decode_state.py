"""The state of a batch that is being decoded: a frozen pytree, every field with its shape.

A column is a position in reading order, blanks included. A column is *filled* when its token is
given or committed, and *stored* when its key and value are in the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class Drafts(struct.PyTreeNode):
    """Proposed tokens of the next W unfilled columns (`upcoming`), to be verified by the next forward.

    Attributes:
      tokens: [B, W] int32.
      count: [B] int32, how many there are.
      log_probs: [B, W, V] float32, the log-probabilities that each was drawn from.
      proposed, accepted: [B] int32, how many were verified so far, and passed.
    """

    tokens: Any
    count: Any
    log_probs: Any
    proposed: Any
    accepted: Any


class DecodeState(struct.PyTreeNode):
    """B examples of at most N columns.

    Attributes:
      tokens: [B, N] int32; 0 where not filled.
      positions: [B, N] int32, rotary positions.
      present: [B, N] bool, False at padding.
      given: [B, N] bool, filled from the start.
      filled: [B, N] bool.
      stored: [B, N] bool, all False without a cache.
      plan: [B, N] int32: columns of lower rank are filled first.
      commit_rank: [B, N] int32, the rank at which it was filled (context ranks at given columns).
      logprob: [B, N] float32, the model's own log-probability (natural logarithm), 0 where not generated.
      next_rank: [B] int32, the rank of the next commit.
      forwards: [B] int32, forwards so far; also the step number that randomness is derived from.
      key: [B] PRNG keys, one an example, whatever batch it is in.
      cache: `model.two_stream.Cache`, or None.
      drafts: `Drafts` of speculative decoding, or None.
    """

    tokens: Any
    positions: Any
    present: Any
    given: Any
    filled: Any
    in_cache: Any
    planned_rank: Any
    commit_rank: Any
    logprob: Any
    next_rank: Any
    forwards: Any
    key: Any
    cache: Any = None
    drafts: Any = None

    @property
    def unfilled(self):
        """[B, N] bool: blanks that wait for a token."""
        return self.present & ~self.filled


def finished(state: DecodeState, eos_ids: tuple[int, ...]):
    """[B] bool: no blank is left or, where there are `eos_ids`, a final EOS has been placed."""
    done = ~jnp.any(state.unfilled, axis=1)
    if eos_ids:
        done |= jnp.any(final_eos(state, eos_ids), axis=1)
    return done


def final_eos(state: DecodeState, eos_ids: tuple[int, ...]):
    """[B, N] bool: generated EOS tokens with every column before them filled and none behind given."""
    filled_so_far = jnp.cumsum(state.unfilled, axis=1) == 0
    given_behind = jnp.flip(jnp.cumsum(jnp.flip(state.given, axis=1), axis=1), axis=1) > 0
    generated = state.present & state.filled & ~state.given
    is_eos = jnp.any(state.tokens[..., None] == jnp.asarray(eos_ids, jnp.int32), axis=-1)
    return generated & is_eos & filled_so_far & ~given_behind


def compact(mask, size: int):
    """The first `size` true columns of each row, in order.

    Args:
      mask: [B, N] bool.

    Returns:
      columns [B, size] int32 and real [B, size] bool, False where a row has fewer.
    """
    columns = jax.lax.top_k(mask.astype(jnp.int32), min(size, mask.shape[1]))[1]
    return columns, jnp.take_along_axis(mask, columns, axis=1)


def earliest(ranks, among, size: int):
    """The `size` columns of lowest rank, in reading order where ranks are equal; then others.

    A few of many columns: on CPU a sort of them all would cost as much as a layer.

    Args:
      ranks: [B, N] int32, at least 0.  among: [B, N] bool.

    Returns:
      [B, min(size, N)] int32.
    """
    first = jnp.where(among, ~ranks, jnp.iinfo(jnp.int32).min)
    return jax.lax.top_k(first, min(size, ranks.shape[1]))[1]


def upcoming(state: DecodeState, size: int):
    """The next `size` unfilled columns as planned, in reading order where ranks are equal; then others.

    Returns:
      columns [B, min(size, N)] int32, and how many are unfilled in all, [B] int32.
    """
    columns = earliest(state.planned_rank, state.unfilled, size)
    return columns, jnp.sum(state.unfilled, axis=1, dtype=jnp.int32)


def lay_drafts(state: DecodeState):
    """The drafts in their columns, each at a rank of its own.

    Returns:
      tokens and ranks [B, N] int32 with those of the drafts among them, and where those are, [B, N] bool.
    """
    nowhere = jnp.zeros_like(state.filled)
    if state.drafts is None:
        return state.tokens, state.commit_rank, nowhere
    size = state.drafts.tokens.shape[1]
    columns, place = upcoming(state, size)[0], jnp.arange(size, dtype=jnp.int32)
    put = _at(state, columns, place < state.drafts.count[:, None])
    return (
        put(state.tokens, state.drafts.tokens),
        put(state.commit_rank, state.next_rank[:, None] + place),
        put(nowhere, True),
    )


def commit(state: DecodeState, columns, chosen, tokens, logprobs, place=None) -> DecodeState:
    """Fills the chosen columns; examples without a chosen column stay as they are.

    Args:
      columns: [B, Q] int32.  chosen: [B, Q] bool.  tokens: [B, Q] int32.  logprobs: [B, Q] float32.
      place: [B, Q] or [Q] int32, which of the next ranks a column gets; None: all are one group.
    """
    place = jnp.broadcast_to(jnp.int32(0) if place is None else place, columns.shape)
    put = _at(state, columns, chosen)
    ranks_used = jnp.max(jnp.where(chosen, place + 1, 0), axis=1)
    return state.replace(
        tokens=put(state.tokens, tokens),
        filled=put(state.filled, True),
        commit_rank=put(state.commit_rank, state.next_rank[:, None] + place),
        logprob=put(state.logprob, logprobs),
        next_rank=state.next_rank + ranks_used,
        forwards=state.forwards + jnp.any(chosen, axis=1),
    )


def keep_drafts(state: DecodeState, accepted) -> DecodeState:
    """Takes the first `accepted` [B] drafts' keys, already written, as stored: the pointer moves over them.

    Called before they are committed: `upcoming` still begins with them.
    """
    if state.cache is None:
        return state
    size = state.drafts.tokens.shape[1]
    columns = upcoming(state, size)[0]
    put = _at(state, columns, jnp.arange(size) < accepted[:, None])
    cache = state.cache.replace(length=state.cache.length + accepted)
    return state.replace(cache=cache, in_cache=put(state.in_cache, True))


def _at(state, columns, chosen):
    """A function (array [B, N], values [B, Q]) -> the array with the values at the chosen columns."""
    batch = jnp.arange(columns.shape[0])[:, None]
    target = jnp.where(chosen, columns, state.tokens.shape[1])  # out of range: dropped by the scatter
    return lambda array, values: array.at[batch, target].set(values, mode="drop")
