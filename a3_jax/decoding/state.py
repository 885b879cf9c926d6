"""The state of a batch that is being decoded: a frozen pytree, every field with its shape.

A column is a position in reading order, blanks included. A column is *filled* when its token is
given or committed, and *stored* when its key and value are in the cache.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct


class State(struct.PyTreeNode):
    """B examples of at most N columns.

    Attributes:
      tokens: [B, N] int32; 0 where not filled.
      positions: [B, N] int32, rotary positions.
      present: [B, N] bool, False at padding.
      given: [B, N] bool, filled from the start.
      filled: [B, N] bool.
      stored: [B, N] bool, all False without a cache.
      plan: [B, N] int32, the rank at which groupwise decoding fills a column.
      commit_rank: [B, N] int32, the rank at which it was filled (context ranks at given columns).
      logprob: [B, N] float32, the model's own log-probability (natural logarithm), 0 where not generated.
      next_rank: [B] int32, the rank of the next commit.
      forwards: [B] int32, forwards so far; also the step number that randomness is derived from.
      key: [B] PRNG keys, one an example, whatever batch it is in.
      cache: `model.two_stream.Cache` with N slots, or None.
    """

    tokens: Any
    positions: Any
    present: Any
    given: Any
    filled: Any
    stored: Any
    plan: Any
    commit_rank: Any
    logprob: Any
    next_rank: Any
    forwards: Any
    key: Any
    cache: Any = None

    @property
    def unfilled(self):
        """[B, N] bool: blanks that wait for a token."""
        return self.present & ~self.filled


def finished(state: State, eos_id: int | None):
    """[B] bool: no blank is left or, where `eos_id` is given, a final EOS has been placed."""
    done = ~jnp.any(state.unfilled, axis=1)
    if eos_id is not None:
        done |= jnp.any(final_eos(state, eos_id), axis=1)
    return done


def final_eos(state: State, eos_id: int):
    """[B, N] bool: generated EOS tokens with every column before them filled and none behind given."""
    filled_so_far = jnp.cumsum(state.unfilled, axis=1) == 0
    given_behind = jnp.flip(jnp.cumsum(jnp.flip(state.given, axis=1), axis=1), axis=1) > 0
    generated = state.present & state.filled & ~state.given
    return generated & (state.tokens == eos_id) & filled_so_far & ~given_behind


def compact(mask, size: int):
    """The first `size` true columns of each row, in order.

    Args:
      mask: [B, N] bool.

    Returns:
      columns [B, size] int32 and real [B, size] bool, False where a row has fewer.
    """
    columns = jnp.argsort(~mask, axis=1, stable=True)[:, :size].astype(jnp.int32)
    return columns, jnp.take_along_axis(mask, columns, axis=1)


def commit(state: State, columns, chosen, tokens, logprobs) -> State:
    """Fills the chosen columns at the next rank; examples without a chosen column stay as they are.

    Args:
      columns: [B, Q] int32.  chosen: [B, Q] bool.  tokens: [B, Q] int32.  logprobs: [B, Q] float32.
    """
    batch = jnp.arange(columns.shape[0])[:, None]
    target = jnp.where(chosen, columns, state.tokens.shape[1])  # out of range: dropped by the scatter
    ranks = jnp.broadcast_to(state.next_rank[:, None], columns.shape)
    moved = jnp.any(chosen, axis=1).astype(jnp.int32)
    return state.replace(
        tokens=state.tokens.at[batch, target].set(tokens, mode="drop"),
        filled=state.filled.at[batch, target].set(True, mode="drop"),
        commit_rank=state.commit_rank.at[batch, target].set(ranks, mode="drop"),
        logprob=state.logprob.at[batch, target].set(logprobs, mode="drop"),
        next_rank=state.next_rank + moved,
        forwards=state.forwards + moved,
    )
