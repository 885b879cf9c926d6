"""Any-subset speculative decoding (ASSD, arXiv 2504.20456).

Drafts tokens in parallel, and samples exactly from the distribution of one token at a time. A step is one
forward, which verifies the drafts of the step before and makes those of the next:

    committed  |  y0  y1  y2            content rows of the drafts, each at a rank of its own
    query rows    p0  p1  p2  p3        row i sees what is committed and the drafts before i
                              q q q     proposals for the next window, which see all drafts

Draft i, drawn from q_i, passes with probability min(1, p_i / q_i). The first that fails is drawn again from
max(p_i - q_i, 0), normalised; if all pass, a bonus token is drawn from the row after them. Either way
the tokens follow p exactly (Leviathan et al., arXiv 2211.17192, theorem 1), and every forward commits at
least one: there are never more forwards than blanks. Proposals are used only if all drafts passed: those of
the next window were made without the bonus token, which its verification puts right. With no drafts (at the
start, and after a failure) the bonus is plain sampling.
"""

import jax
import jax.numpy as jnp

from a3_jax.decoding.decode_state import DecodeState, Drafts, commit, keep_drafts, upcoming
from a3_jax.decoding.strategies import Candidates, Strategy

_VERIFY, _PROPOSE = 2, 3  # purposes of a row's random bits, after those of `sampling`


def speculative(window: int, entropy_bound: float | None = None) -> Strategy:
    """Makes the strategy that verifies up to `window` drafts per step, in the planned order.

    Args:
      window: W, the most drafts per step.
      entropy_bound: drafts only as many as `strategies.CommitPolicy` would commit under this bound.
    """

    def accept(state, candidates, sampler):
        return _verify(state, candidates, sampler, entropy_bound)

    return Strategy(lambda state: _offer(state, window), accept)


def no_drafts(batch: int, window: int, vocab_size: int) -> Drafts:
    """Makes the drafts that decoding begins with: none, in arrays [B, W] and [B, W, V]."""
    zeros_B = jnp.zeros(batch, jnp.int32)
    log_probs = jnp.zeros((batch, window, vocab_size), jnp.float32)
    return Drafts(jnp.zeros((batch, window), jnp.int32), zeros_B, log_probs, zeros_B, zeros_B)


def _offer(state: DecodeState, window: int) -> Candidates:
    """Rows 0..W verify the drafts and draw the token after them; rows W+1..2W propose what follows that.

    Of W = 3 with 2 drafts waiting, by the number of the column among the upcoming ones:

        row              0  1  2  3  |  4  5  6
        column           0  1  2  .  |  3  4  5
        drafts visible   0  1  2     |  2  2  2
    """
    upcoming_BQ, unfilled_B = upcoming(state, 2 * window + 1)
    drafted_B1, unfilled_B1 = state.drafts.count[:, None], unfilled_B[:, None]
    batch = upcoming_BQ.shape[0]
    verify = jnp.broadcast_to(jnp.arange(window + 1, dtype=jnp.int32), (batch, window + 1))
    propose = drafted_B1 + 1 + jnp.arange(window, dtype=jnp.int32)
    index_BQ = jnp.concatenate([verify, propose], axis=1)
    wanted_BQ = jnp.concatenate([verify <= drafted_B1, jnp.ones(propose.shape, bool)], axis=1)
    return Candidates(
        columns=jnp.take_along_axis(upcoming_BQ, jnp.minimum(index_BQ, upcoming_BQ.shape[1] - 1), axis=1),
        valid=wanted_BQ & (index_BQ < unfilled_B1),
        num_visible_drafts=jnp.minimum(index_BQ, drafted_B1),
    )


