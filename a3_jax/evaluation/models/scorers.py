"""How an any-order model scores a part of a text: which forwards, and what they add up to.

A scorer turns a `ScoreTarget` into passes: ranks, the tokens scored, a weight. Its estimate of log p(target
part | the rest) is the weighted sum of the scored log-probabilities, one total in nats, which every rule of
choice divides as it likes. Below, of a text of BOS, three given tokens and a part of four:

                       B  c  c  c  x  x  x  x    scored
    chain              0  1  2  3  4  5  6  7    all four, exact
    chain_s (2)        0  1  1  2  3  3  4  4    all four
    ctx0_chain         0  1  1  1  2  3  4  5    all four, exact
    one_shot           0  1  1  1  2  2  2  2    all four
    mc_order           0  1  1  1  4  2  5  3    all four, averaged over drawn orders
    mask32             0  1  1  1  1  2  1  2    those of rank 2, averaged over levels of masking

BOS, where there is one, is a group of its own: what stands in the first group is predicted from nothing,
and the rest of the context had better not be. Given tokens to the right of the part count as context, and
come before it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from a3_jax.decoding.options import make_options, one_of, whole_number
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.models.interface import ScoreTarget
from a3_jax.ordering.ranks import contiguous, l2r, random

LOSS_WEIGHTS = ("none", "inv_t")
EMPTY_LEVELS = ("zero", "skip")


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One forward of a target of T tokens.

    Attributes:
      ranks: [T] int32, lower = earlier; a token is predicted from those of lower rank.
      scored: [T] bool.
      weight: of the sum of the scored log-probabilities in the estimate.
    """

    ranks: np.ndarray
    scored: np.ndarray
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Chain:
    """Every token a group of its own, left to right, the context too: the exact chain rule, one forward."""

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[Pass]:
        """The forwards of a target; `bos`: whether its first token is one."""
        given = ~_part(target)
        yield Pass(_ranked(given, bos, 1, l2r(target.stop - target.start)), ~given)


@dataclasses.dataclass(frozen=True)
class ContiguousChain:
    """Groups of `group_size` tokens, left to right, the context's and the part's own; one forward.

    What stands in one group is taken as independent given the groups before it.
    """

    group_size: int = 2

    def __post_init__(self):
        whole_number("group_size", self.group_size, 1)

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[Pass]:
        """The forwards of a target; `bos`: whether its first token is one."""
        given, size = ~_part(target), self.group_size
        yield Pass(_ranked(given, bos, size, contiguous(target.stop - target.start, size)), ~given)


@dataclasses.dataclass(frozen=True)
class ContextFirstChain:
    """The context as one group, bidirectional as in decoding, then token by token; exact, one forward."""

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[Pass]:
        """The forwards of a target; `bos`: whether its first token is one."""
        given = ~_part(target)
        yield Pass(_ranked(given, bos, None, l2r(target.stop - target.start)), ~given)


@dataclasses.dataclass(frozen=True)
class OneShot:
    """The context as one group and the part as another: the sum of its tokens' marginals, one forward."""

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[Pass]:
        """The forwards of a target; `bos`: whether its first token is one."""
        given = ~_part(target)
        yield Pass(_ranked(given, bos, None, np.zeros(target.stop - target.start, np.int32)), ~given)


@dataclasses.dataclass(frozen=True)
class DrawnOrders:
    """The mean over `draws` random orders of the part, in groups of `group_size`; the context is one group.

    With single tokens its expectation is the bound on log p that an any-order model is trained on.
    """

    draws: int = 8
    group_size: int = 1

    def __post_init__(self):
        whole_number("draws", self.draws, 1)
        whole_number("group_size", self.group_size, 1)

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[Pass]:
        """The forwards of a target; `bos`: whether its first token is one."""
        given, rng = ~_part(target), np.random.default_rng(target.seed)
        for _ in range(self.draws):
            own = random(target.stop - target.start, self.group_size, rng)
            yield Pass(_ranked(given, bos, None, own), ~given, 1 / self.draws)


