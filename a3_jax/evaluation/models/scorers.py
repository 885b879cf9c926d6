"""Which forwards estimate log p(part | the rest), and what they add up to: one total in nats.

A scorer of the any-order model turns a `ScoreTarget` into passes: ranks, the tokens scored, a weight. Its
estimate is the weighted sum of the scored log-probabilities, which every rule of choice divides as it likes.
Below, for a text of BOS, three given tokens and a part of four:

                       B  c  c  c  x  x  x  x    scored
    chain              0  1  2  3  4  5  6  7    all four, exact
    chain_s (2)        0  1  1  2  3  3  4  4    all four
    ctx0_chain         0  1  1  1  2  3  4  5    all four, exact
    one_shot           0  1  1  1  2  2  2  2    all four
    mc_order           0  1  1  1  4  2  5  3    all four, averaged over drawn orders
    mask32             0  1  1  1  1  2  1  2    those of rank 2, averaged over levels of masking

BOS, where there is one, is a group of its own: the first group is predicted from nothing, and the rest of
the context had better not be. Given tokens to the right of the part count as context and come before it.

An estimator of masked diffusion turns the n tokens of a part into masks, each with a weight:

    levels   at each of 32 levels t every token is masked with probability t   (DiffuLLaMA, arXiv 2410.17891)
    llada    k tokens are masked, k evenly spread over 1..n, times n / k       (LLaDA, arXiv 2502.09992)
    dream    as levels, at 128 stratified t, times 1 / t                       (Dream, arXiv 2508.15487)
    ar_ftb   exact, left to right (Dream): scores token j with all from j on masked, here of four

        m m m m      . m m m      . . m m      . . . m
        ^              ^              ^              ^

Masks are boolean: a mask token that occurs in the text itself is a token like any other.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from a3_jax.checks import one_of, whole_number
from a3_jax.decoding.options import make_options
from a3_jax.errors import InputError
from a3_jax.evaluation.models import EMPTY_LEVELS, LOSS_WEIGHTS
from a3_jax.evaluation.models.interface import ScoreTarget
from a3_jax.model.config import ModelConfig
from a3_jax.ordering.ranks import contiguous, l2r, random

_DREAM_EPS = 1e-3  # the smallest share of masked tokens


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredPass:
    """One forward of a target of T tokens.

    Attributes:
      ranks: [T] int32, lower = earlier; a token is predicted from those of lower rank.
      scored: [T] bool.
      weight: weight of the sum of the scored log-probabilities in the estimate.
    """

    ranks: np.ndarray
    scored: np.ndarray
    weight: float = 1.0


class OrderScorer:
    """Scores the whole part in each pass, under one or several orders; the context comes first."""

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[ScoredPass]:
        """Yields the forwards of a target; `bos`: whether its first token is BOS."""
        part = _part(target)
        group, orders = self.groups(target.stop - target.start, np.random.default_rng(target.seed))
        for own in orders:
            yield ScoredPass(_ranked(~part, bos, group, own), part, 1 / len(orders))

    def groups(self, count: int, rng: np.random.Generator) -> tuple[int | None, list[np.ndarray]]:
        """Returns how many context tokens are a group (None: all), and [count] int32 ranks for each pass."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Chain(OrderScorer):
    """Every token a group of its own, left to right, the context too: the exact chain rule, one forward."""

    def groups(self, count, rng):
        return 1, [l2r(count)]


@dataclasses.dataclass(frozen=True)
class ContiguousChain(OrderScorer):
    """Groups of `group_size` tokens, left to right, in the context and in the part; one forward.

    The tokens of one group are taken as independent given the groups before it.
    """

    group_size: int = 2

    def __post_init__(self):
        whole_number("group_size", self.group_size, 1)

    def groups(self, count, rng):
        return self.group_size, [contiguous(count, self.group_size)]


@dataclasses.dataclass(frozen=True)
class ContextFirstChain(OrderScorer):
    """The context as one group, bidirectional as in decoding, then token by token; exact, one forward."""

    def groups(self, count, rng):
        return None, [l2r(count)]


@dataclasses.dataclass(frozen=True)
class OneShot(OrderScorer):
    """The context as one group and the part as another: the sum of its tokens' marginals, one forward."""

    def groups(self, count, rng):
        return None, [np.zeros(count, np.int32)]


