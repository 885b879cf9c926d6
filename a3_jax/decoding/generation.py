"""Blanks to text: requests are planned on the host, decoded in batches, and written out."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.batching import batches, bucket
from a3_jax.decoding.loop import Program, decode, lay_out, states
from a3_jax.decoding.options import GenerateOptions, make_options
from a3_jax.decoding.requests import BlankRequest, blank_requests, default_context, item_lines
from a3_jax.decoding.sampling import Sampling
from a3_jax.decoding.scoring import default_dtype, score
from a3_jax.decoding.state import State, final_eos, finished
from a3_jax.decoding.strategies import Rule
from a3_jax.errors import InputError
from a3_jax.model.sharding import axis_parts, constrain, mesh_of
from a3_jax.ordering.ranks import context_first, contiguous, l2r, order_ranks

_LAWS_BYTES = 2**29  # of speculative decoding's distributions
_SMALL_PREFILL = 8  # content rows; up to here a first forward of its own is not worth compiling


class _Task:
    """One completion to make.

    Attributes:
      request, sample: the input line, and which of its completions.
      ranks: [T] int32, given tokens first, then the blanks as planned.
      shape: (columns, prefill rows, content rows, query rows), padded.
    """

    def __init__(self, request: BlankRequest, sample: int, context: str, options: GenerateOptions):
        self.request, self.sample = request, sample
        self.ranks = _planned_ranks(request, sample, context, options)
        self.shape = _padded_shape(request, self.ranks, options)


def generate(checkpoint, items, **options) -> list[dict[str, Any]]:
    """Fills blanks, in any order.

        generate(checkpoint, [{"text": "The [[3]] sat on [[8]]."}], strategy="dynamic", temperature=0.7)
        generate(checkpoint, [{"tokens": [5, None, None, 2], "ranks": [0, 1, 0, 0]}])

    Args:
      checkpoint: of `a3_jax.open_checkpoint`.
      items: dicts with "text" (`[[n]]` is a blank of n tokens) or "tokens" (None at blanks), and
        perhaps "ranks", read at the blanks.
      options: fields of `GenerateOptions`.

    Returns:
      For each item, `num_samples` dicts {"text", "tokens", "logprob", "logprobs", "commit_rank",
      "forwards", "exact"}, and "sample" if there are several; speculative decoding adds "acceptance", the
      share of drafts that passed (None without drafts). Log-probabilities are the model's own
      (temperature 1, no filter), None at given tokens. With `rerank`, one dict an item, with "joint".

    Raises:
      InputError: a bad item or option, before anything is computed.
    """
    return generate_lines(checkpoint, item_lines(items), make_options(GenerateOptions, options))


def generate_lines(checkpoint, lines, options: GenerateOptions) -> list[dict[str, Any]]:
    """`generate` of lines that know where they stand."""
    tasks, eos_id = _tasks(checkpoint, lines, options)
    params = decoding_params(checkpoint, options)
    results: list[dict[str, Any]] = [{} for _ in tasks]
    most = _most_examples(checkpoint.config, options)
    for shape, indices, batch_size in batches(tasks, lambda task: task.shape, most):
        program = _program(checkpoint.config, options, eos_id, shape)
        with mesh_of(params):
            batch_size = math.lcm(batch_size, axis_parts("batch"))
            state = _start([tasks[index] for index in indices], shape[0], batch_size, options.seed)
            final = _fields(decode(params, state, program=program), eos_id)
        for row, index in enumerate(indices):
            arrays = {name: field[row] for name, field in final.items()}
            results[index] = _result(tasks[index], arrays, checkpoint.tokenizer, options)
    if options.rerank:
        return best_of(checkpoint, results, [task.request for task in tasks], options)
    return results


def generate_stream(checkpoint, item, **options) -> Iterator[dict[str, Any]]:
    """Fills the blanks of one item and tells of each step: the same tokens as `generate`.

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
    """`generate_stream` of a line that knows where it stands."""
    (task,), eos_id = _tasks(checkpoint, [line], options)
    program = _program(checkpoint.config, options, eos_id, task.shape)
    params = decoding_params(checkpoint, options)
    told, arrays = ~task.request.blank, {}
    with mesh_of(params):
        start = _start([task], task.shape[0], axis_parts("batch"), options.seed)
    for state in states(params, start, program):
        arrays = {name: field[0] for name, field in _fields(state, eos_id).items()}
        new = arrays["filled"][: len(told)] & ~told
        if options.order == "block" and not arrays["finished"]:
            new &= _whole_blocks(task.request.blank, arrays["filled"], options.block_size)
        new &= np.arange(len(told)) < arrays["length"]
        if new.any():
            told |= new
            yield _committed(np.flatnonzero(new), arrays)
    yield _result(task, arrays, checkpoint.tokenizer, options)


