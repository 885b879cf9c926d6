"""The decoding loop: one step is one forward, all steps are one jitted `while_loop`.

    offer candidates -> forward -> sample a token for each -> accept some -> commit

A step is a pure function of the state that takes the model's forward as an argument (`step`); what is
offered and accepted is the strategy's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3_jax.decoding.decode_state import DecodeState, finished
from a3_jax.decoding.forwards import fused_forward, left_forward, whole_forward
from a3_jax.decoding.sampling import Sampling, TokenSampler
from a3_jax.decoding.speculative import no_drafts, speculative
from a3_jax.decoding.strategies import ONE_BEST, CommitPolicy, Strategy, dynamic, groupwise
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import platform
from a3_jax.model.two_stream import (
    init_cache,
    logits,
    logits_of_table,
    make_two_stream,
    prepare_cpu_decode_params,
)

TABLE = "head_table"  # [V, D], in place of a head [D, V]


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """All that a compiled loop is specific to, besides the shapes of its state.

    Attributes:
      model, strategy, criterion, commit, window: as in `GenerateOptions`.
      policy: that of dynamic commits; its `entropy_bound` also bounds the windows of "speculative".
      eos_ids: each ends an example when placed last; (): none does.
      prefill_rows: content rows of the first forward, at least the given tokens of any example; where
        they are no more than `content_rows`, the first forward is like the others.
      content_rows: content rows of later forwards, at least what one step adds.
      query_rows: candidates per step, at most.
      cached: False recomputes all keys each step; always so when `commit` is "flat".
    """

    config: ModelConfig
    dtype: str
    model: str
    strategy: str
    criterion: str
    commit: str
    sampling: Sampling
    eos_ids: tuple[int, ...]
    prefill_rows: int
    content_rows: int
    query_rows: int
    policy: CommitPolicy = ONE_BEST
    window: int = 1
    cached: bool = True

    @property
    def recomputes(self) -> bool:
        return self.model == "a3" and (self.commit == "flat" or not self.cached)


class ModelFns(NamedTuple):
    """What a step computes with.

    Attributes:
      forward: (state, candidates, active [B] bool) -> (hidden [B, Q, D], state), see `forwards`.
      head: a row's hidden state [D] -> scores over the vocabulary [V].
    """

    forward: Callable[..., tuple[Any, DecodeState]]
    head: Callable[[Any], Any]


@functools.partial(jax.jit, static_argnames="spec")
def decode(params, state: DecodeState, *, spec: DecodeSpec) -> DecodeState:
    """Runs every example of a batch until it is `finished`.

    Args:
      params: tree of `batched_decode.decoding_params`.
      state: of B examples, [B, T] columns, see `batched_decode.first_state`.
      spec: what the program is compiled for.

    Returns:
      The last state, without its cache and the drafts' distributions.
    """
    model_fns = make_model_fns(params, spec, spec.content_rows)
    final = run_steps(prefill(params, state, spec), model_fns, spec)
    # The large arrays end here: they would leave the program as results.
    drafts = final.drafts and final.drafts.replace(log_probs=None)
    return final.replace(cache=None, drafts=drafts)


def run_steps(state: DecodeState, model_fns: ModelFns, spec: DecodeSpec) -> DecodeState:
    """Steps a state [B, T] until every example is finished."""
    return jax.lax.while_loop(
        lambda state: ~jnp.all(finished(state, spec.eos_ids)),
        lambda state: step(state, model_fns, spec),
        state,
    )


def step(state: DecodeState, model_fns: ModelFns, spec: DecodeSpec) -> DecodeState:
    """Runs one forward of a state [B, T] and commits tokens; finished examples stay as they are."""
    strategy = _strategy(spec)
    with jax.named_scope("step"):
        active_B = ~finished(state, spec.eos_ids)
        candidates = strategy.offer(state)
        candidates = candidates._replace(valid=candidates.valid & active_B[:, None])
        hidden_BQD, state = model_fns.forward(state, candidates, active_B)
        # `forwards` counts an example's own steps: its bits are the same in any batch.
        keys_B = jax.vmap(jax.random.fold_in)(state.key, state.forwards)
        size = spec.config.vocab_size
        sampler = TokenSampler(hidden_BQD, model_fns.head, keys_B, spec.sampling, spec.criterion, size)
        return strategy.accept(state, candidates, sampler)


def start_state(state: DecodeState, spec: DecodeSpec) -> DecodeState:
    """Returns a state [B, T] with what the strategy and the cache need, all empty."""
    batch, columns = state.tokens.shape
    if spec.strategy == "speculative":
        state = state.replace(drafts=no_drafts(batch, spec.window, spec.config.vocab_size))
    if spec.recomputes:
        return state
    # A forward writes its rows as one block, padding and all: the last may begin at the last column.
    slots = columns + spec.content_rows
    return state.replace(cache=init_cache(spec.config, batch, slots, jnp.dtype(spec.dtype)))


def prefill(params, state: DecodeState, spec: DecodeSpec) -> DecodeState:
    """Returns the state [B, T] before the loop: after a first step, if given tokens want a larger one."""
    state = start_state(state, spec)
    if spec.recomputes or spec.prefill_rows <= spec.content_rows:
        return state
    # It commits like any step, so that no forward is spent on given tokens alone.
    return step(state, make_model_fns(params, spec, spec.prefill_rows), spec)


def _strategy(spec: DecodeSpec) -> Strategy:
    if spec.strategy == "speculative":
        return speculative(spec.window, spec.policy.entropy_bound)
    if spec.strategy == "dynamic":
        return dynamic(spec.query_rows, spec.policy)
    return groupwise(spec.query_rows)


def make_model_fns(params, spec: DecodeSpec, content_rows: int) -> ModelFns:
    """Makes the forward [B, Q, D] and the head [D] -> [V] of a spec from a parameter tree."""
    model = make_two_stream(spec.config, spec.dtype)
    if TABLE in params:
        model = model.clone(few_rows=True)
    if spec.model == "ar":
        forward = functools.partial(left_forward, model, params, content_rows)
    elif spec.recomputes:
        forward = functools.partial(whole_forward, model, params, spec.commit == "flat")
    else:
        forward = functools.partial(fused_forward, model, params, content_rows)

    def head(hidden_D):
        if TABLE in params:
            return logits_of_table(params[TABLE], spec.config, hidden_D, model.precision)
        return logits(params, spec.config, hidden_D, model.precision)

    return ModelFns(forward, head)


def lay_out(params, config: ModelConfig):
    """Returns the parameters as the loop takes them: on CPU for few rows, with the head as a table [V, D]."""
    if platform() != "cpu":
        return params
    table_VD = params["embed"] if config.tie_embeddings else _transposed(params["head"])
    return params | _laid_out(params, config) | {TABLE: table_VD}


_laid_out = jax.jit(prepare_cpu_decode_params, static_argnums=1)
_transposed = jax.jit(jnp.transpose)
