"""What a step's forward computes: the tokens not yet stored as content rows, its candidates as query rows.

    fused   over the cache: K groups cost K forwards, and no token's key is computed twice
    whole   every filled token again, without a cache: the reference, and what `commit="flat"` needs,
            where a commit moves tokens into one common group and so changes keys already computed
    left    the content stream alone, left to right

Each is (state, offer, active [B] bool) -> (hidden [B, Q, D], state): finished examples write nothing.
"""

import functools
from typing import Any, cast

import jax.numpy as jnp

from a3_jax.decoding.decode_state import DecodeState, earliest, lay_drafts
from a3_jax.decoding.strategies import Candidates
from a3_jax.model.two_stream import Rows, TwoStream, run_rows
from a3_jax.ordering.intervals import bounds, sort_order, take_rows


def fused_forward(model: TwoStream, params, content_rows: int):
    """The forward over the cache; the drafts' keys are written behind its length, see `keep_drafts`."""
    return functools.partial(_fused_forward, model, params, content_rows)


def whole_forward(model: TwoStream, params, flat: bool):
    """The forward without a cache, in the groups of the commits or (`flat`) in one group."""
    return functools.partial(_whole_forward, model, params, flat)


def left_forward(model: TwoStream, params, content_rows: int):
    """The forward of the plain left-to-right model: the row before a blank, the last one given here."""
    return functools.partial(_left_forward, model, params, content_rows)


def _fused_forward(model, params, content_rows, state: DecodeState, candidates: Candidates, active):
    pending = state.filled & state.present & ~state.in_cache & active[:, None]
    tokens, ranks, drafted = lay_drafts(state)
    content = _new_rows(state, tokens, ranks, pending | (drafted & active[:, None]), content_rows)
    length = state.cache.length + jnp.sum(pending, axis=1, dtype=jnp.int32)
    query = _candidate_rows(state, candidates, length)
    out = run_rows(model, params, content, query, cache=state.cache)
    cache = cast(Any, out.cache).replace(length=length)
    return out.query, state.replace(cache=cache, in_cache=state.in_cache | pending)


def _whole_forward(model, params, flat, state: DecodeState, candidates: Candidates, active):
    del active  # the finished examples have no candidates, and nothing is kept
    tokens, ranks, drafted = lay_drafts(state)
    filled = state.filled & state.present
    segments = (filled | drafted).astype(jnp.int32)
    ranks = jnp.zeros_like(ranks) if flat else ranks
    order = sort_order(ranks, segments)
    tokens, positions, ranks, segments = take_rows(order, tokens, state.positions, ranks, segments)
    visible = bounds(ranks, ranks, segments)
    content = Rows(positions=positions, start=visible.start, limit=visible.content_limit, tokens=tokens)
    query = _candidate_rows(state, candidates, jnp.sum(filled, axis=1, dtype=jnp.int32))
    return run_rows(model, params, content, query).query, state


def _left_forward(model, params, content_rows, state: DecodeState, candidates: Candidates, active):
    reading = jnp.broadcast_to(jnp.arange(state.tokens.shape[1], dtype=jnp.int32), state.tokens.shape)
    waiting = (
        ~state.in_cache & (reading < candidates.columns[:, :1]) & candidates.valid[:, :1] & active[:, None]
    )
    content = _new_rows(state, state.tokens, reading, waiting, content_rows)
    last = jnp.maximum(jnp.sum(waiting, axis=1, dtype=jnp.int32) - 1, 0)
    out = run_rows(model, params, content, outputs="content", cache=state.cache)
    hidden_B1D = jnp.take_along_axis(out.content, last[:, None, None], axis=1)
    return hidden_B1D, state.replace(cache=out.cache, in_cache=state.in_cache | waiting)


def _new_rows(state: DecodeState, tokens, ranks, waiting, size: int) -> Rows:
    """Content rows [B, size] of the waiting columns in rank order, to be appended to the cache.

    Every row sees the whole cache, and of the new rows its own group and those before; rows that are
    not real come last and see nothing.

    Args:
      tokens, ranks: [B, N] int32.  waiting: [B, N] bool, at most `size` an example.
    """
    segments = waiting.astype(jnp.int32)
    order = earliest(ranks, waiting, size)
    tokens, positions, ranks, segments = take_rows(order, tokens, state.positions, ranks, segments)
    visible = bounds(ranks, ranks, segments)
    limit = jnp.where(segments > 0, state.cache.length[:, None] + visible.content_limit, 0)
    return Rows(positions=positions, start=jnp.zeros_like(limit), limit=limit, tokens=tokens)


def _candidate_rows(state: DecodeState, candidates: Candidates, length) -> Rows:
    """Query rows of the candidates [B, Q]: they see `length` [B] tokens, and the drafts before their own."""
    limit = jnp.where(candidates.valid, length[:, None] + candidates.num_visible_drafts, 0).astype(jnp.int32)
    positions = jnp.take_along_axis(state.positions, candidates.columns, axis=1)
    return Rows(positions=positions, start=jnp.zeros_like(limit), limit=limit)
