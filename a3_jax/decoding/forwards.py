"""What a step's forward computes: pending tokens as content rows, the step's candidates as query rows.

    fused   over the cache: K groups cost K forwards, and no token's key is computed twice
    whole   every filled token again, without a cache: the reference, and what `commit="flat"` needs,
            where a commit moves tokens into one common group and so changes keys already computed
    left    the content stream alone, left to right

Each takes the state, the candidates and active_B [B] bool, and returns hidden states [B, Q, D] of the
candidates and the state: finished examples write nothing.
"""

from typing import Any, cast

import jax.numpy as jnp

from a3_jax.decoding.decode_state import DecodeState, earliest, lay_drafts
from a3_jax.decoding.strategies import Candidates
from a3_jax.model.two_stream import Rows, TwoStream, run_rows
from a3_jax.ordering.intervals import bounds, sort_order, take_rows


def fused_forward(
    model: TwoStream, params, content_rows: int, state: DecodeState, candidates: Candidates, active_B
):
    """Runs the new tokens and the candidates over the cache: hidden states [B, Q, D], and the state."""
    pending_BT = state.filled & state.present & ~state.in_cache & active_B[:, None]
    tokens_BT, ranks_BT, drafted_BT = lay_drafts(state)
    new_BT = pending_BT | (drafted_BT & active_B[:, None])
    content = _new_rows(state, tokens_BT, ranks_BT, new_BT, content_rows)
    # Drafts are written too, after the pending tokens, but the length ends before them: only those that
    # pass are taken in, by `keep_drafts`; what fails is overwritten by the next forward.
    length_B = state.cache.length + jnp.sum(pending_BT, axis=1, dtype=jnp.int32)
    query = _candidate_rows(state, candidates, length_B)
    out = run_rows(model, params, content, query, cache=state.cache)
    cache = cast(Any, out.cache).replace(length=length_B)
    return out.query, state.replace(cache=cache, in_cache=state.in_cache | pending_BT)


def whole_forward(model: TwoStream, params, flat: bool, state: DecodeState, candidates: Candidates, active_B):
    """Runs all filled tokens without a cache, in the groups of the commits or (`flat`) in one group.

    Returns hidden states [B, Q, D], and the state as it was.
    """
    del active_B  # the finished examples have no candidates, and nothing is kept
    tokens_BT, ranks_BT, drafted_BT = lay_drafts(state)
    filled_BT = state.filled & state.present
    segments_BT = (filled_BT | drafted_BT).astype(jnp.int32)
    ranks_BT = jnp.zeros_like(ranks_BT) if flat else ranks_BT
    order_BT = sort_order(ranks_BT, segments_BT)
    tokens_BT, positions_BT, ranks_BT, segments_BT = take_rows(
        order_BT, tokens_BT, state.positions, ranks_BT, segments_BT
    )
    visible = bounds(ranks_BT, ranks_BT, segments_BT)
    content = Rows(positions=positions_BT, start=visible.start, limit=visible.content_limit, tokens=tokens_BT)
    query = _candidate_rows(state, candidates, jnp.sum(filled_BT, axis=1, dtype=jnp.int32))
    return run_rows(model, params, content, query).query, state


def left_forward(
    model: TwoStream, params, content_rows: int, state: DecodeState, candidates: Candidates, active_B
):
    """Runs the left-to-right model up to the row before a blank: hidden states [B, 1, D], and the state."""
    reading_BT = jnp.broadcast_to(jnp.arange(state.tokens.shape[1], dtype=jnp.int32), state.tokens.shape)
    before_BT = (reading_BT < candidates.columns[:, :1]) & candidates.valid[:, :1]
    pending_BT = ~state.in_cache & before_BT & active_B[:, None]
    content = _new_rows(state, state.tokens, reading_BT, pending_BT, content_rows)
    last_B = jnp.maximum(jnp.sum(pending_BT, axis=1, dtype=jnp.int32) - 1, 0)
    out = run_rows(model, params, content, outputs="content", cache=state.cache)
    hidden_B1D = jnp.take_along_axis(out.content, last_B[:, None, None], axis=1)
    return hidden_B1D, state.replace(cache=out.cache, in_cache=state.in_cache | pending_BT)


def _new_rows(state: DecodeState, tokens_BT, ranks_BT, new_BT, size: int) -> Rows:
    """Returns the content rows [B, size] of the new columns in rank order, to be appended to the cache.

    Every row sees the whole cache, and of the new rows its own group and those before; rows of padding
    come last and see nothing.

    Args:
      state: the state.
      tokens_BT, ranks_BT: [B, T] int32.
      new_BT: [B, T] bool, at most `size` per example.
      size: rows to make.
    """
    segments_BT = new_BT.astype(jnp.int32)
    order_BR = earliest(ranks_BT, new_BT, size)
    tokens_BR, positions_BR, ranks_BR, segments_BR = take_rows(
        order_BR, tokens_BT, state.positions, ranks_BT, segments_BT
    )
    visible = bounds(ranks_BR, ranks_BR, segments_BR)
    limit_BR = jnp.where(segments_BR > 0, state.cache.length[:, None] + visible.content_limit, 0)
    return Rows(positions=positions_BR, start=jnp.zeros_like(limit_BR), limit=limit_BR, tokens=tokens_BR)


def _candidate_rows(state: DecodeState, candidates: Candidates, length_B) -> Rows:
    """Returns query rows [B, Q] of candidates: they see `length_B` tokens, and the drafts before theirs."""
    limit_BQ = jnp.where(candidates.valid, length_B[:, None] + candidates.num_visible_drafts, 0)
    limit_BQ = limit_BQ.astype(jnp.int32)
    positions_BQ = jnp.take_along_axis(state.positions, candidates.columns, axis=1)
    return Rows(positions=positions_BQ, start=jnp.zeros_like(limit_BQ), limit=limit_BQ)