def decoding_params(checkpoint, options):
    """The parameters in the dtype and layout of the computation, once: no step casts or moves them again."""
    dtype = jnp.dtype(options.dtype or default_dtype())
    params = jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), checkpoint.params)
    with mesh_of(params):
        return lay_out(params, checkpoint.config)


def _tasks(checkpoint, lines, options) -> tuple[list["_Task"], int | None]:
    """The completions to make, and the id that ends a text."""
    eos_id = _eos_id(checkpoint, options)
    context = options.context or ("flat" if options.commit == "flat" else default_context(checkpoint))
    requests = blank_requests(lines, checkpoint, options)
    tasks = [
        _Task(request, sample, context, options)
        for request in requests
        for sample in range(options.num_samples)
    ]
    return tasks, eos_id


def _fields(state: State, eos_id) -> dict[str, np.ndarray]:
    """What results are made of, on the host; `length`: columns up to a final EOS."""
    names = ("tokens", "filled", "commit_rank", "logprob", "forwards")
    fields = {name: getattr(state, name) for name in names}
    if state.drafts is not None:
        fields |= {"proposed": state.drafts.proposed, "accepted": state.drafts.accepted}
    fields = {name: np.asarray(field) for name, field in fields.items()}
    fields["finished"] = np.asarray(finished(state, eos_id))
    fields["length"] = np.full(len(fields["tokens"]), fields["tokens"].shape[1])
    if eos_id is not None:
        ends = np.asarray(final_eos(state, eos_id))
        fields["length"] = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, fields["length"])
    return fields


def _whole_blocks(blank, filled, block_size) -> np.ndarray:
    """[T] bool: blanks whose block has no unfilled one."""
    block = (np.cumsum(blank) - 1) // block_size
    unfinished = np.unique(block[blank & ~filled[: len(blank)]])
    return blank & ~np.isin(block, unfinished)


def _committed(columns, arrays) -> dict[str, Any]:
    return {
        "columns": columns.tolist(),
        "tokens": arrays["tokens"][columns].tolist(),
        "logprobs": arrays["logprob"][columns].tolist(),
        "commit_rank": arrays["commit_rank"][columns].tolist(),
    }


