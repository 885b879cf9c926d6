"""Requests to final states: each is planned on the host, those of one shape are decoded together.

text          The  [ ]  sat  on  [ ]  [ ]        order "random", groups of 2
blank          .    x    .   .    x    x
ranks          0    2    0   0    1    1         context "flat": what is given is one group
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from a3_jax.decoding.batching import batches, bucket
from a3_jax.decoding.decode_state import DecodeState, final_eos, finished
from a3_jax.decoding.loop import DecodeSpec, decode, lay_out
from a3_jax.decoding.options import BlankRequest, GenerateOptions
from a3_jax.decoding.sampling import Sampling
from a3_jax.decoding.strategies import CommitPolicy
from a3_jax.model.sharding import axis_parts, constrain, mesh_of
from a3_jax.ordering.ranks import context_first, contiguous, l2r, order_ranks

_DISTRIBUTIONS_BYTES = 2**29  # of speculative decoding
_SMALL_PREFILL = 8  # content rows; up to here a first forward of its own is not worth compiling


class DecodeRequest:
    """One completion to make of a request.

    Attributes:
      blanks: the request; `sample`: which of its completions this is.
      ranks: [T] int32, given tokens first, then the blanks as planned.
      shape: (columns, prefill rows, content rows, query rows), padded.
    """

    def __init__(self, blanks: BlankRequest, sample: int, context: str, options: GenerateOptions):
        self.blanks, self.sample = blanks, sample
        self.ranks = _planned_ranks(blanks, sample, context, options)
        self.shape = _padded_shape(blanks, self.ranks, options)


def fill(
    params,
    config,
    requests: list[DecodeRequest],
    options: GenerateOptions,
    eos_ids: tuple[int, ...] = (),
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Decodes requests, those of one shape together.

    Args:
      params: tree of `decoding_params`.
      config: the model's.
      requests: of any shapes; each has T tokens.
      options: those of all requests.
      eos_ids: those that end a text; (): EOS is a token like any other.
      most: requests per batch, at most; None: as many as their rows allow.

    Returns:
      For each request its row of `final_fields`.
    """
    filled: list[dict[str, Any]] = [{} for _ in requests]
    limits = [limit for limit in (most, _most_examples(config, options)) if limit is not None]
    most = min(limits, default=None)
    for shape, indices, batch_size in batches(requests, lambda request: request.shape, most):
        spec = make_decode_spec(config, options, eos_ids, shape)
        with mesh_of(params):
            # Every device gets as many examples as any other; those added are finished from the start.
            batch_size = math.lcm(batch_size, axis_parts("batch"))
            state = first_state([requests[index] for index in indices], shape[0], batch_size, options.seed)
            final = final_fields(decode(params, state, spec=spec), eos_ids)
        for row, index in enumerate(indices):
            filled[index] = {name: field[row] for name, field in final.items()}
    return filled


def decoding_params(params, config, options: GenerateOptions):
    """Returns the parameter tree, embed [V, D] and so on, in the dtype and layout that steps compute with."""
    dtype = jnp.dtype(options.compute_dtype)
    params = jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), params)
    with mesh_of(params):
        return lay_out(params, config)