@dataclasses.dataclass(frozen=True)
class DrawnOrders(OrderScorer):
    """The mean over `draws` random orders of the part, in groups of `group_size`; the context is one group.

    With single tokens its expectation is the bound on log p that an any-order model is trained on.
    """

    draws: int = 8
    group_size: int = 1

    def __post_init__(self):
        whole_number("draws", self.draws, 1)
        whole_number("group_size", self.group_size, 1)

    def groups(self, count, rng):
        return None, [random(count, self.group_size, rng) for _ in range(self.draws)]


class Masks(NamedTuple):
    """The forwards of one part of n tokens.

    Attributes:
      masked: [M, n] bool.
      scored: [M, n] bool, a subset of the masked tokens.
      weights: [M] float64, weight of the sum of a forward's scored log-probabilities in the estimate.
    """

    masked: np.ndarray
    scored: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class MaskedLevels:
    """DiffuLLaMA's evaluator, for either kind of model: one mask at each noise level t = 1, ..., 1/`levels`.

    Attributes:
      levels: number of levels, one forward each.
      loss_weight: "none" (the released code): a level's value is n times the mean over its masked tokens, n
        being the tokens of the part, so that the estimate is on the scale of a log-probability; "inv_t" (the
        paper, equation 25): their sum over t, whose mean over levels bounds log p.
      empty_level: a level that masks nothing counts as "zero" (the released code), which favours short parts
        (of one token by a half), or is left out ("skip").
    """

    levels: int = 32
    loss_weight: str = "none"
    empty_level: str = "zero"

    def __post_init__(self):
        whole_number("levels", self.levels, 1)
        one_of("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        one_of("empty_level", self.empty_level, EMPTY_LEVELS)

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """Returns the forwards of a part of `count` tokens; those that mask nothing are left out."""
        masked = level_masks(count, self.levels, rng)
        return _nonempty(masked, level_weights(masked, self.loss_weight, self.empty_level))

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[ScoredPass]:
        """Yields the forwards of a target for an any-order model: what is masked is the last group."""
        part = _part(target)
        masks = self.masks(target.stop - target.start, np.random.default_rng(target.seed))
        for mask, weight in zip(masks.masked, masks.weights, strict=True):
            masked = part.copy()
            masked[part] = mask
            ranks = _ranked(~masked, bos, None, np.zeros(int(mask.sum()), np.int32))
            yield ScoredPass(ranks, masked, float(weight))


@dataclasses.dataclass(frozen=True)
class FixedCounts:
    """LLaDA's evaluator: exactly k tokens are masked, anywhere, and their sum is weighted by n / k.

    Attributes:
      draws: number of masks; a part of one token has a single one, as all would be equal.
      stratum: number of masks whose counts k, k + n/b, ..., wrapped into 1..n, are evenly spread.
    """

    draws: int = 128
    stratum: int = 32

    def __post_init__(self):
        _check_draws(self.draws, self.stratum)

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """Returns the forwards of a part of `count` tokens."""
        stratum = min(self.stratum, self.draws) if count > 1 else 1
        counts = []
        for _ in range(self.draws // stratum if count > 1 else 1):
            first = rng.integers(1, count + 1)
            spread = np.round(np.linspace(first, first + (stratum - 1) * count / stratum, stratum))
            counts.append((spread.astype(np.int64) - 1) % count + 1)
        masked_count = np.concatenate(counts)
        order = rng.permuted(np.tile(np.arange(count), (len(masked_count), 1)), axis=1)
        return _nonempty(order < masked_count[:, None], count / masked_count / len(masked_count))


@dataclasses.dataclass(frozen=True)
class Stratified:
    """Dream's evaluator: tokens are masked with probability p, and their sum is weighted by 1 / p.

    Attributes:
      draws: number of masks.
      stratum: number of masks whose times t are one uniform offset + i/b, wrapped into 0..1; p = t, but at
        least 0.001.
      eos: whether EOS follows the text, seen and not scored, where it fits.
    """

    draws: int = 128
    stratum: int = 32
    eos: bool = True

    def __post_init__(self):
        _check_draws(self.draws, self.stratum)

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """Returns the forwards of a part of `count` tokens; those that mask nothing are left out."""
        stratum = min(self.stratum, self.draws)
        offsets = np.repeat(rng.random(self.draws // stratum), stratum)
        times = (offsets + np.tile(np.arange(stratum) / stratum, self.draws // stratum)) % 1.0
        share = times * (1 - _DREAM_EPS) + _DREAM_EPS
        return _nonempty(rng.random((self.draws, count)) < share[:, None], 1 / share / self.draws)


@dataclasses.dataclass(frozen=True)
class FrontToBack:
    """The chain rule from left to right, with all tokens still to come masked: exact, n forwards."""

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """Returns the forwards of a part of `count` tokens; nothing is drawn."""
        del rng
        return Masks(np.tri(count, dtype=bool).T, np.eye(count, dtype=bool), np.ones(count))


Scorer = OrderScorer | MaskedLevels
SCORERS: dict[str, Callable[..., Scorer]] = {
    "chain": Chain,
    "chain_s": ContiguousChain,
    "ctx0_chain": ContextFirstChain,
    "one_shot": OneShot,
    "mc_order": DrawnOrders,
    "mask32": MaskedLevels,
}
Estimator = MaskedLevels | FixedCounts | Stratified | FrontToBack
ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "levels": MaskedLevels,
    "llada": FixedCounts,
    "dream": Stratified,
    "ar_ftb": FrontToBack,
}


def make_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """Makes a scorer of the any-order model by name.

    make_scorer("mask32", {"loss_weight": "inv_t"})
    """
    one_of("scorer", name, SCORERS)
    return make_options(SCORERS[name], options or {})


def make_estimator(name: str, options: dict[str, Any] | None = None) -> Estimator:
    """Makes an estimator of masked diffusion by name."""
    one_of("scorer", name, ESTIMATORS)
    return make_options(ESTIMATORS[name], options or {})


def usual_estimator(config: ModelConfig) -> str:
    """Returns the estimator that the authors of a checkpoint's family use; DiffuLLaMA's for any other."""
    return {"llada": "llada", "qwen2": "dream"}.get(config.family, "levels")


def describe_scorer(name: str, scorer) -> dict[str, Any]:
    """Returns the name and options of a scorer or an estimator, for the result file."""
    return {"name": name, **dataclasses.asdict(scorer)}


def level_masks(count: int, levels: int, rng: np.random.Generator) -> np.ndarray:
    """Returns [levels, count] bool: which of `count` tokens are masked, at t = 1 first and 1/levels last."""
    times = np.arange(levels, 0, -1) / levels
    return rng.random((levels, count)) < times[:, None]


def level_weights(masks: np.ndarray, loss_weight: str, empty_level: str) -> np.ndarray:
    """Returns the weight of each level's sum of masked log-probabilities, see `MaskedLevels`.

    Args:
      masks: [levels, count] bool, from `level_masks`.

    Returns:
      [levels] float64, 0 where a level masks nothing.
    """
    levels, count = masks.shape
    masked = masks.sum(axis=1)
    counted = levels if empty_level == "zero" else max(int((masked > 0).sum()), 1)
    times = np.arange(levels, 0, -1) / levels
    weights = count / np.maximum(masked, 1) if loss_weight == "none" else 1 / times
    return np.where(masked > 0, weights / counted, 0.0)


def _part(target: ScoreTarget) -> np.ndarray:
    """Returns [T] bool: the tokens to score."""
    column = np.arange(len(target.tokens))
    return (target.start <= column) & (column < target.stop)


def _ranked(given: np.ndarray, bos: bool, context_group: int | None, own: np.ndarray) -> np.ndarray:
    """Returns [T] int32: ranks of BOS, then of the other given tokens, then of the rest, as in `own`.

    Args:
      given: [T] bool.
      bos: whether the first token is BOS; where BOS itself is scored it is not set apart.
      context_group: given tokens per group, in reading order; None: all are one group.
      own: [T - given] int32, from 0.
    """
    ranks = np.zeros(len(given), np.int32)
    first = int(bos and given[0])
    context = np.flatnonzero(given)[first:]
    ranks[context] = first + contiguous(len(context), context_group or max(len(context), 1))
    ranks[~given] = ranks[given].max(initial=-1) + 1 + own
    return ranks


def _nonempty(masked: np.ndarray, weights: np.ndarray) -> Masks:
    """Returns the masks that mask something; all that is masked is scored."""
    kept = masked.any(axis=1)
    return Masks(masked[kept], masked[kept], weights[kept])


def _check_draws(draws: int, stratum: int) -> None:
    whole_number("draws", draws, 1)
    whole_number("stratum", stratum, 1)
    if draws > stratum and draws % stratum:
        raise InputError(f"{stratum} does not divide draws={draws}", field="stratum")