@dataclasses.dataclass(frozen=True)
class MaskedLevels:
    """The estimate of masked diffusion: at each level t = 1, ..., 1/`levels` tokens are masked with
    probability t, and predicted as one group from all others (DiffuLLaMA, arXiv 2410.17891).

    Attributes:
      levels: how many, one forward each.
      loss_weight: "none": a level's value is n times the mean over its masked tokens, n being the part's
        tokens, so that the estimate is on the scale of a log-probability; "inv_t": their sum over t, of
        which the mean over levels estimates a bound on log p.
      empty_level: a level that masks nothing counts as "zero", which favours short parts (of one token by
        a half), or is left out ("skip").
    """

    levels: int = 32
    loss_weight: str = "none"
    empty_level: str = "zero"

    def __post_init__(self):
        whole_number("levels", self.levels, 1)
        one_of("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        one_of("empty_level", self.empty_level, EMPTY_LEVELS)

    def passes(self, target: ScoreTarget, bos: bool) -> Iterator[Pass]:
        """The forwards of a target; `bos`: whether its first token is one. Empty levels need none."""
        part, count = _part(target), target.stop - target.start
        masks = level_masks(count, self.levels, np.random.default_rng(target.seed))
        weights = level_weights(masks, self.loss_weight, self.empty_level)
        for mask, weight in zip(masks, weights, strict=True):
            if mask.any():
                masked = part.copy()
                masked[part] = mask
                ranks = _ranked(~masked, bos, None, np.zeros(int(mask.sum()), np.int32))
                yield Pass(ranks, masked, float(weight))


Scorer = Chain | ContiguousChain | ContextFirstChain | OneShot | DrawnOrders | MaskedLevels
SCORERS: dict[str, Callable[..., Scorer]] = {
    "chain": Chain,
    "chain_s": ContiguousChain,
    "ctx0_chain": ContextFirstChain,
    "one_shot": OneShot,
    "mc_order": DrawnOrders,
    "mask32": MaskedLevels,
}


def make_scorer(name: str, options: dict[str, Any] | None = None) -> Scorer:
    """A scorer by name.

        make_scorer("mask32", {"loss_weight": "inv_t"})

    Raises:
      InputError: an unknown name, option or value.
    """
    if name not in SCORERS:
        raise InputError(
            f"must be one of {', '.join(SCORERS)}, got {name!r}{nearest(name, SCORERS)}", field="scorer"
        )
    return make_options(SCORERS[name], options or {})


def describe_scorer(name: str, scorer: Scorer) -> dict[str, Any]:
    """Its name and options, for the result file."""
    return {"name": name, **dataclasses.asdict(scorer)}


def level_masks(count: int, levels: int, rng: np.random.Generator) -> np.ndarray:
    """[levels, count] bool: which of `count` tokens are masked, at t = 1 first and 1/levels last."""
    times = np.arange(levels, 0, -1) / levels
    return rng.random((levels, count)) < times[:, None]


def level_weights(masks: np.ndarray, loss_weight: str, empty_level: str) -> np.ndarray:
    """What the sum of a level's masked log-probabilities counts in the estimate, see `MaskedLevels`.

    Args:
      masks: [levels, count] bool, of `level_masks`.

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
    """[T] bool: the tokens to score."""
    place = np.arange(len(target.tokens))
    return (target.start <= place) & (place < target.stop)


def _ranked(given: np.ndarray, bos: bool, context_size: int | None, own: np.ndarray) -> np.ndarray:
    """[T] int32: BOS, then the other given tokens, then the rest in their own ranks.

    Args:
      given: [T] bool.
      bos: whether the first token is one; what is to be scored, it is not.
      context_size: given tokens a group, in reading order; None: all are one.
      own: [T - given] int32, from 0.
    """
    ranks = np.zeros(len(given), np.int32)
    first = int(bos and given[0])
    context = np.flatnonzero(given)[first:]
    ranks[context] = first + contiguous(len(context), context_size or max(len(context), 1))
    ranks[~given] = ranks[given].max(initial=-1) + 1 + own
    return ranks
