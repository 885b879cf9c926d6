"""A step's query rows, judged: tokens drawn, their own log-probabilities, how good a candidate each is.

Randomness is a function of (example's key, step, column, purpose): batch mates, padding and the kind of
forward change nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3_jax.decoding.sampling import (
    Sampling,
    candidate_score,
    draw,
    draw_log_probs,
    entropy,
    filtered_logprobs,
    map_rows,
)  # fmt: skip

_DRAW, _SCORE = 0, 1  # purposes


class SampledTokens(NamedTuple):
    """[B, Q] each: the drawn token, its log-probability by the model itself, what the rules look at."""

    token: Any
    logprob: Any
    score: Any
    entropy: Any
    confidence: Any


class Distributions(NamedTuple):
    """Log-probabilities, float32 [B, Q, V]: what is drawn from, and the model's own.

    `entropy` [B, Q], in nats, is that of the filtered distribution, at temperature 0 too.
    """

    log_probs: Any
    model_log_probs: Any
    entropy: Any


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """What a strategy may ask about the rows of its offer.

    Attributes:
      hidden: [B, Q, D], what the forward gave for them.
      head: [D] -> scores over the vocabulary [V].
      keys: [B] of this step.
      sampling: how tokens are drawn.
      criterion: of `SampledTokens.score`.
      vocab_size: V.
    """

    hidden: Any
    head: Callable[[Any], Any]
    keys: Any
    sampling: Sampling
    criterion: str
    vocab_size: int

    def __call__(self, candidates) -> SampledTokens:
        """Some rows' logits at a time."""

        def one_row(hidden_D, key):
            scores_V = self.head(hidden_D).astype(jnp.float32)
            drawn_from = filtered_logprobs(scores_V, self.sampling)
            token = draw(drawn_from, key, self.sampling)
            score = candidate_score(drawn_from, jax.random.fold_in(key, _SCORE), self.criterion)
            model_log_prob = jax.nn.log_softmax(scores_V)[token]
            return SampledTokens(
                token, model_log_prob, score, entropy(drawn_from), jnp.exp(jnp.max(drawn_from))
            )

        return map_rows(one_row, (self.hidden, self._row_keys(candidates.columns)), self.vocab_size)

    def distributions(self) -> Distributions:
        """The whole distributions of all rows at once: for few rows."""

        def one_row(hidden_D):
            scores_V = self.head(hidden_D).astype(jnp.float32)
            filtered = filtered_logprobs(scores_V, self.sampling)
            return Distributions(
                draw_log_probs(filtered, self.sampling), jax.nn.log_softmax(scores_V), entropy(filtered)
            )

        return map_rows(one_row, (self.hidden,), self.vocab_size)

    def draw(self, columns, log_probs_BQV, purpose: int = _DRAW):
        """Tokens [B, Q] for columns [B, Q] from log-probabilities [B, Q, V]."""
        keys = self._row_keys(columns, purpose)
        return jax.vmap(jax.vmap(lambda log_probs_V, key: draw(log_probs_V, key, self.sampling)))(
            log_probs_BQV, keys
        )

    def uniform(self, columns, purpose: int):
        """[B, Q] float32 in [0, 1)."""
        return jax.vmap(jax.vmap(jax.random.uniform))(self._row_keys(columns, purpose))

    def _row_keys(self, columns, purpose: int = _DRAW):
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(self.keys, columns)
        if purpose == _DRAW:
            return keys
        return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, purpose)