def final_fields(state: DecodeState, eos_ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Fetches what results are made of: arrays [B, T] or [B]; `length` [B]: columns up to a final EOS."""
    names = ("tokens", "filled", "commit_rank", "logprob", "forwards")
    fields = {name: getattr(state, name) for name in names}
    if state.drafts is not None:
        fields |= {"proposed": state.drafts.proposed, "accepted": state.drafts.accepted}
    fields = {name: _on_host(field) for name, field in fields.items()}
    fields["finished"] = _on_host(finished(state, eos_ids))
    fields["length"] = np.full(len(fields["tokens"]), fields["tokens"].shape[1])
    if eos_ids:
        ends = _on_host(final_eos(state, eos_ids))
        fields["length"] = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, fields["length"])
    return fields


def _on_host(array) -> np.ndarray:
    """Fetches all of an array, also where other processes hold some of it."""
    everything_here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(array if everything_here else process_allgather(array, tiled=True))


def _planned_ranks(request: BlankRequest, sample: int, context: str, options: GenerateOptions) -> np.ndarray:
    """Ranks given tokens first, [T] int32; blanks by own ranks, by order, or as one where steps choose."""
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
        # A draft is verified given all before it: speculative decoding has groups of one.
        group_size = 1 if options.strategy == "speculative" else min(options.group_size, max(count, 1))
        ranks[blank] = order_ranks(
            options.order, count, group_size, rng,
            block_size=options.block_size, block_order=options.block_order,
        )  # fmt: skip
    return context_first(ranks, ~blank, context)


def _padded_shape(request: BlankRequest, ranks, options: GenerateOptions) -> tuple[int, int, int, int]:
    """Returns (columns, prefill rows, content rows, query rows), padded, of which all but the first are in
    `DecodeSpec`."""
    blank, count = request.blank, int(request.blank.sum())
    columns = bucket(len(blank))
    prefill = len(blank) - count
    if options.model == "ar":
        # A step adds the token of the blank before, and the given ones up to its own.
        steps = np.diff(np.flatnonzero(blank), prepend=0)
        prefill, content_rows, query_rows = int(steps[:1].sum()), bucket(int(steps[1:].max(initial=1)), 4), 1
    elif options.strategy == "speculative":
        # As content the drafts, and before them the last committed token; as queries one row per draft, the
        # token after them, and the next window.
        window = min(options.window, columns)
        content_rows, query_rows = window + 1, 2 * window + 1
    elif options.strategy == "dynamic":
        offered = min(count, options.block_size) if options.order == "block" else count
        query_rows, content_rows = bucket(offered), _policy(options).max_commit
    elif request.ranks is None:
        query_rows = content_rows = options.group_size
    else:
        query_rows = content_rows = bucket(int(np.bincount(ranks[blank]).max(initial=1)), 4)
    # Few given tokens fit into a step like any other: it gets room for them, and no program of its own.
    prefill = bucket(prefill, 4)
    if prefill <= _SMALL_PREFILL:
        content_rows = max(prefill, content_rows)
    if options.strategy != "speculative":
        content_rows, query_rows = min(content_rows, columns), min(query_rows, columns)
    return columns, prefill, content_rows, query_rows


def _most_examples(config, options: GenerateOptions) -> int | None:
    """Returns the most examples per batch where a step keeps whole distributions, else None."""
    if options.strategy != "speculative":
        return None
    # Two per query row, of which there are 2 W + 1, and one per draft.
    return max(1, _DISTRIBUTIONS_BYTES // (4 * config.vocab_size * (5 * options.window + 2)))


def _policy(options: GenerateOptions) -> CommitPolicy:
    """Returns how many blanks dynamic commits per step."""
    bounds = (options.entropy_bound, options.threshold, options.factor)
    most = options.step_size if bounds == (None, None, None) else options.max_commit
    return CommitPolicy(most, *bounds, min_gap=options.min_gap)


def make_decode_spec(config, options: GenerateOptions, eos_ids: tuple[int, ...] | None, shape) -> DecodeSpec:
    """Makes the spec of the program for requests of a padded shape, [B, columns]."""
    columns, prefill_rows, content_rows, query_rows = shape
    policy = _policy(options)
    return DecodeSpec(
        config=config,
        dtype=options.compute_dtype,
        model=options.model,
        strategy=options.strategy,
        criterion=options.criterion,
        commit=options.commit,
        sampling=Sampling(float(options.temperature), options.top_k, float(options.top_p)),
        eos_ids=eos_ids or (),
        prefill_rows=prefill_rows,
        content_rows=content_rows,
        query_rows=query_rows,
        policy=dataclasses.replace(policy, max_commit=min(policy.max_commit, columns)),
        window=min(options.window, columns),
    )


def first_state(requests, columns: int, batch_size: int, seed: int) -> DecodeState:
    """Makes the state [B, T] before the first step; rows without a request are empty, hence finished.

    Args:
      requests: `DecodeRequest`s, at most B.
      columns: T.
      batch_size: B.
      seed: the options'.
    """
    shape = (batch_size, columns)
    # Filled on the host, row by row: requests of one padded shape differ in length.
    tokens, planned_rank, present, given = (
        np.zeros(shape, kind) for kind in (np.int32, np.int32, bool, bool)
    )
    next_rank, samples = (np.zeros(batch_size, np.int32) for _ in range(2))
    numbers = np.zeros(batch_size, np.uint32)
    for row, request in enumerate(requests):
        blank, length = request.blanks.blank, len(request.blanks.blank)
        tokens[row, :length], planned_rank[row, :length] = request.blanks.tokens, request.ranks
        present[row, :length], given[row, :length] = True, ~blank
        next_rank[row] = request.ranks[blank].min() if blank.any() else 0
        numbers[row], samples[row] = request.blanks.number, request.sample
    state = DecodeState(
        tokens=jnp.asarray(tokens),
        positions=jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), shape),
        present=jnp.asarray(present),
        given=jnp.asarray(given),
        filled=jnp.asarray(given),
        in_cache=jnp.zeros(shape, bool),
        planned_rank=jnp.asarray(planned_rank),
        commit_rank=jnp.asarray(np.where(given, planned_rank, 0)),
        logprob=jnp.zeros(shape, jnp.float32),
        next_rank=jnp.asarray(next_rank),
        forwards=jnp.zeros(batch_size, jnp.int32),
        key=_keys(np.uint32(seed), numbers, samples),
    )
    return jax.tree.map(lambda leaf: constrain(leaf, ("batch",)), state)


@jax.jit
def _keys(seed, numbers, samples):
    """Makes [B] keys: functions of (seed, line number, sample) alone."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number, sample: jax.random.fold_in(jax.random.fold_in(key, number), sample))(
        numbers, samples
    )
