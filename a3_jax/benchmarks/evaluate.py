"""`a3 bench eval`: multiple choice under evaluation against the scoring engine on the same rows.

A row has four choices of its own lengths after a common context, the longest text at most `length` tokens.
The evaluation gets them as requests in the order of the rows; the engine gets them as padded batches, made
beforehand: once those of the evaluation, and once in bare rows of the whole length, without any padding.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.benchmarks.measurement import MeasurementError, Row, alternate, note
from a3_jax.benchmarks.settings import Settings
from a3_jax.decoding import scoring
from a3_jax.evaluation.requests import Target
from a3_jax.evaluation.two_stream import TwoStream
from a3_jax.model.two_stream import init_params
from a3_jax.tokenizer import bytes_tokenizer

CHOICES = 4


def measure(settings: Settings) -> list[Row]:
    """Tokens a second of the evaluation and of the engine, padding not counted, and their ratios.

    Raises:
      MeasurementError: the two disagree on the scores.
    """
    return [row for length in settings.lengths for row in _measure_length(settings, length)]


def _measure_length(settings, length) -> list[Row]:
    count = settings.batch_at(length)
    params = init_params(settings.model(length), jax.random.key(settings.seed), jnp.dtype(settings.dtype))
    checkpoint = types.SimpleNamespace(
        params=params, config=settings.model(length), tokenizer=bytes_tokenizer(), meta=None
    )
    model = TwoStream(checkpoint, dtype=settings.dtype)
    targets = draw_choices(np.random.default_rng(settings.seed), count, length, settings.vocab)
    note(f"eval: length {length}: compiling")
    ours, batches = _recorded(lambda: model.score(targets))
    engine = _engine(checkpoint, batches, settings.dtype)
    theirs = sum(float(np.sum(out.logprobs, where=batch.is_scored)) for out, batch in zip(engine(), batches))
    if not np.isclose(sum(ours), theirs, rtol=1e-4):
        raise MeasurementError(f"eval: {sum(ours)} nats, the engine says {theirs}")
    whole = [_whole_rows(batch, length) for batch in batches]
    calls = {
        "eval": lambda: model.score(targets),
        "engine": engine,
        "whole_rows": _engine(checkpoint, whole, settings.dtype),
    }
    seconds = alternate(calls, settings.repeats, f"eval: length {length}", warm_ups=1)
    setting = settings.describe(length, count, choices=CHOICES)
    tokens = {
        "eval": sum(len(target.tokens) for target in targets),
        "whole_rows": sum(int(batch.segment_ids.sum()) for batch in whole),
    }
    tokens["engine"] = tokens["eval"]
    rates = {name: [tokens[name] / second for second in seconds[name]] for name in calls}
    return [
        *(Row(f"{name}_rate", "tokens/s", setting, rates[name]) for name in calls),
        *(
            Row(f"eval_rate_over_{name}", "ratio", setting,
                [a / b for a, b in zip(rates["eval"], rates[name], strict=True)])
            for name in ("engine", "whole_rows")
        ),
    ]  # fmt: skip


def draw_choices(rng: np.random.Generator, rows: int, length: int, vocab: int) -> list[Target]:
    """Multiple choice as HellaSwag has it: contexts of a third to three quarters of `length` tokens, four
    endings each of up to a quarter."""
    targets = []
    for _ in range(rows):
        context = rng.integers(0, vocab, rng.integers(max(length // 3, 1), max(length * 3 // 4, 2)))
        for size in rng.integers(1, max(length // 4, 2), CHOICES):
            tokens = np.concatenate([context, rng.integers(0, vocab, size)]).astype(np.int32)
            targets.append(Target(tokens, len(context), len(tokens)))
    return targets


def _recorded(call):
    """What a call returns, and the batches it gave the engine."""
    batches, run = [], scoring.any_order_logprobs

    def recorded(params, batch, **options):
        batches.append(batch)
        return run(params, batch, **options)

    scoring.any_order_logprobs = recorded
    try:
        return call(), batches
    finally:
        scoring.any_order_logprobs = run


def _whole_rows(batch: scoring.Batch, length: int) -> scoring.Batch:
    """Rows of `length` tokens, as many in all as the batch has, and as large a share of them scored."""
    rows = max(1, batch.tokens.shape[0] * batch.tokens.shape[1] // length)
    tokens = np.resize(batch.tokens, (rows, length)).astype(np.int32)
    place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    scored = place[:, length - max(length * 3 // 16, 1) :]
    return scoring.Batch(tokens, place, place, np.ones_like(place), scored, np.ones(scored.shape, bool))


def _engine(checkpoint, batches, dtype):
    """A call that runs ready batches and waits for all of them."""

    def run():
        outs = [
            scoring.any_order_logprobs(checkpoint.params, batch, config=checkpoint.config, dtype=dtype)
            for batch in batches
        ]
        return jax.block_until_ready(outs)

    return run
