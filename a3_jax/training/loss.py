"""Cross-entropy fused with the head, a chunk of rows at a time: no [B, T, V] array is ever alive."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

CHUNK = 128  # rows of each sequence whose logits are alive at once


def cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of negative log-likelihoods, and the sum of the weights.

    The mean is left to the caller: sums add up over microbatches and hosts, means don't.

        T rows   [ chunk | chunk | chunk | rest + padding of weight 0 ]
                     head -> logits [B, chunk, V] -> two sums, one chunk after another

    Chunks run along T, so that an example stays on the device that holds it. The backward pass
    computes a chunk's logits again instead of keeping them.

    Args:
      head: hidden states [B, chunk, D] to float32 logits [B, chunk, V].
      hidden_BTD: final hidden states, any float dtype.
      targets_BT: int32 token ids in 0..V-1; where the weight is 0 any value will do.
      weights_BT: float32, 0 for rows that aren't predicted.
      chunk: rows of each sequence at a time.

    Returns:
      (sum in nats, sum of weights): float32 scalars.
    """
    length = targets_BT.shape[1]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)

    def split(array):
        padding = [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding)
        return padded.reshape(array.shape[0], chunks, chunk, *array.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_sum(hidden, targets, weights):
        return jnp.sum(negative_log_likelihood(head(hidden), targets) * weights)

    def add(total, inputs):
        return total + chunk_sum(*inputs), None

    with jax.named_scope("loss"):
        weights_BT = weights_BT.astype(jnp.float32)
        inputs = (split(hidden_BTD), split(targets_BT), split(weights_BT))
        total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), inputs)
        return total, jnp.sum(weights_BT)


def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """`logsumexp(logits) - logits[target]` in nats, float32 [B, T].

    The target's logit is picked by comparison, not by index: its gradient needs no scatter, and a
    vocabulary sharded over devices is summed where it lies.
    """
    vocabulary = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)
    chosen = jnp.where(vocabulary == targets_BT[..., None], logits_BTV, 0.0).sum(-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen
