"""From logits to a token, its log-probability, and a score as a candidate. In float32 throughout.

Randomness is a function of (example's key, step, column, purpose): neither the other examples of a batch,
nor padding, nor the kind of forward changes what is drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_COLDEST = 1e-30  # temperatures below are this one: float32 has no smaller numbers to spare
_CHUNK_LOGITS = 2**24  # logits alive at a time: 64 MiB
_DRAW, _SCORE = 0, 1  # purposes of a row's random bits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `GenerateOptions` explains the fields."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class SampledTokens(NamedTuple):
    """The tokens drawn for candidates, [B, Q] each.

    Attributes:
      token: int32.
      logprob: float32, the token's log-probability by the model itself: temperature 1, no filter.
      score: float32, commit priority, see `candidate_score`.
      entropy, confidence: float32, of the distribution drawn from: nats, and its largest probability.
    """

    token: Any
    logprob: Any
    score: Any
    entropy: Any
    confidence: Any


class Distributions(NamedTuple):
    """Log-probabilities, float32 [B, Q, V]: those that tokens are drawn from, and the model's own.

    `entropy` [B, Q], in nats, is that of the filtered distribution, at temperature 0 too.
    """

    log_probs: Any
    model_log_probs: Any
    entropy: Any


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """Samples tokens for the query rows of a step, and scores them as commit candidates.

    Attributes:
      hidden: [B, Q, D], the forward's result for the candidates.
      head: [D] -> scores over the vocabulary [V].
      keys: [B], of this step.
      sampling: how tokens are drawn.
      criterion: that of `SampledTokens.score`.
      vocab_size: V.
    """

    hidden: Any
    head: Callable[[Any], Any]
    keys: Any
    sampling: Sampling
    criterion: str
    vocab_size: int

    def __call__(self, candidates) -> SampledTokens:
        """Samples one token per candidate, with some rows' logits alive at a time."""

        def one_row(hidden_D, key):
            scores_V = self.head(hidden_D).astype(jnp.float32)
            log_probs_V = filtered_logprobs(scores_V, self.sampling)
            token = draw(log_probs_V, key, self.sampling)
            score = candidate_score(log_probs_V, jax.random.fold_in(key, _SCORE), self.criterion)
            model_log_prob = jax.nn.log_softmax(scores_V)[token]
            confidence = jnp.exp(jnp.max(log_probs_V))
            return SampledTokens(token, model_log_prob, score, entropy(log_probs_V), confidence)

        return map_rows(one_row, (self.hidden, self._row_keys(candidates.columns)), self.vocab_size)

    def distributions(self) -> Distributions:
        """Returns the distributions of all rows at once: for few rows."""

        def one_row(hidden_D):
            scores_V = self.head(hidden_D).astype(jnp.float32)
            filtered_V = filtered_logprobs(scores_V, self.sampling)
            log_probs_V = draw_log_probs(filtered_V, self.sampling)
            return Distributions(log_probs_V, jax.nn.log_softmax(scores_V), entropy(filtered_V))

        return map_rows(one_row, (self.hidden,), self.vocab_size)

    def draw(self, columns_BQ, log_probs_BQV, purpose: int = _DRAW):
        """Draws tokens [B, Q] for columns [B, Q] from log-probabilities [B, Q, V]."""
        keys_BQ = self._row_keys(columns_BQ, purpose)
        one_row = jax.vmap(lambda log_probs_V, key: draw(log_probs_V, key, self.sampling))
        return jax.vmap(one_row)(log_probs_BQV, keys_BQ)

    def uniform(self, columns_BQ, purpose: int):
        """Draws [B, Q] float32 in [0, 1)."""
        return jax.vmap(jax.vmap(jax.random.uniform))(self._row_keys(columns_BQ, purpose))

    def _row_keys(self, columns_BQ, purpose: int = _DRAW):
        keys_BQ = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(self.keys, columns_BQ)
        if purpose == _DRAW:
            return keys_BQ
        return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys_BQ, purpose)


def filtered_logprobs(logits_V, sampling: Sampling):
    """Returns the distribution a token is drawn from, as log-probabilities.

    Temperature first (1 if it is 0), then the `top_k` most likely tokens, then of those the smallest
    set whose probability exceeds `top_p`; the token that goes over is kept. For top_p = 0.6:

        probability   0.5  0.3  0.15  0.05
        kept           x    x

    Args:
      logits_V: [V] float.
      sampling: temperature and filters.

    Returns:
      [V] float32, -inf where filtered out; `exp` of it sums to 1. Of equal tokens the lower ids stay.
    """
    logits_V = logits_V.astype(jnp.float32)
    if not sampling.greedy:
        # From the largest down: a tiny temperature sends the rest to -inf, not all of it to NaN.
        logits_V = (logits_V - jnp.max(logits_V)) / max(sampling.temperature, _COLDEST)
    size = logits_V.shape[0]
    if 0 < sampling.top_k < size or sampling.top_p < 1:
        # Sorted from the likeliest, what a filter keeps is a prefix; the scatter at the end puts it back.
        order_V = jnp.argsort(-logits_V, stable=True)
        sorted_V = logits_V[order_V]
        if 0 < sampling.top_k < size:
            sorted_V = jnp.where(jnp.arange(size) < sampling.top_k, sorted_V, -jnp.inf)
        if sampling.top_p < 1:
            probabilities_V = jax.nn.softmax(sorted_V)
            before_V = jnp.cumsum(probabilities_V) - probabilities_V
            likeliest_V = jnp.arange(size) == 0
            sorted_V = jnp.where((before_V <= sampling.top_p) | likeliest_V, sorted_V, -jnp.inf)
        logits_V = jnp.zeros_like(logits_V).at[order_V].set(sorted_V)
    return jax.nn.log_softmax(logits_V)


def draw_log_probs(log_probs_V, sampling: Sampling):
    """Returns log-probabilities [V] that `draw` follows: all on the likeliest if greedy, else as given."""
    if not sampling.greedy:
        return log_probs_V
    chosen_V = jnp.arange(log_probs_V.shape[0]) == jnp.argmax(log_probs_V)
    return jnp.where(chosen_V, 0.0, -jnp.inf)


def draw(log_probs_V, key, sampling: Sampling):
    """Draws an id (int32 scalar) from `filtered_logprobs` [V]; greedy: the likeliest, lowest on a tie."""
    if sampling.greedy:
        return jnp.argmax(log_probs_V).astype(jnp.int32)
    # The default Gumbel noise of float32 is bounded near 16: rare tokens would never be drawn.
    return jax.random.categorical(key, log_probs_V, mode="high").astype(jnp.int32)


def candidate_score(log_probs_V, key, criterion: str):
    """Returns the commit priority of a blank, float32 scalar; higher is committed first.

    Args:
      log_probs_V: [V] from `filtered_logprobs`.
      key: read by "random" only.
      criterion: "confidence" (largest log-probability), "entropy" (its negative), "margin" (largest
        minus second largest probability) or "random".
    """
    if criterion == "confidence":
        return jnp.max(log_probs_V)
    if criterion == "entropy":
        return -entropy(log_probs_V)
    if criterion == "margin":
        two_best = jax.lax.top_k(jnp.exp(log_probs_V), min(2, log_probs_V.shape[0]))[0]
        return two_best[0] - (two_best[1] if two_best.shape[0] == 2 else 0.0)
    if criterion == "random":
        return jax.random.uniform(key)
    raise ValueError(f"unknown criterion {criterion!r}")


def entropy(log_probs):
    """Returns the entropy in nats, [...], of log-probabilities [..., V]."""
    # 0 log 0 is 0 here: -inf times 0 would be NaN.
    kept = log_probs > -jnp.inf
    return -jnp.sum(jnp.where(kept, jnp.exp(log_probs) * jnp.where(kept, log_probs, 0.0), 0.0), axis=-1)


def map_rows(function, rows, vocab_size: int):
    """Maps a function over rows, some at a time: all rows' logits are never alive at once.

    Args:
      function: of one row of each array; its results are stacked.
      rows: a tuple of arrays [B, Q, ...].
      vocab_size: how many logits a row costs.

    Returns:
      `function`'s results, [B, Q, ...].
    """
    # [B, Q, ...] -> [B Q, ...]: chunks may cross examples.
    batch, count = rows[0].shape[:2]
    flat = tuple(array.reshape(batch * count, *array.shape[2:]) for array in rows)
    chunk = max(1, min(_CHUNK_LOGITS // vocab_size, batch * count))
    out = jax.lax.map(lambda row: function(*row), flat, batch_size=chunk)
    return jax.tree.map(lambda array: array.reshape(batch, count, *array.shape[1:]), out)
