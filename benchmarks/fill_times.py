"""`a3 bench decode`: filling a whole length, against recomputation, the authors' code and a cached AR model.

The first token is given, the rest is filled greedily in groups. Lines are read and written outside the time.
"""

import dataclasses
import statistics
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.batched_decode import DecodeRequest, first_state, make_decode_spec
from a3_jax.decoding.loop import decode, lay_out
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import Rows, logits, make_two_stream, run_rows
from a3_jax.ordering.intervals import bounds
from a3_jax.ordering.ranks import order_ranks
from benchmarks import torch_models
from benchmarks.measurement import MeasurementError, Row, alternate, note, ratio
from benchmarks.settings import Settings, sort_rows
from benchmarks.train_steps import random_checkpoint

LONGEST_COMPARED = 1024  # columns; beyond, recomputation takes half an hour: only our own loop is timed
NEAR_TIE = 2e-3  # nats, between two computations in float32


def measure(settings: Settings) -> list[Row]:
    """Measures a fill by each contender at each length, and time per token over lengths."""
    rows, per_token = [], {}
    for length in settings.lengths:
        model, config = None, settings.model(length, "release" if settings.release else "standard")
        if settings.release:
            model = torch_models.release_model(settings, length)
            checkpoint = torch_models.open_as_ours(model, config, settings.dtype)
        else:
            checkpoint = random_checkpoint(settings, config)
        found = _measure_length(settings, length, checkpoint, model)
        per_token[length] = [s / (length - 1) for s in found[0].repeats]
        rows += found
    short, long = min(per_token), max(per_token)
    if short != long:
        setting = settings.describe(long, against_length=short)
        rows.append(ratio("time_per_token_over_shorter", per_token[long], per_token[short], setting))
    return rows


class Fill:
    """A call decodes a batch of lines of one shape; `cached=False` computes all keys anew each step."""

    def __init__(self, checkpoint: Any, items: list[dict], cached: bool = True, **options):
        greedy = GenerateOptions(context="flat", temperature=0.0, **options)
        spec, self._first = make_fill(checkpoint.config, items, greedy)
        spec = dataclasses.replace(spec, cached=cached)
        self._params = lay_out(checkpoint.params, checkpoint.config)
        self._compiled = decode.lower(self._params, self._first, spec=spec).compile()
        self._last, self._length = self._first, len(items[0]["tokens"])

    def __call__(self) -> None:
        self._last = jax.block_until_ready(self._compiled(self._params, self._first))

    def tokens(self) -> np.ndarray:
        """Returns the tokens of the last call, [B, N] int32."""
        return np.asarray(self._last.tokens)[:, : self._length]

    def per_forward(self, seconds) -> list[float]:
        """Returns seconds per forward of the example that took most."""
        return [value / int(np.max(self._last.forwards)) for value in seconds]


def make_fill(config: ModelConfig, items: list[dict], options: GenerateOptions, samples: int = 1):
    """Returns the decoding program and the first state for lines of one shape, `samples` times each."""
    checkpoint = types.SimpleNamespace(config=config, tokenizer=None, meta=None)
    requests = blank_requests(item_lines(items), checkpoint, options)
    tasks = [
        DecodeRequest(request, sample, "flat", options) for request in requests for sample in range(samples)
    ]
    spec = make_decode_spec(config, options, None, tasks[0].shape)
    return spec, first_state(tasks, tasks[0].shape[0], len(tasks), options.seed)


