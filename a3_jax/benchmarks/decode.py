"""`a3 bench decode`: filling a whole length, against recomputation, the authors' code and a cached AR model.

Given is the first token alone, the rest is filled greedily in groups. Timed is the compiled loop, not the
reading and writing of lines.
"""

import dataclasses
import statistics
import tempfile
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.benchmarks.measurement import MeasurementError, Row, alternate, note, ratio
from a3_jax.benchmarks.settings import Settings, thread_count
from a3_jax.benchmarks.train import why_no_torch
from a3_jax.decoding.filling import Task, first_state, make_program
from a3_jax.decoding.loop import decode, lay_out
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.decoding.sampling import map_rows
from a3_jax.decoding.state import State
from a3_jax.model.two_stream import Rows, init_params, logits, make_two_stream, run_rows
from a3_jax.ordering.intervals import bounds, sort_order, take_rows, unsort
from a3_jax.ordering.ranks import order_ranks

LONGEST_COMPARED = 1024  # columns; beyond, recomputation takes half an hour: only our own loop is timed
NEAR_TIE = 2e-3  # nats, between two computations in float32
GREEDY = {"context": "flat", "temperature": 0.0}


def measure(settings: Settings) -> list[Row]:
    """Seconds of a fill by each contender at each length, and time a token over lengths.

    Raises:
      InputError: a clone that can't be used.
      MeasurementError: two contenders that should write the same tokens don't.
    """
    module = None
    if settings.release:
        from a3_jax.benchmarks.torch_steps import load_release

        module = load_release(settings.release)
    rows, seconds = [], {}
    for length in settings.lengths:
        setting = settings.describe(length, residual="release" if module else "standard")
        checkpoint, theirs = _open(settings, length, module)
        fills, times = _measure_ours(settings, length, checkpoint, setting)
        rows += times
        seconds[length] = next(row for row in times if row.metric == "cached_fill_time").repeats
        if length > LONGEST_COMPARED:
            note(f"decode: length {length}: neither recomputation nor others")
            continue
        if theirs is not None:
            cached, times = fills["cached"], seconds[length]
            rows += _measure_release(settings, length, checkpoint, theirs, cached, times, setting)
        rows += _measure_transformers(settings, length, fills["ar"], setting)
    return rows + _over_lengths(settings, seconds)


class Fill:
    """A call decodes a batch; the final state of the last call is kept.

    Args:
      checkpoint: with params and config.
      items: the lines of the batch, all of one shape.
      options: of `GenerateOptions`.
      cached: False computes all keys anew each step.
    """

    def __init__(self, checkpoint: Any, items: list[dict], options: dict, *, cached: bool = True):
        settings = GenerateOptions(**options)
        requests = blank_requests(item_lines(items), checkpoint, settings)
        tasks = [Task(request, 0, settings.context or "flat", settings) for request in requests]
        program = make_program(checkpoint.config, settings, None, tasks[0].shape)
        program = dataclasses.replace(program, cached=cached)
        self._params = lay_out(checkpoint.params, checkpoint.config)
        self._length = len(items[0]["tokens"])
        self._state = first_state(tasks, tasks[0].shape[0], len(tasks), settings.seed)
        self._compiled = decode.lower(self._params, self._state, program=program).compile()
        self._final: State | None = None

    def __call__(self) -> State:
        self._final = state = jax.block_until_ready(self._compiled(self._params, self._state))
        return state

    def tokens(self) -> np.ndarray:
        """[B, N] int32."""
        state = self._final or self()
        return np.asarray(state.tokens)[:, : self._length]

    def forwards(self) -> int:
        """Of the example that took most."""
        state = self._final or self()
        return int(np.asarray(state.forwards).max())


def _open(settings, length, module):
    """(checkpoint, the authors' model or None), of the same weights."""
    config = settings.model(length, residual="release" if module else "standard")
    if module is None:
        params = init_params(config, jax.random.key(settings.seed), settings.dtype)
        return types.SimpleNamespace(params=params, config=config, tokenizer=None, meta=None), None
    from a3_jax.benchmarks.torch_steps import release_model, save_release
    from a3_jax.checkpoints.opening import open_checkpoint

    theirs = release_model(module, config, thread_count(), settings.seed)
    with tempfile.TemporaryDirectory() as directory:
        save_release(theirs, config, directory)
        return open_checkpoint(directory, dtype=settings.dtype), theirs


def _items(settings, length) -> list[dict]:
    """A batch of lines: one token given, the rest blank, with ranks drawn as for `a3 generate`."""
    rng = np.random.default_rng(settings.seed)
    items = []
    for _ in range(settings.batch_at(length)):
        ranks = 1 + order_ranks(_order(settings), length - 1, settings.tokens_a_group, rng)
        first = int(rng.integers(1, settings.vocab))
        items.append({"tokens": [first, *[None] * (length - 1)], "ranks": [0, *ranks.tolist()]})
    return items


def _order(settings):
    return "random" if settings.order == "random" else "l2r"


