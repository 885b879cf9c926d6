"""Blanks to text: requests are planned on the host, decoded in batches, and written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.batching import batches, bucket
from a3_jax.decoding.loop import Program, decode
from a3_jax.decoding.options import GenerateOptions, make_options
from a3_jax.decoding.requests import BlankRequest, blank_requests, default_context, item_lines
from a3_jax.decoding.sampling import Sampling
from a3_jax.decoding.scoring import default_dtype
from a3_jax.decoding.state import State, final_eos
from a3_jax.errors import InputError
from a3_jax.ordering.ranks import context_first, l2r, order_ranks

_SMALL_PREFILL = 16  # content rows; below, a first forward of its own is not worth compiling


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
      "forwards", "exact"}, and "sample" if there are several. Log-probabilities are the model's own
      (temperature 1, no filter), None at given tokens.

    Raises:
      InputError: a bad item or option, before anything is computed.
    """
    return generate_lines(checkpoint, item_lines(items), make_options(GenerateOptions, options))


def generate_lines(checkpoint, lines, options: GenerateOptions) -> list[dict[str, Any]]:
    """`generate` of lines that know where they stand."""
    eos_id = _eos_id(checkpoint, options)
    context = options.context or ("flat" if options.commit == "flat" else default_context(checkpoint))
    requests = blank_requests(lines, checkpoint, options)
    tasks = [
        _Task(request, sample, context, options)
        for request in requests
        for sample in range(options.num_samples)
    ]
    results: list[dict[str, Any]] = [{} for _ in tasks]
    for shape, indices, batch_size in batches(tasks, lambda task: task.shape):
        program = _program(checkpoint.config, options, eos_id, shape)
        state = _start([tasks[index] for index in indices], shape[0], batch_size, options.seed)
        final = decode(checkpoint.params, state, program=program)
        ends = None if eos_id is None else np.asarray(final_eos(final, eos_id))
        names = ("tokens", "filled", "commit_rank", "logprob", "forwards")
        fields = {name: np.asarray(getattr(final, name)) for name in names}
        for row, index in enumerate(indices):
            arrays = {name: field[row] for name, field in fields.items()}
            length = len(tasks[index].request.tokens)
            if ends is not None and ends[row].any():
                length = int(ends[row].argmax()) + 1
            results[index] = _result(tasks[index], arrays, length, checkpoint.tokenizer, options)
    return results


def _eos_id(checkpoint, options) -> int | None:
    """The id that ends a text, or None where EOS is a token like any other."""
    if not options.stop_at_eos:
        return None
    if checkpoint.tokenizer is None or checkpoint.tokenizer.eos_id is None:
        raise InputError("the checkpoint's tokenizer names no EOS token", field="--stop_at_eos")
    return checkpoint.tokenizer.eos_id


def _planned_ranks(request: BlankRequest, sample: int, context: str, options: GenerateOptions) -> np.ndarray:
    """[T] int32: given tokens first; the blanks one by one for model "ar", by own ranks, or by order."""
    blank, count = request.blank, int(request.blank.sum())
    ranks = np.zeros(len(blank), np.int32)
    if options.model == "ar":
        ranks[blank] = l2r(count)
    elif request.ranks is not None:
        ranks[blank] = request.ranks[blank]
    else:
        rng = np.random.default_rng([options.seed, request.number, sample])
        ranks[blank] = order_ranks(options.order, count, min(options.group_size, max(count, 1)), rng)
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
    elif options.strategy == "dynamic":
        query_rows, content_rows = bucket(count), options.step_size
    elif request.ranks is None:
        query_rows = content_rows = options.group_size
    else:
        query_rows = content_rows = bucket(int(np.bincount(ranks[blank]).max(initial=1)), 4)
    prefill = bucket(prefill)
    if prefill <= _SMALL_PREFILL:
        content_rows = max(prefill, content_rows)
    return columns, prefill, min(content_rows, columns), min(query_rows, columns)


def _program(config, options: GenerateOptions, eos_id, shape) -> Program:
    columns, prefill_rows, content_rows, query_rows = shape
    return Program(
        config=config,
        dtype=options.dtype or default_dtype(),
        model=options.model,
        strategy=options.strategy,
        criterion=options.criterion,
        step_size=min(options.step_size, columns),
        commit=options.commit,
        sampling=Sampling(float(options.temperature), options.top_k, float(options.top_p)),
        eos_id=eos_id,
        prefill_rows=prefill_rows,
        content_rows=content_rows,
        query_rows=query_rows,
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
    return State(
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


@jax.jit
def _keys(seed, numbers, samples):
    """[B] keys: a function of (seed, line number, sample) alone."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number, sample: jax.random.fold_in(jax.random.fold_in(key, number), sample))(
        numbers, samples
    )


def _result(task: _Task, arrays, length: int, tokenizer, options: GenerateOptions) -> dict[str, Any]:
    """One output object: the first `length` columns, in the order they are read."""
    blank = task.request.blank
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
    return result | ({"sample": task.sample} if options.num_samples > 1 else {})


def _stands_alone(arrays, blank, length, options) -> bool:
    """Whether no kept token was drawn given one that an EOS dropped."""
    ranks = arrays["commit_rank"][: len(blank)]
    kept = np.arange(len(blank)) < length
    dropped_ranks = ranks[blank & ~kept & arrays["filled"][: len(blank)]]
    return options.model == "ar" or not dropped_ranks.size or ranks[blank & kept].max() <= dropped_ranks.min()
