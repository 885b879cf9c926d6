"""The decoding loop: one step is one forward, all steps are one jitted `while_loop`.

    offer candidates -> forward -> draw and judge each candidate -> choose -> commit

The fused forward holds the content rows of the tokens committed last and the query rows of the
candidates; the query rows see the cache and the keys just written. So K groups cost K forwards (the
given tokens ride in the first), and no token's key is computed twice. Commits with `commit="flat"`
move tokens into one common group, which changes keys already computed: they are recomputed each step.

Randomness of a draw is a function of (example's key, step, column): batch mates, padding and the
kind of forward change nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from a3_jax.decoding.sampling import Sampling, candidate_score, draw, filtered_logprobs, map_rows
from a3_jax.decoding.state import State, commit, compact, finished
from a3_jax.decoding.strategies import Strategy, dynamic, groupwise
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import Rows, TwoStream, init_cache, logits, run_rows
from a3_jax.ordering.intervals import bounds, sort_order, take_rows


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a compiled loop is specific to, besides the shapes of its state.

    Attributes:
      model, strategy, criterion, step_size, commit: as in `GenerateOptions`.
      eos_id: ends an example when placed last, or None.
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
    step_size: int
    commit: str
    sampling: Sampling
    eos_id: int | None
    prefill_rows: int
    content_rows: int
    query_rows: int
    cached: bool = True

    @property
    def recomputes(self) -> bool:
        return self.model == "a3" and (self.commit == "flat" or not self.cached)


@functools.partial(jax.jit, static_argnames="program")
def decode(params, state: State, *, program: Program) -> State:
    """Runs every example of a batch until `state.finished`."""
    model = two_stream(program.config, program.dtype)
    strategy = dynamic(program.step_size) if program.strategy == "dynamic" else groupwise()

    def step(state, content_rows):
        with jax.named_scope("step"):
            forward = _forward(model, params, program, content_rows)
            return _step(state, params, forward, strategy, program)

    if program.recomputes:
        first = state
    else:
        batch, columns = state.tokens.shape
        first = state.replace(cache=init_cache(program.config, batch, columns, model.dtype))
        if program.prefill_rows > program.content_rows:
            first = step(first, program.prefill_rows)
    return jax.lax.while_loop(
        lambda state: ~jnp.all(finished(state, program.eos_id)),
        lambda state: step(state, program.content_rows),
        first,
    ).replace(cache=None)


def two_stream(config: ModelConfig, dtype: str) -> TwoStream:
    """The model in a dtype by name; float32 means float32 proper, on accelerators too."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return TwoStream(config, dtype=jnp.dtype(dtype), precision=precision)


def _step(state: State, params, forward, strategy: Strategy, program: Program) -> State:
    """One forward of the unfinished examples, and what it commits; the finished ones stay as they are."""
    active = ~finished(state, program.eos_id)
    columns, real = compact(strategy.offer(state) & active[:, None], program.query_rows)
    hidden_BQD, state = forward(state, columns, real, active)
    keys = jax.vmap(jax.random.fold_in)(state.key, state.forwards)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, columns)
    tokens, logprobs, scores = _judge(params, hidden_BQD, keys, program)
    return commit(state, columns, strategy.choose(scores, real), tokens, logprobs)


def _judge(params, hidden_BQD, keys, program: Program):
    """[B, Q] each: the drawn token, its own log-probability, and the candidate's score."""
    precision = two_stream(program.config, program.dtype).precision

    def one_row(hidden_D, key):
        scores_V = logits(params, program.config, hidden_D, precision)
        drawn_from = filtered_logprobs(scores_V, program.sampling)
        token = draw(drawn_from, key, program.sampling)
        score = candidate_score(drawn_from, jax.random.fold_in(key, 1), program.criterion)
        return token, jax.nn.log_softmax(scores_V)[token], score

    return map_rows(one_row, (hidden_BQD, keys), program.config.vocab_size)


