"""The state of a batch that is being decoded: a frozen pytree, every field with its shape.

A column is a position in reading order, blanks included. A column is *filled* when its token is
given or committed, and *in the cache* when its key and value are.

    column          0  1  2  3  4  5
    given           x  .  .  x  .  .
    planned_rank    0  2  3  1  4  5        given tokens first, then the blanks in the order wanted
    filled          x  x  .  x  .  .        column 1 is committed
    in_cache        x  .  .  x  .  .        the next forward writes its key
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
    """B examples of at most T columns.

    Attributes:
      tokens: [B, T] int32; 0 where not filled.
      positions: [B, T] int32, rotary positions.
      present: [B, T] bool, False at padding.
      given: [B, T] bool, filled from the start.
      filled: [B, T] bool.
      in_cache: [B, T] bool, all False without a cache.
      planned_rank: [B, T] int32: columns of lower rank are filled first.
      commit_rank: [B, T] int32, the rank at which it was filled (context ranks at given columns).
      logprob: [B, T] float32, the model's own log-probability (natural logarithm), 0 where not generated.
      next_rank: [B] int32, the rank of the next commit.
      forwards: [B] int32, forwards so far; also the step number that randomness is derived from.
      key: [B] PRNG keys, one per example, whatever batch it is in.
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
        """[B, T] bool: blanks that wait for a token."""
        return self.present & ~self.filled


def finished(state: DecodeState, eos_ids: tuple[int, ...]):
    """Marks the examples [B] without a blank left or, where there are `eos_ids`, with a final EOS."""
    done_B = ~jnp.any(state.unfilled, axis=1)
    return done_B | jnp.any(final_eos(state, eos_ids), axis=1) if eos_ids else done_B


def final_eos(state: DecodeState, eos_ids: tuple[int, ...]):
    """Marks generated EOS tokens with every column before them filled and none after them given, [B, T].

    column      0  1  2  3  4  5
    given       x  .  x  .  .  .
    token       a  E  b  E  _  E        _ is unfilled
    final EOS   .  .  .  x  .  .
    """
    # Counted from the left the blanks before a column, from the right the given columns after it.
    filled_so_far_BT = jnp.cumsum(state.unfilled, axis=1) == 0
    given_after_BT = jnp.flip(jnp.cumsum(jnp.flip(state.given, axis=1), axis=1), axis=1) > 0
    generated_BT = state.present & state.filled & ~state.given
    is_eos_BT = jnp.any(state.tokens[..., None] == jnp.asarray(eos_ids, jnp.int32), axis=-1)
    return generated_BT & is_eos_BT & filled_so_far_BT & ~given_after_BT


def compact(mask_BT, size: int):
    """Lists the first `size` true columns of each row, in order.

    Args:
      mask_BT: [B, T] bool.
      size: Q, at most T.

    Returns:
      columns [B, Q] int32, and [B, Q] bool, False where a row has fewer.
    """
    columns_BQ = jax.lax.top_k(mask_BT.astype(jnp.int32), min(size, mask_BT.shape[1]))[1]
    return columns_BQ, jnp.take_along_axis(mask_BT, columns_BQ, axis=1)


def earliest(ranks_BT, among_BT, size: int):
    """Lists the `size` columns of lowest rank, in reading order where ranks are equal; then others.

    Args:
      ranks_BT: [B, T] int32, at least 0.
      among_BT: [B, T] bool, the columns that come before the others.
      size: Q, at most T.

    Returns:
      [B, Q] int32.
    """
    # A few of many columns: on CPU a sort of them all would cost as much as a layer. `top_k` takes the
    # largest, so ranks are turned round, and ~rank is as good as -rank without its overflow.
    first_BT = jnp.where(among_BT, ~ranks_BT, jnp.iinfo(jnp.int32).min)
    return jax.lax.top_k(first_BT, min(size, ranks_BT.shape[1]))[1]


def upcoming(state: DecodeState, size: int):
    """Lists the next `size` unfilled columns as planned, in reading order where ranks are equal; then others.

    Returns:
      columns [B, Q] int32, Q = `size` or T, and how many are unfilled in all, [B] int32.
    """
    columns_BQ = earliest(state.planned_rank, state.unfilled, size)
    return columns_BQ, jnp.sum(state.unfilled, axis=1, dtype=jnp.int32)


def lay_drafts(state: DecodeState):
    """Puts the drafts in their columns, each at a rank of its own.

    Returns:
      tokens and ranks [B, T] int32 with those of the drafts among them, and where those are, [B, T] bool.
    """
    nowhere_BT = jnp.zeros_like(state.filled)
    if state.drafts is None:
        return state.tokens, state.commit_rank, nowhere_BT
    window = state.drafts.tokens.shape[1]
    columns_BQ, index_Q = upcoming(state, window)[0], jnp.arange(window, dtype=jnp.int32)
    put = _at(state, columns_BQ, index_Q < state.drafts.count[:, None])
    return (
        put(state.tokens, state.drafts.tokens),
        put(state.commit_rank, state.next_rank[:, None] + index_Q),
        put(nowhere_BT, True),
    )


def commit(state, columns_BQ, chosen_BQ, tokens_BQ, log_probs_BQ, rank_offset=None) -> DecodeState:
    """Fills the chosen columns; examples without a chosen column stay as they are.

    Args:
      state: `DecodeState`.
      columns_BQ: [B, Q] int32.  chosen_BQ: [B, Q] bool.
      tokens_BQ: [B, Q] int32.  log_probs_BQ: [B, Q] float32.
      rank_offset: [B, Q] or [Q] int32, which of the next ranks a column gets; None: all are one group.
    """
    rank_offset_BQ = jnp.broadcast_to(jnp.int32(0) if rank_offset is None else rank_offset, columns_BQ.shape)
    put = _at(state, columns_BQ, chosen_BQ)
    ranks_used_B = jnp.max(jnp.where(chosen_BQ, rank_offset_BQ + 1, 0), axis=1)
    return state.replace(
        tokens=put(state.tokens, tokens_BQ),
        filled=put(state.filled, True),
        commit_rank=put(state.commit_rank, state.next_rank[:, None] + rank_offset_BQ),
        logprob=put(state.logprob, log_probs_BQ),
        next_rank=state.next_rank + ranks_used_B,
        forwards=state.forwards + jnp.any(chosen_BQ, axis=1),
    )


def keep_drafts(state: DecodeState, accepted_B) -> DecodeState:
    """Takes the keys of the first `accepted_B` [B] drafts, which are written, into the cache's length.

    Must be called before the drafts are committed: `upcoming` still begins with them.
    """
    if state.cache is None:
        return state
    window = state.drafts.tokens.shape[1]
    put = _at(state, upcoming(state, window)[0], jnp.arange(window) < accepted_B[:, None])
    cache = state.cache.replace(length=state.cache.length + accepted_B)
    return state.replace(cache=cache, in_cache=put(state.in_cache, True))


def _at(state, columns_BQ, chosen_BQ):
    """Returns a function (array [B, T], values [B, Q]) -> the array with the values at the chosen columns."""
    example_B1 = jnp.arange(columns_BQ.shape[0])[:, None]
    # What is not chosen goes to column T, which is out of range: the scatter drops it.
    target_BQ = jnp.where(chosen_BQ, columns_BQ, state.tokens.shape[1])
    return lambda array_BT, values: array_BT.at[example_B1, target_BQ].set(values, mode="drop")
