"""The decoding loop: one step is one forward, all steps are one jitted `while_loop`.

    offer candidates -> forward -> judge them -> accept some -> commit

A step is a pure function of the state that takes the model's forward as an argument (`step`); what is
offered and accepted is the strategy's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from a3_jax.decoding.forwards import fused_forward, left_forward, whole_forward
from a3_jax.decoding.judge import Judge
from a3_jax.decoding.sampling import Sampling
from a3_jax.decoding.speculative import no_drafts, speculative
from a3_jax.decoding.state import State, finished
from a3_jax.decoding.strategies import ONE_BEST, Rule, Strategy, dynamic, groupwise
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import platform
from a3_jax.model.two_stream import init_cache, lay_out_for_few_rows, logits, logits_of_table, make_two_stream

TABLE = "head_table"  # [V, D], in place of a head [D, V]


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a compiled loop is specific to, besides the shapes of its state.

    Attributes:
      model, strategy, criterion, commit, window: as in `GenerateOptions`.
      rule: of dynamic commits; its `entropy_bound` also bounds the windows of "speculative".
      eos_ids: each ends an example when placed last; (): none does.
      prefill_rows: content rows of the first forward, at least the given tokens of any example; where
        they are no more than `content_rows`, the first forward is like the others.
      content_rows: content rows of later forwards, at least what one step adds.
      query_rows: candidates of a step, at most.
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
    rule: Rule = ONE_BEST
    window: int = 1
    cached: bool = True

    @property
    def recomputes(self) -> bool:
        return self.model == "a3" and (self.commit == "flat" or not self.cached)


class Network(NamedTuple):
    """What a step computes with.

    Attributes:
      forward: of `forwards`.
      head: a row's hidden state [D] -> scores over the vocabulary [V].
    """

    forward: Callable[..., tuple[Any, State]]
    head: Callable[[Any], Any]


@functools.partial(jax.jit, static_argnames="program")
def decode(params, state: State, *, program: Program) -> State:
    """Runs every example of a batch until it is `finished`."""
    network = make_network(params, program, program.content_rows)
    final = run_steps(opened(params, state, program), network, program)
    drafts = final.drafts and final.drafts.replace(laws=None)
    return final.replace(cache=None, drafts=drafts)


def run_steps(state: State, network: Network, program: Program) -> State:
    """Steps until every example is finished."""
    return jax.lax.while_loop(
        lambda state: ~jnp.all(finished(state, program.eos_ids)),
        lambda state: step(state, network, program),
        state,
    )


def step(state: State, network: Network, program: Program) -> State:
    """One forward of the unfinished examples, and what it commits; the finished ones stay as they are."""
    strategy = _strategy(program)
    with jax.named_scope("step"):
        active = ~finished(state, program.eos_ids)
        offer = strategy.offer(state)
        offer = offer._replace(real=offer.real & active[:, None])
        hidden_BQD, state = network.forward(state, offer, active)
        keys = jax.vmap(jax.random.fold_in)(state.key, state.forwards)
        size = program.config.vocab_size
        judge = Judge(hidden_BQD, network.head, keys, program.sampling, program.criterion, size)
        return strategy.accept(state, offer, judge)


def start_state(state: State, program: Program) -> State:
    """The state with what the strategy and the cache need, all empty."""
    batch, columns = state.tokens.shape
    if program.strategy == "speculative":
        state = state.replace(drafts=no_drafts(batch, program.window, program.config.vocab_size))
    if program.recomputes:
        return state
    room = columns + program.content_rows  # rows are written as one block, padding and all
    dtype = jnp.dtype(program.dtype)
    return state.replace(cache=init_cache(program.config, batch, room, dtype))


def opened(params, state: State, program: Program) -> State:
    """The state before the loop: after a first step, if the given tokens want a forward of their own size."""
    state = start_state(state, program)
    if program.recomputes or program.prefill_rows <= program.content_rows:
        return state
    return step(state, make_network(params, program, program.prefill_rows), program)


def _strategy(program: Program) -> Strategy:
    if program.strategy == "speculative":
        return speculative(program.window, program.rule.entropy_bound)
    if program.strategy == "dynamic":
        return dynamic(program.query_rows, program.rule)
    return groupwise(program.query_rows)


def make_network(params, program: Program, content_rows: int) -> Network:
    model = make_two_stream(program.config, program.dtype)
    if TABLE in params:
        model = model.clone(few_rows=True)
    if program.model == "ar":
        forward = left_forward(model, params, content_rows)
    elif program.recomputes:
        forward = whole_forward(model, params, program.commit == "flat")
    else:
        forward = fused_forward(model, params, content_rows)
    return Network(forward, _head(params, program.config, model.precision))


def lay_out(params, config: ModelConfig):
    """The parameters as the loop takes them: on CPU laid out for few rows, and the head as a table."""
    if platform() != "cpu":
        return params
    table_VD = params["embed"] if config.tie_embeddings else _transposed(params["head"])
    return params | _laid_out(params, config) | {TABLE: table_VD}


_laid_out = jax.jit(lay_out_for_few_rows, static_argnums=1)
_transposed = jax.jit(jnp.transpose)


def _head(params, config: ModelConfig, precision):
    """A function: hidden state [D] -> scores [V]."""
    if TABLE in params:
        return lambda hidden_D: logits_of_table(params[TABLE], config, hidden_D, precision)
    return lambda hidden_D: logits(params, config, hidden_D, precision)
