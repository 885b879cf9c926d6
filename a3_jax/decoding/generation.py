"""Blanks to text: lines in, results out, whole or as a stream."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.batched_decode import (
    DecodeRequest,
    decoding_params,
    fill,
    final_fields,
    first_state,
    make_decode_spec,
)  # fmt: skip
from a3_jax.decoding.decode_state import DecodeState, finished
from a3_jax.decoding.loop import DecodeSpec, make_model_fns, prefill, step
from a3_jax.decoding.options import BlankRequest, GenerateOptions, make_options
from a3_jax.decoding.requests import blank_requests, default_context, item_lines
from a3_jax.decoding.scoring import score
from a3_jax.errors import InputError
from a3_jax.model.sharding import axis_parts, mesh_of
from a3_jax.ordering.ranks import context_first


def generate(checkpoint, items, **options) -> list[dict[str, Any]]:
    """Fills blanks, in any order.

        generate(checkpoint, [{"text": "The [[3]] sat on [[8]]."}], strategy="dynamic", temperature=0.7)
        generate(checkpoint, [{"tokens": [5, None, None, 2], "ranks": [0, 1, 0, 0]}])

    Args:
      checkpoint: a `Checkpoint`, see `a3_jax.open_checkpoint`.
      items: dicts with "text" (`[[n]]` is a blank of n tokens, `\\[[` the characters) or "tokens" (None at
        blanks), and perhaps "ranks", read at the blanks.
      options: fields of `GenerateOptions`.

    Returns:
      For each item, `num_samples` dicts {"text", "tokens", "logprob", "logprobs", "commit_rank",
      "forwards", "exact"}, and "sample" if there are several; speculative decoding adds "acceptance", the
      share of drafts that passed (None without drafts). Log-probabilities are the model's own
      (temperature 1, no filter), None at given tokens. With `rerank`, one dict per item, with "joint".

    Raises:
      InputError: a bad item or option, before anything is computed.
    """
    return generate_lines(checkpoint, item_lines(items), make_options(GenerateOptions, options))


def generate_lines(checkpoint, lines, options: GenerateOptions) -> list[dict[str, Any]]:
    """Runs `generate` of lines that know their file and number."""
    requests, eos_ids = _decode_requests(checkpoint, lines, options)
    params = decoding_params(checkpoint.params, checkpoint.config, options)
    filled = fill(params, checkpoint.config, requests, options, eos_ids)
    results = [
        _result(request, arrays, checkpoint.tokenizer, options)
        for request, arrays in zip(requests, filled, strict=True)
    ]
    if options.rerank:
        return best_of(checkpoint, results, [request.blanks for request in requests], options)
    return results


def generate_stream(checkpoint, item, **options) -> Iterator[dict[str, Any]]:
    """Fills the blanks of one item and reports each step: the same tokens as `generate`.

    Yields:
      {"columns", "tokens", "logprobs", "commit_rank"} for the tokens committed by a step, in reading order;
      with order "block", for each block when it is finished. Last, the result of `generate`.

    Raises:
      InputError: as `generate`; or several samples, which one stream can't tell apart.
    """
    settings = make_options(GenerateOptions, options)
    if settings.num_samples > 1 or settings.rerank:
        raise InputError("a stream tells of one sample", field="rerank" if settings.rerank else "num_samples")
    yield from stream_line(checkpoint, item_lines([item])[0], settings)


def stream_line(checkpoint, line, options: GenerateOptions) -> Iterator[dict[str, Any]]:
    """Runs `generate_stream` of a line [T] that knows its file and number."""
    (request,), eos_ids = _decode_requests(checkpoint, [line], options)
    spec = make_decode_spec(checkpoint.config, options, eos_ids, request.shape)
    params = decoding_params(checkpoint.params, checkpoint.config, options)
    reported, arrays = ~request.blanks.blank, {}
    with mesh_of(params):
        start = first_state([request], request.shape[0], axis_parts("batch"), options.seed)
    for state in states(params, start, spec):
        arrays = {name: field[0] for name, field in final_fields(state, eos_ids).items()}
        new = arrays["filled"][: len(reported)] & ~reported
        if options.order == "block" and not arrays["finished"]:
            new &= _whole_blocks(request.blanks.blank, arrays["filled"], options.block_size)
        new &= np.arange(len(reported)) < arrays["length"]
        if new.any():
            reported |= new
            columns = np.flatnonzero(new)
            fields = {"tokens": "tokens", "logprobs": "logprob", "commit_rank": "commit_rank"}
            yield {"columns": columns.tolist()} | {
                name: arrays[field][columns].tolist() for name, field in fields.items()
            }
    yield _result(request, arrays, checkpoint.tokenizer, options)


def states(params, state: DecodeState, spec: DecodeSpec) -> Iterator[DecodeState]:
    """Yields the state [B, T] after each step, one call each: for streams. The same steps as `decode`."""
    with mesh_of(params):
        state = _prefill(params, state, spec=spec)
    yield state
    while not bool(jnp.all(finished(state, spec.eos_ids))):
        with mesh_of(params):  # never across a yield: it would be the caller's too
            state = _next(params, state, spec=spec)
        yield state


_prefill = functools.partial(jax.jit, static_argnames="spec")(prefill)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="state")
def _next(params, state: DecodeState, *, spec: DecodeSpec) -> DecodeState:
    return step(state, make_model_fns(params, spec, spec.content_rows), spec)


def context_of(checkpoint, options: GenerateOptions) -> str:
    """Returns how given tokens are ranked: by the options, else as `commit` or the training asks."""
    return options.context or ("flat" if options.commit == "flat" else default_context(checkpoint))


def _decode_requests(checkpoint, lines, options) -> tuple[list[DecodeRequest], tuple[int, ...]]:
    """Returns the completions to make, and the ids that end a text: none where EOS is a token like any."""
    eos_ids = checkpoint.eos_ids if options.stop_at_eos or options.order == "block" else ()
    if options.stop_at_eos and not eos_ids:
        message = "neither the checkpoint's tokenizer nor its model's config names an EOS token"
        raise InputError(message, field="--stop_at_eos")
    context = context_of(checkpoint, options)
    requests = [
        DecodeRequest(request, sample, context, options)
        for request in blank_requests(lines, checkpoint, options)
        for sample in range(options.num_samples)
    ]
    return requests, eos_ids


def _whole_blocks(blank, filled, block_size) -> np.ndarray:
    """Marks the blanks whose block has no unfilled one, [T] bool."""
    block = (np.cumsum(blank) - 1) // block_size
    unfinished = np.unique(block[blank & ~filled[: len(blank)]])
    return blank & ~np.isin(block, unfinished)


def best_of(checkpoint, results, requests, options: GenerateOptions) -> list[dict[str, Any]]:
    """Keeps of each request's samples [T] the likeliest: left to right, given all given tokens.

    Its exact joint log-probability goes with it, as "joint".
    """
    count, context = options.num_samples, options.context or default_context(checkpoint)
    items = []
    for number, result in enumerate(results):
        blank = requests[number].blank[: len(result["tokens"])]
        ranks = context_first(np.arange(len(blank)), ~blank, context)
        items.append(
            {"tokens": result["tokens"], "ranks": ranks.tolist(), "scored": blank.astype(int).tolist()}
        )
    scores = score(checkpoint, items, model=options.model, dtype=options.dtype, context=options.context)
    kept = []
    for first in range(0, len(results), count):
        joints = [score["logprob"] for score in scores[first : first + count]]
        best = int(np.argmax(joints))
        kept.append(results[first + best] | {"joint": joints[best]})
    return kept


def _result(request: DecodeRequest, arrays, tokenizer, options: GenerateOptions) -> dict[str, Any]:
    """Makes one output object: the first `length` columns, in reading order."""
    blank = request.blanks.blank
    length = min(int(arrays["length"]), len(blank))
    tokens = arrays["tokens"][:length].tolist()
    logprobs = [
        float(value) if is_blank else None for value, is_blank in zip(arrays["logprob"], blank[:length])
    ]
    result = {
        "text": _text(request.blanks, tokens, tokenizer),
        "tokens": tokens,
        "logprob": float(sum(value for value in logprobs if value is not None)),
        "logprobs": logprobs,
        "commit_rank": arrays["commit_rank"][:length].tolist(),
        "forwards": int(arrays["forwards"]),
        "exact": bool(options.commit == "chain" and _stands_alone(arrays, blank, length, options)),
    }
    if "proposed" in arrays:
        proposed = int(arrays["proposed"])
        result["acceptance"] = int(arrays["accepted"]) / proposed if proposed else None
    return result | ({"sample": request.sample} if options.num_samples > 1 else {})


def _text(request: BlankRequest, tokens: list[int], tokenizer) -> str | None:
    """Returns the text of a result; what was given as text is in it letter for letter."""
    if tokenizer is None:
        return None
    return tokenizer.decode(tokens) if request.text is None else request.text.filled(tokenizer, tokens)


def _stands_alone(arrays, blank, length, options) -> bool:
    """Returns whether no kept token was drawn given one that an EOS dropped."""
    ranks = arrays["commit_rank"][: len(blank)]
    kept = np.arange(len(blank)) < length
    dropped_ranks = ranks[blank & ~kept & arrays["filled"][: len(blank)]]
    return options.model == "ar" or not dropped_ranks.size or ranks[blank & kept].max() <= dropped_ranks.min()
