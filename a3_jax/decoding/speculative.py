"""Any-subset speculative decoding (ASSD, arXiv 2504.20456): parallel drafts, the law of one at a time.

A step is one forward, which verifies the drafts of the step before and makes those of the next:

    committed  |  y0  y1  y2            content rows of the drafts, each at a rank of its own
    query rows    p0  p1  p2  p3        row i sees what is committed and the drafts before i
                              q q q     proposals for the next window, which see all drafts

Draft i, drawn from q_i, passes with probability min(1, p_i / q_i). The first that fails is drawn again from
max(p_i - q_i, 0), normalised; if all pass, a bonus token is drawn from the row after them. Either way
the tokens follow p exactly (Leviathan et al., arXiv 2211.17192, theorem 1), and every forward commits at
least one: forwards never exceed blanks. Proposals are used only if all drafts passed: those of the next
window were made without the bonus token, which its verification puts right. With no drafts (at the
start, and after a failure) the bonus is plain sampling.

What failed leaves keys in the cache behind its length: the pointer moved over what passed, and no further.
"""

import jax
import jax.numpy as jnp

from a3_jax.decoding.decode_state import DecodeState, Drafts, commit, keep_drafts, upcoming
from a3_jax.decoding.strategies import Candidates, Strategy

_VERIFY, _PROPOSE = 2, 3  # what a row's random bits are for; 0 and 1 are drawing and judging


def speculative(window: int, entropy_bound: float | None = None) -> Strategy:
    """Verifies up to `window` drafts a step, in the planned order.

    Args:
      window: drafts a step, at most.
      entropy_bound: drafts only as many as `strategies.CommitPolicy` would commit under this bound.
    """

    def accept(state, candidates, sampler):
        rows = sampler.distributions()
        return _verify(state, candidates, rows, sampler, entropy_bound)

    return Strategy(lambda state: _offer(state, window), accept)


def no_drafts(batch: int, window: int, vocab_size: int) -> Drafts:
    """What decoding begins with."""
    none = jnp.zeros(batch, jnp.int32)
    log_probs = jnp.zeros((batch, window, vocab_size), jnp.float32)
    return Drafts(jnp.zeros((batch, window), jnp.int32), none, log_probs, none, none)


def _offer(state: DecodeState, window: int) -> Candidates:
    """Rows 0..W verify the drafts and draw the token after them; rows W+1..2W propose what follows that."""
    columns, unfilled = upcoming(state, 2 * window + 1)
    drafted, unfilled = state.drafts.count[:, None], unfilled[:, None]
    verify = jnp.broadcast_to(jnp.arange(window + 1, dtype=jnp.int32), (columns.shape[0], window + 1))
    propose = drafted + 1 + jnp.arange(window, dtype=jnp.int32)
    index = jnp.concatenate([verify, propose], axis=1)
    wanted = jnp.concatenate([verify <= drafted, jnp.ones(propose.shape, bool)], axis=1)
    return Candidates(
        columns=jnp.take_along_axis(columns, jnp.minimum(index, columns.shape[1] - 1), axis=1),
        valid=wanted & (index < unfilled),
        num_visible_drafts=jnp.minimum(index, drafted),
    )


def _verify(state: DecodeState, candidates: Candidates, rows, sampler, entropy_bound) -> DecodeState:
    drafts, window = state.drafts, state.drafts.tokens.shape[1]
    log_probs, place = rows.log_probs[:, : window + 1], jnp.arange(window + 1)
    active = candidates.valid[:, 0]
    uniform = sampler.uniform(candidates.columns[:, :window], _VERIFY)
    ratio = _at_token(log_probs[:, :window], drafts.tokens) - _at_token(drafts.log_probs, drafts.tokens)
    passed = (jnp.log(uniform) < ratio) & (place[:window] < drafts.count[:, None])
    accepted = jnp.sum(jnp.cumprod(passed, axis=1), axis=1) * active

    at = accepted[:, None, None]
    target = jnp.take_along_axis(log_probs, at, axis=1)[:, 0]
    draft = jnp.take_along_axis(drafts.log_probs, jnp.minimum(at, window - 1), axis=1)[:, 0]
    last_log_probs = jnp.where((accepted < drafts.count)[:, None], residual(target, draft), target)
    last = sampler.draw(jnp.take_along_axis(candidates.columns, at[:, 0], axis=1), last_log_probs[:, None])

    padded = jnp.concatenate([drafts.tokens, drafts.tokens[:, -1:]], axis=1)
    is_last = place == accepted[:, None]
    tokens = jnp.where(is_last, last, padded)
    chosen = ((place < accepted[:, None]) | is_last) & candidates.valid[:, : window + 1]
    logprobs = _at_token(rows.model_log_probs[:, : window + 1], tokens)
    all_passed = active & (accepted == drafts.count)
    proposals = _propose(candidates, rows, sampler, all_passed, entropy_bound, window)
    state = keep_drafts(state, accepted)
    state = commit(state, candidates.columns[:, : window + 1], chosen, tokens, logprobs, place)
    counts = {
        "proposed": drafts.proposed + drafts.count * active,
        "accepted": drafts.accepted + accepted,
    }
    return state.replace(drafts=proposals.replace(**counts))


def _propose(candidates, rows, sampler, wanted, entropy_bound, window) -> Drafts:
    """Drafts for the next step where `wanted` [B], each drawn by itself; as many as the bound allows."""
    columns, valid, log_probs = (
        candidates.columns[:, window + 1 :],
        candidates.valid[:, window + 1 :],
        rows.log_probs[:, window + 1 :],
    )
    if entropy_bound is not None:
        h = rows.entropy[:, window + 1 :]
        excess = jnp.cumsum(h, axis=1) - jax.lax.cummax(h, axis=1)
        valid &= excess <= entropy_bound  # grows along the window: a prefix
    count = jnp.where(wanted, jnp.sum(valid, axis=1, dtype=jnp.int32), 0)
    tokens = sampler.draw(columns, log_probs, _PROPOSE)
    return Drafts(tokens, count, log_probs, proposed=count, accepted=count)


def residual(target, draft):
    """log of max(p - q, 0), normalised, [..., V]; the target where the two hardly differ.

    Args:
      target, draft: [..., V] log-probabilities.
    """
    rest = jnp.maximum(jnp.exp(target) - jnp.exp(draft), 0.0)
    mass = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(mass > 0, jnp.log(rest / jnp.where(mass > 0, mass, 1.0)), target)


def _at_token(log_probs, tokens):
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
