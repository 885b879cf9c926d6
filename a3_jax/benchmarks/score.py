"""`a3 bench score`: `a3 score` of whole texts against the forward pass of training, over the same rows."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.benchmarks.measurement import MeasurementError, Row, alternate, note, ratio
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows
from a3_jax.decoding.scoring import score
from a3_jax.model.sharding import batch_sharding, make_mesh
from a3_jax.model.two_stream import TwoStream, init_params
from a3_jax.training.step import make_loss


def measure(settings: Settings) -> list[Row]:
    """Seconds of scoring a batch, lines in and lines out, beside those of the training loss.

    Raises:
      MeasurementError: the two disagree on the sum.
    """
    rows: list[Row] = []
    for length in settings.lengths:
        rows += _measure(settings, length)
    return rows


def _measure(settings, length) -> list[Row]:
    batch = settings.batch_at(length)
    config, drawn = settings.model(length), draw_rows(settings, length, batch)
    params = init_params(config, jax.random.key(settings.seed), jnp.dtype(settings.dtype))
    checkpoint = types.SimpleNamespace(params=params, config=config, tokenizer=None, meta=None)
    items = [
        {"tokens": tokens.tolist(), "ranks": ranks.tolist()}
        for tokens, ranks in zip(drawn["tokens"], drawn["ranks"], strict=True)
    ]
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    model = TwoStream(config, dtype=jnp.dtype(settings.dtype), attention=settings.attention)
    with jax.set_mesh(mesh):
        loss = make_loss(model, objective="any_order")
        placed = jax.device_put(sort_rows(drawn), batch_sharding(mesh))
        calls = {
            "score": lambda: score(checkpoint, items, dtype=settings.dtype),
            "training_forward": lambda: jax.block_until_ready(loss(params, placed)),
        }
        note(f"score: length {length}: compiling")
        _check(calls["score"](), calls["training_forward"](), settings.dtype)
        seconds = alternate(calls, settings.repeats, f"score: length {length}", warm_ups=1)
    setting = settings.describe(length)
    tokens = batch * length
    return [
        Row("score_rate", "tokens/s", setting, [tokens / s for s in seconds["score"]]),
        Row("training_forward_rate", "tokens/s", setting, [tokens / s for s in seconds["training_forward"]]),
        ratio("score_time_over_training_forward", seconds["score"], seconds["training_forward"], setting),
    ]


def _check(scores, loss, dtype) -> None:
    ours, theirs = -sum(result["logprob"] for result in scores), float(loss[0])
    if not np.isclose(ours, theirs, rtol=1e-4 if dtype == "float32" else 2e-2):
        raise MeasurementError(f"score: {ours} nats, the training loss says {theirs}")
