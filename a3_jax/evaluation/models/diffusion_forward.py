"""The network as a masked-diffusion model: content rows alone, each of which sees the whole text.

tokens   The  [m]  sat  [m]  .      rows in reading order, start 0, limit the length of the text
logits         ^         ^          of a masked token, from its own row, or with `logit_shift` from the row
                                    before, as models adapted from left-to-right ones have it; the first
                                    token is predicted from its own row in any case
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.batching import batches, bucket, length_bucket
from a3_jax.decoding.sampling import map_rows
from a3_jax.evaluation.models.interface import ScoreTarget
from a3_jax.evaluation.models.scorers import Masks
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import axis_parts, mesh_of
from a3_jax.model.two_stream import Rows, TwoStream, logits, make_two_stream, run_rows

FEWEST_QUERIES = 8  # of a bucket of masked tokens


def predicting_rows(model: TwoStream, params, tokens, lengths, columns):
    """Returns the hidden states after the final norm that predict the tokens at some columns.

    Args:
      model: the network, in the dtype of the computation.
      tokens: [B, T] int32 in reading order, the mask token at masked ones; anything after `lengths`.
      lengths: [B] int32, tokens of each text.
      columns: [B, Q] int32, in 0..T-1.

    Returns:
      [B, Q, D].
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    limit = jnp.where(positions < lengths[:, None], lengths[:, None], 0)
    content = Rows(positions=positions, start=jnp.zeros_like(limit), limit=limit, tokens=tokens)
    hidden_BTD = run_rows(model, params, content, outputs="content").content
    rows = jnp.maximum(columns - int(model.config.logit_shift), 0)
    return jnp.take_along_axis(hidden_BTD, rows[..., None], axis=1)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def masked_logprobs(params, tokens, lengths, columns, targets, *, config: ModelConfig, dtype: str):
    """Returns log p(target | the text as it is masked) at some columns.

    Args:
      tokens, lengths, columns: as in `predicting_rows`.
      targets: [B, Q] int32, the true tokens at the columns.

    Returns:
      [B, Q] float32, in nats.
    """
    model = make_two_stream(config, dtype)
    hidden_BQD = predicting_rows(model, params, tokens, lengths, columns)

    def one_row(hidden_D, target):
        scores_V = logits(params, config, hidden_D, model.precision)
        return scores_V[target] - jax.nn.logsumexp(scores_V)

    return map_rows(one_row, (hidden_BQD, targets), config.vocab_size)


def run_masks(
    checkpoint,
    targets: Sequence[ScoreTarget],
    masks_of: Callable[[int], Masks],
    *,
    dtype: str,
    most: int | None,
) -> list[tuple[float, np.ndarray]]:
    """Runs the masks of every target, those of one padded shape together.

    Args:
      checkpoint: from `open_checkpoint`, with a mask token.
      masks_of: index of a target -> its masks, called when its batch is made.
      dtype: dtype of the computation, by name.
      most: the most masks per batch; None: as many as their rows allow.

    Returns:
      For each target the weighted sum of its scored log-probabilities, and [n] float64: for each token the
      sum of its log-probabilities over the masks that score it.
    """
    totals = [0.0] * len(targets)
    by_token = [np.zeros(target.stop - target.start) for target in targets]

    def shape_of(target):
        return length_bucket(len(target.tokens)), bucket(target.stop - target.start, FEWEST_QUERIES)

    for shape, indices, _ in batches(targets, shape_of, most):
        masks = {index: masks_of(index) for index in indices}
        passes = [(index, number) for index in indices for number in range(len(masks[index].weights))]
        for _, chosen, size in batches(passes, lambda _, shape=shape: shape, most):
            batch = [passes[one] for one in chosen]
            for (index, number), logprobs in zip(
                batch, _run(checkpoint, targets, masks, batch, shape, size, dtype), strict=False
            ):
                of = masks[index]
                scored = np.where(of.scored[number], logprobs[: of.scored.shape[1]], 0.0)
                by_token[index] += scored
                totals[index] += float(of.weights[number] * scored.sum())
    return list(zip(totals, by_token, strict=True))


def _run(checkpoint, targets, masks, batch, shape, size, dtype) -> np.ndarray:
    """Returns [size, Q] float64: log-probabilities of the parts, each under one mask."""
    with mesh_of(checkpoint.params):
        size = math.lcm(size, axis_parts("batch"))
        tokens = np.zeros((size, shape[0]), np.int32)
        columns, wanted = (np.zeros((size, shape[1]), np.int32) for _ in range(2))
        lengths = np.zeros(size, np.int32)
        for row, (index, number) in enumerate(batch):
            target, count = targets[index], targets[index].stop - targets[index].start
            lengths[row] = len(target.tokens)
            tokens[row, : lengths[row]] = target.tokens
            part = tokens[row, target.start : target.stop]
            wanted[row, :count], columns[row, :count] = part, np.arange(target.start, target.stop)
            part[masks[index].masked[number]] = checkpoint.config.mask_token
        out = masked_logprobs(
            checkpoint.params, tokens, lengths, columns, wanted, config=checkpoint.config, dtype=dtype
        )
        return np.asarray(out, np.float64)
