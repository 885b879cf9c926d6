"""From logits to a token, its log-probability, and how good a candidate it is.

All in float32, whatever the model computes in.
"""

import dataclasses

import jax
import jax.numpy as jnp

_COLDEST = 1e-30  # temperatures below are this one: float32 has no smaller numbers to spare
_CHUNK_LOGITS = 2**24  # logits alive at a time: 64 MiB


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `GenerateOptions` explains the fields."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def filtered_logprobs(logits_V, sampling: Sampling):
    """The distribution a token is drawn from, as log-probabilities.

    Temperature first (1 if it is 0), then the `top_k` most likely tokens, then of those the smallest
    set whose probability exceeds `top_p`; the token that goes over is kept. For top_p = 0.6:

        probability   0.5  0.3  0.15  0.05
        kept           x    x

    Args:
      logits_V: [V] float.

    Returns:
      [V] float32, -inf where filtered out; `exp` of it sums to 1. Of equal tokens the lower ids stay.
    """
    logits_V = logits_V.astype(jnp.float32)
    if not sampling.greedy:
        # From the largest down: a tiny temperature sends the rest to -inf, not all of it to NaN.
        logits_V = (logits_V - jnp.max(logits_V)) / max(sampling.temperature, _COLDEST)
    size = logits_V.shape[0]
    if 0 < sampling.top_k < size or sampling.top_p < 1:
        order = jnp.argsort(-logits_V, stable=True)
        sorted_logits = logits_V[order]
        if 0 < sampling.top_k < size:
            sorted_logits = jnp.where(jnp.arange(size) < sampling.top_k, sorted_logits, -jnp.inf)
        if sampling.top_p < 1:
            probabilities = jax.nn.softmax(sorted_logits)
            before = jnp.cumsum(probabilities) - probabilities
            likeliest = jnp.arange(size) == 0
            sorted_logits = jnp.where((before <= sampling.top_p) | likeliest, sorted_logits, -jnp.inf)
        logits_V = jnp.zeros_like(logits_V).at[order].set(sorted_logits)
    return jax.nn.log_softmax(logits_V)


def draw_log_probs(logprobs_V, sampling: Sampling):
    """What `draw` follows, log-probabilities [V]: `filtered_logprobs`, or all on the likeliest if greedy."""
    if not sampling.greedy:
        return logprobs_V
    chosen = jnp.arange(logprobs_V.shape[0]) == jnp.argmax(logprobs_V)
    return jnp.where(chosen, 0.0, -jnp.inf)


def draw(logprobs_V, key, sampling: Sampling):
    """A token id (int32 scalar) from `filtered_logprobs` [V]; greedy: the likeliest, lowest on a tie."""
    if sampling.greedy:
        return jnp.argmax(logprobs_V).astype(jnp.int32)
    # The default Gumbel noise of float32 is bounded near 16: rare tokens would never be drawn.
    return jax.random.categorical(key, logprobs_V, mode="high").astype(jnp.int32)


def candidate_score(logprobs_V, key, criterion: str):
    """How willingly a blank is committed, float32, higher = sooner.

    Args:
      logprobs_V: [V] from `filtered_logprobs`.
      key: read by "random" only.
      criterion: "confidence" (largest log-probability), "entropy" (its negative), "margin" (largest
        minus second largest probability) or "random".
    """
    if criterion == "confidence":
        return jnp.max(logprobs_V)
    if criterion == "entropy":
        return -entropy(logprobs_V)
    if criterion == "margin":
        two_best = jax.lax.top_k(jnp.exp(logprobs_V), min(2, logprobs_V.shape[0]))[0]
        return two_best[0] - (two_best[1] if two_best.shape[0] == 2 else 0.0)
    if criterion == "random":
        return jax.random.uniform(key)
    raise ValueError(f"unknown criterion {criterion!r}")


def entropy(logprobs_V):
    """Of log-probabilities [..., V], in nats, [...]."""
    kept = logprobs_V > -jnp.inf
    return -jnp.sum(jnp.where(kept, jnp.exp(logprobs_V) * jnp.where(kept, logprobs_V, 0.0), 0.0), axis=-1)


def map_rows(function, rows, vocab_size: int):
    """`function` of each row, some rows at a time: never all rows' logits at once.

    Args:
      function: of one row of each array; what it returns is stacked.
      rows: a tuple of arrays [B, Q, ...].
      vocab_size: how many logits a row costs.

    Returns:
      `function`'s results, [B, Q, ...].
    """
    batch, count = rows[0].shape[:2]
    flat = tuple(array.reshape(batch * count, *array.shape[2:]) for array in rows)
    chunk = max(1, min(_CHUNK_LOGITS // vocab_size, batch * count))
    out = jax.lax.map(lambda row: function(*row), flat, batch_size=chunk)
    return jax.tree.map(lambda array: array.reshape(batch, count, *array.shape[1:]), out)