def _forward(model, params, program: Program, content_rows: int):
    """A step's forward: (state, columns [B, Q], real [B, Q], active [B]) -> (hidden [B, Q, D], state)."""
    if program.model == "ar":
        return functools.partial(_left_forward, model, params, content_rows)
    if program.recomputes:
        return functools.partial(_whole_forward, model, params, program.commit == "flat")
    return functools.partial(_fused_forward, model, params, content_rows)


def _fused_forward(model, params, content_rows, state: State, columns, real, active):
    """The tokens not yet stored and the candidates, over the cache: every candidate sees all of them."""
    waiting = state.filled & state.present & ~state.stored & active[:, None]
    content, stored = _new_rows(state, waiting, state.commit_rank, content_rows)
    seen = state.cache.length + jnp.sum(waiting, axis=1, dtype=jnp.int32)
    query = _candidate_rows(state, columns, real, seen)
    out = run_rows(model, params, content, query, cache=state.cache)
    return out.query, state.replace(cache=out.cache, stored=stored)


def _left_forward(model, params, content_rows, state: State, columns, real, active):
    """The content stream left to right: the row before a blank, the last one given here, predicts it."""
    reading = jnp.broadcast_to(jnp.arange(state.tokens.shape[1], dtype=jnp.int32), state.tokens.shape)
    waiting = ~state.stored & (reading < columns[:, :1]) & real[:, :1] & active[:, None]
    content, stored = _new_rows(state, waiting, reading, content_rows)
    last = jnp.maximum(jnp.sum(waiting, axis=1, dtype=jnp.int32) - 1, 0)
    out = run_rows(model, params, content, outputs="content", cache=state.cache)
    hidden_B1D = jnp.take_along_axis(out.content, last[:, None, None], axis=1)
    return hidden_B1D, state.replace(cache=out.cache, stored=stored)


def _whole_forward(model, params, flat, state: State, columns, real, active):
    """Every filled token again, in the groups of their commits (or all in one group), and the candidates."""
    del active  # the finished examples have no candidates, and nothing is kept
    filled = (state.filled & state.present).astype(jnp.int32)
    ranks = jnp.zeros_like(state.commit_rank) if flat else state.commit_rank
    order = sort_order(ranks, filled)
    tokens, positions, ranks, segments = take_rows(order, state.tokens, state.positions, ranks, filled)
    visible = bounds(ranks, ranks, segments)
    content = Rows(positions=positions, start=visible.start, limit=visible.content_limit, tokens=tokens)
    query = _candidate_rows(state, columns, real, jnp.sum(filled, axis=1, dtype=jnp.int32))
    out = run_rows(model, params, content, query)
    return out.query, state


def _new_rows(state: State, waiting, ranks, size: int):
    """Content rows of the waiting columns in rank order, to be appended to the cache.

    Every row sees the whole cache, and of the new rows its own group and those before.

    Args:
      waiting: [B, N] bool, at most `size` an example.  ranks: [B, N] int32.

    Returns:
      `Rows` [B, size], those not real see nothing; and `stored` after the forward, [B, N] bool.
    """
    segments = waiting.astype(jnp.int32)
    order = sort_order(ranks, segments)[:, :size]
    tokens, positions, ranks, segments = take_rows(order, state.tokens, state.positions, ranks, segments)
    visible = bounds(ranks, ranks, segments)
    limit = jnp.where(segments > 0, state.cache.length[:, None] + visible.content_limit, 0)
    rows = Rows(positions=positions, start=jnp.zeros_like(limit), limit=limit, tokens=tokens)
    return rows, state.stored | waiting


def _candidate_rows(state: State, columns, real, seen) -> Rows:
    """Query rows of the candidates [B, Q]: their rank comes next, so they see all `seen` [B] tokens."""
    limit = jnp.where(real, seen[:, None], 0).astype(jnp.int32)
    positions = jnp.take_along_axis(state.positions, columns, axis=1)
    return Rows(positions=positions, start=jnp.zeros_like(limit), limit=limit)