def _measure_length(settings, length, checkpoint, model) -> list[Row]:
    """Measures our loop and the AR model of the same weights, and others at lengths that they can do."""
    setting = settings.describe(length, residual=checkpoint.config.residual)
    note((label := f"decode: length {length}") + ": compiling")
    items, tokens = _draw_items(settings, length), settings.batch_at(length) * (length - 1)
    cached = Fill(checkpoint, items, dtype=settings.dtype)
    ar = Fill(checkpoint, [{"tokens": item["tokens"]} for item in items], dtype=settings.dtype, model="ar")
    both = alternate({"cached": cached, "ar": ar}, settings.repeats, label, warm_ups=1)
    seconds, per_forward = both["cached"], cached.per_forward(both["cached"])
    rows = [
        Row("cached_fill_time", "s", setting, seconds),
        Row("ar_fill_time", "s", setting, both["ar"]),
        Row("time_per_token", "s", setting, [s / tokens for s in seconds]),
        ratio("fused_forward_time_over_ar_step", per_forward, ar.per_forward(both["ar"]), setting),
    ]
    if length > LONGEST_COMPARED:
        note(f"{label}: neither recomputation nor others")
        return rows
    recomputed = Fill(checkpoint, items, cached=False, dtype=settings.dtype)
    (once,) = alternate({"recomputed": recomputed}, 1, label, warm_ups=0)["recomputed"]
    wrong = int((cached.tokens() != recomputed.tokens()).sum())
    note(f"{label}: {wrong} greedy tokens differ from those of recomputation")
    if wrong and settings.dtype == "float32":  # in bfloat16 near ties part
        raise MeasurementError(f"{label}: {wrong} greedy tokens differ from those of recomputation")
    rows.append(Row("recomputed_fill_time", "s", setting, [once]))
    rows.append(Row("cached_fill_speedup", "ratio", setting, [once / statistics.median(seconds)]))
    if model is not None:
        rows += _measure_release(checkpoint, model, items, cached, seconds, label, setting)
    reason = torch_models.why_no_torch(settings)
    if reason:
        note(f"{label}: no transformers: {reason}")
        return rows
    first = [item["tokens"][:1] for item in items]
    calls = {"transformers_ar": torch_models.llama_fill(settings, length, first), "ar": ar}
    both = alternate(calls, min(settings.repeats, 2), label, warm_ups=1)
    rows.append(Row("transformers_ar_fill_time", "s", setting, both["transformers_ar"]))
    return [*rows, ratio("ar_fill_speedup_over_transformers", both["transformers_ar"], both["ar"], setting)]


def _draw_items(settings, length) -> list[dict]:
    """Draws a batch of lines: one token given, the rest blank, with ranks as `a3 generate` draws them."""
    rng, items = np.random.default_rng(settings.seed), []
    order, blanks = "random" if settings.order == "random" else "l2r", [None] * (length - 1)
    for _ in range(settings.batch_at(length)):
        ranks = 1 + order_ranks(order, length - 1, settings.tokens_per_group, rng)
        tokens = [int(rng.integers(1, settings.vocab)), *blanks]
        items.append({"tokens": tokens, "ranks": [0, *ranks.tolist()]})
    return items


def _measure_release(checkpoint, model, items, cached, seconds, label, setting) -> list[Row]:
    """Measures one fill by the authors' `generate_two_stream`, greedy, in the same groups.

    Of a thousand choices among 32,000 tokens a few are ties to float32's last digits; from the first that is
    decided otherwise on, two texts have nothing in common. Given the release's own text, its tokens must be
    our likeliest.
    """
    import torch

    tokens = torch.tensor([[token or 0 for token in item["tokens"]] for item in items])
    ranks, written = torch.tensor([item["ranks"] for item in items]), []
    options = {"max_length": tokens.shape[1], "do_sample": False, "pad_token_id": 0}

    def fill():
        with torch.no_grad():
            written.append(model.generate_two_stream(input_ids=tokens, group_ids=ranks, **options))

    note(f"{label}: the release fills once, without a warm-up")
    (theirs,) = alternate({"release": fill}, 1, label, warm_ups=0)["release"]
    text = written[0].numpy().astype(np.int32)
    gap, wrong = _below_best(checkpoint, text, ranks.numpy()), int((cached.tokens() != text).sum())
    message = f"{label}: {wrong} greedy tokens differ from those of the release, by up to {gap:.2g} nats"
    note(message)
    if gap > NEAR_TIE:
        raise MeasurementError(message)
    return [
        Row("release_token_below_our_best", "nats", setting, [gap]),
        Row("release_fill_time", "s", setting, [theirs]),
        Row("fill_speedup_over_release", "ratio", setting, [theirs / s for s in seconds]),
    ]


def _below_best(checkpoint, tokens, ranks) -> float:
    """Returns the largest gap in nats between our likeliest token and the one in the text, given the text."""
    model, config = make_two_stream(checkpoint.config, "float32"), checkpoint.config
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    rows = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    rows = sort_rows(rows | {"ranks": ranks.astype(np.int32)})
    start, content_limit, query_limit = bounds(rows["ranks"], rows["ranks"], rows["segment_ids"])
    content = Rows(rows["positions"], start, content_limit, rows["tokens"])
    query = Rows(rows["positions"], start, query_limit)

    @jax.jit
    def gaps(params):
        hidden_BTD = run_rows(model, params, content, query).query
        scores_BTV = logits(params, config, hidden_BTD, model.precision)
        chosen = jnp.take_along_axis(scores_BTV, rows["tokens"][..., None], axis=-1)[..., 0]
        return jnp.max(scores_BTV, axis=-1) - chosen

    return float(np.max(gaps(checkpoint.params), where=rows["ranks"] > 0, initial=0.0))
