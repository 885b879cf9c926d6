"""The samplers of masked diffusion: each step draws every masked token of a blank and commits some.

                    a step commits                                    of the score
    diffullama      all but the floor(n t/T) worst of the blank,      log-probability of what was drawn
                    t = T-1 .. 0; committed tokens count too
    diffullama_random   each, with probability 1 / (t + 1)
    low_confidence  n/T of the masked, the best                       probability at temperature 1 of what
                    (LLaDA)                                           was drawn
    random          the same, of random ones (LLaDA)
    origin          each, with probability 1 - s/t (Dream)
    maskgit_plus    m (1 - s/t) of the m masked, the best (Dream)     log-probability of what was drawn
    topk_margin, entropy   the same                                   margin of the two likeliest; -entropy

s < t are neighbours of T + 1 evenly spaced times from 1 to 0.001; the last step commits everything. All steps
of a batch are one compiled loop, which ends when nothing is masked. DiffuLLaMA (arXiv 2410.17891) as its
evaluation and quick-start scripts have it; LLaDA (arXiv 2502.09992) with one block; Dream (arXiv 2508.15487).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from a3_jax.checks import one_of, whole_number
from a3_jax.decoding.batching import batches, bucket, length_bucket
from a3_jax.decoding.options import make_options
from a3_jax.decoding.sampling import Sampling, candidate_score, draw, filtered_logprobs, map_rows
from a3_jax.errors import InputError
from a3_jax.evaluation.models.diffusion_forward import FEWEST_QUERIES, predicting_rows
from a3_jax.evaluation.models.interface import TextBlank
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import axis_parts, constrain, mesh_of
from a3_jax.model.two_stream import logits, make_two_stream

_LAST_TIME = 1e-3  # Dream's


def _kept(count, steps):
    """Returns how many tokens of the blank may stay masked after each step."""
    return [count * t // steps for t in range(steps - 1, -1, -1)]


def _even(count, steps):
    """Returns how many tokens each step commits: evenly, the remainder first."""
    return [count // steps + (step < count % steps) for step in range(steps)]


def _shares(count, steps):
    """Returns the share of the masked that each step commits, or the probability of committing each."""
    del count
    times = np.linspace(1, _LAST_TIME, steps + 1)
    return [*(1 - times[1:-1] / times[:-2]), 1.0]


def _uniform(count, steps):
    del count
    return [1 / (t + 1) for t in range(steps - 1, -1, -1)]


class _Rule(NamedTuple):
    """Which masked tokens a step commits.

    Attributes:
      choice: "best" (so many), "best_share" (such a share of the masked), "all_but_worst" or "chance".
      schedule: (tokens of the blank, steps) -> an amount for each step.
      score: "drawn" (log-probability of what was drawn), "plain" (at temperature 1, unfiltered), or a
        criterion of `decoding.sampling.candidate_score`.
      temperature, top_p: the released settings.
    """

    choice: str
    schedule: Callable
    score: str
    temperature: float = 0.0
    top_p: float = 1.0


_RULES = {
    "diffullama": _Rule("all_but_worst", _kept, "drawn", 0.9),
    "diffullama_random": _Rule("chance", _uniform, "random", 0.9, 0.9),
    "low_confidence": _Rule("best", _even, "plain"),
    "random": _Rule("best", _even, "random"),
    "origin": _Rule("chance", _shares, "random"),
    "maskgit_plus": _Rule("best_share", _shares, "drawn"),
    "topk_margin": _Rule("best_share", _shares, "margin"),
    "entropy": _Rule("best_share", _shares, "entropy"),
}
SAMPLERS = tuple(_RULES)
_FEWEST_STEPS = 32  # a schedule's smallest bucket


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler with its settings.

    Attributes:
      name: one of `SAMPLERS`.
      steps: the most forwards, or "length": as many as the blank has tokens.
      temperature: 0 takes the likeliest token.
      top_p: as in `decoding.sampling`; 1 filters nothing.
    """

    name: str
    steps: int | str = "length"
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        one_of("sampler", self.name, SAMPLERS)
        if self.steps != "length":
            whole_number("steps", self.steps, 1)
        for name, most in (("temperature", math.inf), ("top_p", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= most or value == math.inf:
                raise InputError(f"must be a number from 0, got {value!r}", field=name)
        if self.top_p == 0:
            raise InputError("must be above 0", field="top_p")

    def schedule(self, count: int) -> list[float]:
        """Returns an amount for each step of filling `count` tokens."""
        steps = count if self.steps == "length" else int(self.steps)
        return _RULES[self.name].schedule(count, steps)


def make_sampler(name: str, options: dict[str, Any] | None = None) -> Sampler:
    """Makes a sampler by name, with its released settings where `options` has no others."""
    one_of("sampler", name, SAMPLERS)
    rule = _RULES[name]
    released = {"temperature": rule.temperature, "top_p": rule.top_p}
    return make_options(Sampler, {**released, **(options or {}), "name": name})


def usual_sampler(config: ModelConfig) -> str:
    """Returns the sampler that the authors of a checkpoint's family use; DiffuLLaMA's for any other."""
    return {"llada": "low_confidence", "qwen2": "entropy"}.get(config.family, "diffullama")


class Filled(NamedTuple):
    """A filled blank.

    Attributes:
      tokens: [n] int32.
      committed: [n] int32, the step that committed each, from 0.
    """

    tokens: np.ndarray
    committed: np.ndarray


def fill_blanks(
    params,
    config: ModelConfig,
    blanks: Sequence[TextBlank],
    sampler: Sampler,
    dtype: str,
    most: int | None = None,
) -> list[Filled]:
    """Fills blanks, those of one padded shape together; what is drawn is a function of a blank's seed alone.

    Args:
      params: arrays [V, D] and so on, best in the dtype of the computation: then no step casts them.
      config: the model's, with a mask token.
      sampler: how blanks are filled.
      dtype: dtype of the computation, by name.
      most: the most blanks per batch; None: as many as their rows allow.
    """
    rule, sampling = _RULES[sampler.name], Sampling(float(sampler.temperature), 0, float(sampler.top_p))
    schedules = [sampler.schedule(blank.length) for blank in blanks]
    filled: list[Filled | None] = [None] * len(blanks)

    def shape_of(index):
        blank = blanks[index]
        return (
            length_bucket(len(blank)),
            bucket(blank.length, FEWEST_QUERIES),
            bucket(len(schedules[index]), _FEWEST_STEPS),
        )

    for shape, indices, size in batches(range(len(blanks)), shape_of, most):
        with mesh_of(params):
            size = math.lcm(size, axis_parts("batch"))
            text = _pack([blanks[index] for index in indices], [schedules[i] for i in indices], shape, size)
            spec = _LoopSpec(config, dtype, rule.choice, rule.score, sampling, queries=shape[1])
            state = _sample(params, text, spec=spec)
        chosen, committed = np.asarray(state.chosen), np.asarray(state.committed)
        for row, index in enumerate(indices):
            count = blanks[index].length
            filled[index] = Filled(chosen[row, :count], committed[row, :count])
    return [one for one in filled if one is not None]


@struct.dataclass
class PaddedTexts:
    """Texts with a blank each, padded to T columns.

    Attributes:
      tokens: [B, T] int32, anything at the blank. lengths: [B] int32.
      first, count: [B] int32, where the blank begins and its length; length 0 in rows of padding.
      schedule: [B, S] float32, an amount for each step.
      key: [B] random keys.
    """

    tokens: Any
    lengths: Any
    first: Any
    count: Any
    schedule: Any
    key: Any


@struct.dataclass
class SamplerState:
    """What the steps change, over the Q columns of a blank.

    Attributes:
      step: int32 scalar, number of steps done.
      chosen: [B, Q] int32. masked: [B, Q] bool. committed: [B, Q] int32.
    """

    step: Any
    chosen: Any
    masked: Any
    committed: Any


def _pack(blanks, schedules, shape, size) -> PaddedTexts:
    columns, _, steps = shape
    tokens, schedule = np.zeros((size, columns), np.int32), np.zeros((size, steps), np.float32)
    lengths, first, count = (np.zeros(size, np.int32) for _ in range(3))
    seeds = np.zeros(size, np.uint32)
    for row, (blank, amounts) in enumerate(zip(blanks, schedules, strict=True)):
        lengths[row], first[row], count[row] = len(blank), len(blank.prefix), blank.length
        tokens[row, : first[row]] = blank.prefix
        tokens[row, first[row] + count[row] : lengths[row]] = blank.suffix
        schedule[row, : len(amounts)], seeds[row] = amounts, blank.seed
    text = PaddedTexts(tokens, lengths, first, count, schedule, jax.vmap(jax.random.key)(seeds))
    return jax.tree.map(lambda leaf: constrain(jnp.asarray(leaf), ("batch",)), text)


class _LoopSpec(NamedTuple):
    """What a compiled loop is specialised on, besides the shapes of its texts.

    Attributes:
      choice, score: fields of `_Rule`.
      queries: number of columns of the longest blank, padded.
    """

    config: ModelConfig
    dtype: str
    choice: str
    score: str
    sampling: Sampling
    queries: int


@functools.partial(jax.jit, static_argnames="spec")
def _sample(params, text: PaddedTexts, *, spec: _LoopSpec) -> SamplerState:
    """Steps until nothing is masked."""
    config, queries = spec.config, spec.queries
    model, mask_token = make_two_stream(config, spec.dtype), cast(int, config.mask_token)
    index = jnp.arange(queries, dtype=jnp.int32)
    inside = index < text.count[:, None]
    columns = text.first[:, None] + index
    rows = jnp.arange(text.tokens.shape[0])[:, None]
    blank_columns = jnp.where(inside, columns, text.tokens.shape[1])

    def step(state: SamplerState) -> SamplerState:
        shown = jnp.where(state.masked, mask_token, state.chosen)
        tokens = text.tokens.at[rows, blank_columns].set(shown, mode="drop")
        hidden = predicting_rows(model, params, tokens, text.lengths, jnp.where(inside, columns, 0))
        # A column's key is a function of the blank's own key, the step and the column.
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(text.key, state.step)
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(step_keys, index)
        draw_and_score = functools.partial(_drawn, params, spec, model.precision)
        drawn, score = map_rows(draw_and_score, (hidden, keys), config.vocab_size)
        amount, chosen = text.schedule[:, state.step], functools.partial(_commits, spec.choice)
        commit = state.masked & jax.vmap(chosen)(score, state.masked, inside, amount)
        return SamplerState(
            step=state.step + 1,
            chosen=jnp.where(commit, drawn, state.chosen),
            masked=state.masked & ~commit,
            committed=jnp.where(commit, state.step, state.committed),
        )

    nothing = jnp.zeros(inside.shape, jnp.int32)
    first = SamplerState(step=jnp.int32(0), chosen=nothing, masked=inside, committed=nothing)
    return jax.lax.while_loop(lambda state: jnp.any(state.masked), step, first)


def _drawn(params, spec: _LoopSpec, precision, hidden_D, key):
    """Draws one masked token; returns it with its score, higher = committed sooner."""
    score, sampling = spec.score, spec.sampling
    token_key, score_key = jax.random.split(key)
    logits_V = logits(params, spec.config, hidden_D, precision)
    log_probs_V = filtered_logprobs(logits_V, sampling)
    token = draw(log_probs_V, token_key, sampling)
    if score == "drawn":
        return token, log_probs_V[token]
    if score == "plain":
        return token, jax.nn.log_softmax(logits_V)[token]
    return token, candidate_score(log_probs_V, score_key, score)


def _commits(choice: str, score, masked, inside, amount):
    """Returns [Q] bool: the columns of one blank that a step commits; `choice` as in `_Rule`."""
    if choice == "chance":
        return score < amount  # the score is uniform
    if choice == "all_but_worst":  # of the whole blank, committed columns included
        return _rank(score, inside) >= amount
    if choice == "best_share":
        amount = jnp.floor(jnp.sum(masked) * amount)
    return _rank(-score, masked) < amount  # the first on a tie


def _rank(value, among):
    """Returns [Q] int32: place of each in ascending order of value; those not `among` them come last."""
    order = jnp.lexsort((value, ~among))
    return jnp.argsort(order)