def _verify(state: DecodeState, candidates: Candidates, sampler, entropy_bound) -> DecodeState:
    """Commits the drafts that pass and one token more, and drafts the next window. Here Q = W + 1."""
    rows = sampler.distributions()
    drafts, window = state.drafts, state.drafts.tokens.shape[1]
    log_probs_BQV, index_Q = rows.log_probs[:, : window + 1], jnp.arange(window + 1)
    columns_BQ, valid_BQ = candidates.columns[:, : window + 1], candidates.valid[:, : window + 1]
    active_B = valid_BQ[:, 0]  # row 0 is a candidate as long as any blank is left

    # Draft i passes if u < p_i / q_i: that is min(1, p / q), and log u < log p - log q needs no division by
    # a q that underflows. A draft counts only if all before it passed, as they are what its row has seen.
    uniform = sampler.uniform(columns_BQ[:, :window], _VERIFY)
    ratio = _at_token(log_probs_BQV[:, :window], drafts.tokens) - _at_token(drafts.log_probs, drafts.tokens)
    passed = (jnp.log(uniform) < ratio) & (index_Q[:window] < drafts.count[:, None])
    accepted_B = jnp.sum(jnp.cumprod(passed, axis=1), axis=1) * active_B

    # One token more, in column `accepted`: where a draft failed, from what p has over q, so that the sum of
    # both ways to a token is p; where none is left, from p itself, as nothing was drawn there before.
    at_B11 = accepted_B[:, None, None]
    target_BV = jnp.take_along_axis(log_probs_BQV, at_B11, axis=1)[:, 0]
    draft_BV = jnp.take_along_axis(drafts.log_probs, jnp.minimum(at_B11, window - 1), axis=1)[:, 0]
    has_failed_B1 = (accepted_B < drafts.count)[:, None]
    last_BV = jnp.where(has_failed_B1, residual(target_BV, draft_BV), target_BV)
    last_B1 = sampler.draw(jnp.take_along_axis(columns_BQ, at_B11[:, 0], axis=1), last_BV[:, None])

    # The drafts before it and that token are committed, each as a group of its own.
    drafts_BQ = jnp.concatenate([drafts.tokens, drafts.tokens[:, -1:]], axis=1)
    is_last_BQ = index_Q == accepted_B[:, None]
    tokens_BQ = jnp.where(is_last_BQ, last_B1, drafts_BQ)
    chosen_BQ = ((index_Q < accepted_B[:, None]) | is_last_BQ) & valid_BQ
    model_log_probs_BQ = _at_token(rows.model_log_probs[:, : window + 1], tokens_BQ)

    # Proposals were drawn given all drafts: after a failure they don't belong to what is committed. Keys of
    # failed drafts stay in the cache after its length, where they are never read.
    all_passed_B = active_B & (accepted_B == drafts.count)
    proposals = _propose(candidates, rows, sampler, all_passed_B, entropy_bound, window)
    state = keep_drafts(state, accepted_B)
    state = commit(state, columns_BQ, chosen_BQ, tokens_BQ, model_log_probs_BQ, rank_offset=index_Q)
    proposed_B = drafts.proposed + drafts.count * active_B
    return state.replace(drafts=proposals.replace(proposed=proposed_B, accepted=drafts.accepted + accepted_B))


def _propose(candidates, rows, sampler, wanted_B, entropy_bound, window) -> Drafts:
    """Drafts for the next step where `wanted_B`, each drawn by itself; as many as the bound allows. Q = W."""
    columns_BQ, valid_BQ, log_probs_BQV, entropy_BQ = (
        array[:, window + 1 :]
        for array in (candidates.columns, candidates.valid, rows.log_probs, rows.entropy)
    )
    if entropy_bound is not None:
        # sum - max never falls along the window, so what is allowed is a prefix.
        excess_BQ = jnp.cumsum(entropy_BQ, axis=1) - jax.lax.cummax(entropy_BQ, axis=1)
        valid_BQ &= excess_BQ <= entropy_bound
    count_B = jnp.where(wanted_B, jnp.sum(valid_BQ, axis=1, dtype=jnp.int32), 0)
    tokens_BQ = sampler.draw(columns_BQ, log_probs_BQV, _PROPOSE)
    return Drafts(tokens_BQ, count_B, log_probs_BQV, proposed=count_B, accepted=count_B)


def residual(target, draft):
    """Returns log of max(p - q, 0), normalised, [..., V]; the target where the two hardly differ.

    Args:
      target, draft: [..., V] log-probabilities.
    """
    rest = jnp.maximum(jnp.exp(target) - jnp.exp(draft), 0.0)
    mass = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(mass > 0, jnp.log(rest / jnp.where(mass > 0, mass, 1.0)), target)


def _at_token(log_probs, tokens):
    return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