def _measure_ours(settings, length, checkpoint, setting):
    """Our loop, the AR model of the same weights, and recomputation, whose tokens must be equal."""
    note(f"decode: length {length}: compiling")
    items, options = _items(settings, length), GREEDY | {"dtype": settings.dtype}
    first_only = [{"tokens": item["tokens"]} for item in items]
    fills = {
        "cached": Fill(checkpoint, items, options),
        "ar": Fill(checkpoint, first_only, options | {"model": "ar"}),
    }
    seconds = alternate(fills, settings.repeats, f"decode: length {length}", warm_ups=1)
    forwards = {name: fill.forwards() for name, fill in fills.items()}
    a_forward = [s / forwards["cached"] for s in seconds["cached"]]
    an_ar_step = [s / forwards["ar"] for s in seconds["ar"]]
    tokens = settings.batch_at(length) * (length - 1)
    rows = [
        Row("cached_fill_time", "s", setting, seconds["cached"]),
        Row("ar_fill_time", "s", setting, seconds["ar"]),
        Row("time_per_token", "s", setting, [s / tokens for s in seconds["cached"]]),
        ratio("fused_forward_time_over_ar_step", a_forward, an_ar_step, setting),
    ]
    if length <= LONGEST_COMPARED:
        recomputed = Fill(checkpoint, items, options, cached=False)
        once = alternate({"recomputed": recomputed}, 1, f"decode: length {length}", warm_ups=0)["recomputed"]
        _check_equal(settings, fills["cached"].tokens(), recomputed.tokens(), "recomputation", length)
        speedup = once[0] / statistics.median(seconds["cached"])
        rows += [
            Row("recomputed_fill_time", "s", setting, once),
            Row("cached_fill_speedup", "ratio", setting, [speedup]),
        ]
    return fills, rows


def _measure_release(settings, length, checkpoint, model, ours, seconds, setting) -> list[Row]:
    """One fill by the authors' `generate_two_stream`, greedy, in the same groups: the same choices first."""
    import torch

    items = _items(settings, length)
    tokens = torch.tensor([[token or 0 for token in item["tokens"]] for item in items])
    ranks = torch.tensor([item["ranks"] for item in items])
    written = []

    def fill():
        with torch.no_grad():
            written.append(
                model.generate_two_stream(
                    input_ids=tokens, group_ids=ranks, max_length=length, do_sample=False, pad_token_id=0
                )
            )

    note(f"decode: length {length}: the release fills once, without a warm-up")
    theirs = alternate({"release": fill}, 1, f"decode: length {length}", warm_ups=0)["release"]
    gap = _check_greedy(ours, checkpoint, written[-1].numpy(), ranks.numpy(), length)
    return [
        Row("release_token_below_our_best", "nats", setting, [gap]),
        Row("release_fill_time", "s", setting, theirs),
        Row("fill_speedup_over_release", "ratio", setting, [theirs[0] / s for s in seconds]),
    ]


def _measure_transformers(settings, length, ours, setting) -> list[Row]:
    """A `transformers` Llama of our shape, greedy, with its key-value cache."""
    reason = why_no_torch(settings)
    if reason:
        note(f"decode: no transformers: {reason}")
        return []
    from a3_jax.benchmarks.torch_steps import llama_fill

    tokens = np.array([[item["tokens"][0]] for item in _items(settings, length)])
    fill: Callable = llama_fill(settings.model(length), tokens, length, thread_count(), settings.seed)
    seconds = alternate(
        {"transformers_ar": fill, "ar": ours},
        min(settings.repeats, 2),
        f"decode: length {length}",
        warm_ups=1,
    )
    return [
        Row("transformers_ar_fill_time", "s", setting, seconds["transformers_ar"]),
        ratio("ar_fill_speedup_over_transformers", seconds["transformers_ar"], seconds["ar"], setting),
    ]


def _over_lengths(settings, seconds) -> list[Row]:
    shortest, longest = min(seconds), max(seconds)
    if shortest == longest:
        return []
    a_token = {length: [s / (length - 1) for s in seconds[length]] for length in (shortest, longest)}
    setting = settings.describe(longest, against_length=shortest)
    return [ratio("time_per_token_over_shorter", a_token[longest], a_token[shortest], setting)]


def _check_greedy(ours, checkpoint, tokens, ranks, length) -> float:
    """How far the tokens of the release lie below our likeliest ones, given the release's own, in nats.

    Of a thousand choices among 32,000 tokens a few are ties to float32's last digits; from the first that
    is decided otherwise on, two texts have nothing in common. Given the same text they must agree.
    """
    below = float(np.max(_below_best(checkpoint, tokens, ranks)[ranks > 0]))
    wrong = int((ours.tokens() != tokens).sum())
    if below > NEAR_TIE:
        raise MeasurementError(
            f"decode: length {length}: {wrong} greedy tokens differ from those of the release,"
            f" by up to {below:.2g} nats"
        )
    note(f"decode: length {length}: {wrong} tokens differ from the release's, choices by {below:.2g} nats")
    return below


def _below_best(checkpoint, tokens, ranks) -> np.ndarray:
    """[B, T] float32: the best logit less that of the token, from the query rows of one forward."""
    config, model = checkpoint.config, make_two_stream(checkpoint.config, "float32")
    segment_ids, positions = np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    order = sort_order(ranks, segment_ids)
    tokens, positions, ranks = (
        array.astype(np.int32) for array in take_rows(order, tokens, positions, ranks)
    )
    start, content_limit, query_limit = bounds(ranks, ranks, segment_ids)
    content = Rows(positions=positions, start=start, limit=content_limit, tokens=tokens)
    query = Rows(positions=positions, start=start, limit=query_limit)

    @jax.jit
    def gaps(params, content, query):
        def gap(hidden_D, token):
            scores = logits(params, config, hidden_D, model.precision)
            return jnp.max(scores) - scores[token]

        hidden_BTD = run_rows(model, params, content, query).query
        return map_rows(gap, (hidden_BTD, content.tokens), config.vocab_size)

    return np.asarray(unsort(order, np.asarray(gaps(checkpoint.params, content, query))))


def _check_equal(settings, ours, theirs, name, length) -> None:
    """Greedy tokens must be equal in float32; in bfloat16, where near ties part, the number is told."""
    wrong = int((ours != theirs).sum())
    if not wrong:
        return
    message = f"decode: length {length}: {wrong} greedy tokens differ from those of {name}"
    if settings.dtype == "float32":
        raise MeasurementError(message)
    note(f"{message}, in {settings.dtype}")