def best_of(checkpoint, results, requests, options: GenerateOptions) -> list[dict[str, Any]]:
    """Of the samples of each request the likeliest by one yardstick: left to right, given all given tokens.

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


def _eos_id(checkpoint, options) -> int | None:
    """The id that ends a text, or None where EOS is a token like any other."""
    eos_id = None if checkpoint.tokenizer is None else checkpoint.tokenizer.eos_id
    if not options.stop_at_eos:
        return eos_id if options.order == "block" else None
    if eos_id is None:
        raise InputError("the checkpoint's tokenizer names no EOS token", field="--stop_at_eos")
    return eos_id


def _planned_ranks(request: BlankRequest, sample: int, context: str, options: GenerateOptions) -> np.ndarray:
    """[T] int32: given tokens first; the blanks by own ranks, by order, or as one where steps choose."""
    blank, count = request.blank, int(request.blank.sum())
    ranks = np.zeros(len(blank), np.int32)
    if options.model == "ar":
        ranks[blank] = l2r(count)
    elif options.strategy == "dynamic":
        ranks[blank] = contiguous(count, options.block_size) if options.order == "block" else 0
    elif request.ranks is not None:
        ranks[blank] = request.ranks[blank]
    else:
        rng = np.random.default_rng([options.seed, request.number, sample])
        group_size = 1 if options.strategy == "speculative" else min(options.group_size, max(count, 1))
        ranks[blank] = order_ranks(
            options.order, count, group_size, rng,
            block_size=options.block_size, block_order=options.block_order,
        )  # fmt: skip
    return context_first(ranks, ~blank, context)


def _padded_shape(request: BlankRequest, ranks, options: GenerateOptions) -> tuple[int, int, int, int]:
    """(columns, prefill rows, content rows, query rows): what `Program` calls so."""
    blank, count = request.blank, int(request.blank.sum())
    columns = bucket(len(blank))
    prefill = len(blank) - count
    if options.model == "ar":
        # A step adds the token before it, and the given ones up to its own blank.
        steps = np.diff(np.flatnonzero(blank), prepend=0)
        prefill, content_rows, query_rows = int(steps[:1].sum()), bucket(int(steps[1:].max(initial=1)), 4), 1
    elif options.strategy == "speculative":
        window = min(options.window, columns)
        content_rows, query_rows = window + 1, 2 * window + 1
    elif options.strategy == "dynamic":
        offered = min(count, options.block_size) if options.order == "block" else count
        query_rows, content_rows = bucket(offered), _rule(options).max_commit
    elif request.ranks is None:
        query_rows = content_rows = options.group_size
    else:
        query_rows = content_rows = bucket(int(np.bincount(ranks[blank]).max(initial=1)), 4)
    prefill = bucket(prefill, 4)
    if prefill <= _SMALL_PREFILL:
        content_rows = max(prefill, content_rows)
    if options.strategy != "speculative":
        content_rows, query_rows = min(content_rows, columns), min(query_rows, columns)
    return columns, prefill, content_rows, query_rows


def _most_examples(config, options: GenerateOptions) -> int | None:
    """Of a batch, where a step keeps whole distributions: two a query row, and one a draft."""
    if options.strategy != "speculative":
        return None
    return max(1, _LAWS_BYTES // (4 * config.vocab_size * (5 * options.window + 2)))


def _rule(options: GenerateOptions) -> Rule:
    """How many blanks dynamic commits a step."""
    bounds = (options.entropy_bound, options.threshold, options.factor)
    most = options.step_size if bounds == (None, None, None) else options.max_commit
    return Rule(most, *bounds, min_gap=options.min_gap)


def _program(config, options: GenerateOptions, eos_id, shape) -> Program:
    columns, prefill_rows, content_rows, query_rows = shape
    return Program(
        config=config,
        dtype=options.dtype or default_dtype(),
        model=options.model,
        strategy=options.strategy,
        criterion=options.criterion,
        commit=options.commit,
        sampling=Sampling(float(options.temperature), options.top_k, float(options.top_p)),
        eos_id=eos_id,
        prefill_rows=prefill_rows,
        content_rows=content_rows,
        query_rows=query_rows,
        rule=dataclasses.replace(_rule(options), max_commit=min(_rule(options).max_commit, columns)),
        window=min(options.window, columns),
    )


def _start(tasks, columns: int, batch_size: int, seed: int) -> State:
    """The state before the first step; rows without a task are empty, hence finished."""
    shape = (batch_size, columns)
    tokens, plan, present, given = (np.zeros(shape, kind) for kind in (np.int32, np.int32, bool, bool))
    next_rank, numbers, samples = (np.zeros(batch_size, np.int32) for _ in range(3))
    for row, task in enumerate(tasks):
        blank, length = task.request.blank, len(task.request.blank)
        tokens[row, :length], plan[row, :length] = task.request.tokens, task.ranks
        present[row, :length], given[row, :length] = True, ~blank
        next_rank[row] = task.ranks[blank].min() if blank.any() else 0
        numbers[row], samples[row] = task.request.number, task.sample
    state = State(
        tokens=jnp.asarray(tokens),
        positions=jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), shape),
        present=jnp.asarray(present),
        given=jnp.asarray(given),
        filled=jnp.asarray(given),
        stored=jnp.zeros(shape, bool),
        plan=jnp.asarray(plan),
        commit_rank=jnp.asarray(np.where(given, plan, 0)),
        logprob=jnp.zeros(shape, jnp.float32),
        next_rank=jnp.asarray(next_rank),
        forwards=jnp.zeros(batch_size, jnp.int32),
        key=_keys(np.uint32(seed), numbers, samples),
    )
    return jax.tree.map(lambda leaf: constrain(leaf, ("batch",)), state)


@jax.jit
def _keys(seed, numbers, samples):
    """[B] keys: a function of (seed, line number, sample) alone."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number, sample: jax.random.fold_in(jax.random.fold_in(key, number), sample))(
        numbers, samples
    )


def _result(task: _Task, arrays, tokenizer, options: GenerateOptions) -> dict[str, Any]:
    """One output object: the first `length` columns, in the order they are read."""
    blank = task.request.blank
    length = min(int(arrays["length"]), len(blank))
    tokens = arrays["tokens"][:length].tolist()
    logprobs = [
        float(value) if is_blank else None for value, is_blank in zip(arrays["logprob"], blank[:length])
    ]
    result = {
        "text": None if tokenizer is None else tokenizer.decode(tokens),
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
    return result | ({"sample": task.sample} if options.num_samples > 1 else {})


def _stands_alone(arrays, blank, length, options) -> bool:
    """Whether no kept token was drawn given one that an EOS dropped."""
    ranks = arrays["commit_rank"][: len(blank)]
    kept = np.arange(len(blank)) < length
    dropped_ranks = ranks[blank & ~kept & arrays["filled"][: len(blank)]]
    return options.model == "ar" or not dropped_ranks.size or ranks[blank & kept].max() <= dropped_ranks.min()
