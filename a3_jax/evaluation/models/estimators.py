"""How masked diffusion estimates log p(part | the rest): which tokens are masked, and what each mask counts.

An estimator turns the n tokens of a part into masks. Its estimate is the weighted sum of the
log-probabilities of the scored tokens, one total in nats.

    levels   at each of 32 levels t every token is masked with probability t   (DiffuLLaMA, arXiv 2410.17891)
    llada    k tokens are masked, k evenly spread over 1..n, times n / k       (LLaDA, arXiv 2502.09992)
    dream    as levels, at 128 stratified t, times 1 / t                       (Dream, arXiv 2508.15487)
    ar_ftb   exact, left to right (Dream): token j is scored, all from it on being masked, here of four

        m m m m      . m m m      . . m m      . . . m
        ^              ^              ^              ^

Masks are boolean: a token of the text that happens to be the mask token is none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from a3_jax.decoding.options import make_options, one_of, whole_number
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.models.scorers import EMPTY_LEVELS, LOSS_WEIGHTS, level_masks, level_weights
from a3_jax.model.config import ModelConfig

_DREAM_EPS = 1e-3  # the least share of masked tokens


class Masks(NamedTuple):
    """The forwards of one part of n tokens.

    Attributes:
      masked: [M, n] bool.
      scored: [M, n] bool, of those that are masked.
      weights: [M] float64, of the sum of a forward's scored log-probabilities in the estimate.
    """

    masked: np.ndarray
    scored: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class Levels:
    """DiffuLLaMA's evaluator: one mask at each noise level t = 1, ..., 1/`levels`.

    Attributes:
      levels: how many.
      loss_weight: "none" (the released code): a level counts n times the mean over its masked tokens;
        "inv_t" (the paper, equation 25): their sum over t, whose mean over levels bounds log p.
      empty_level: what a level that masks nothing counts, "zero" (the released code, which favours short
        parts: of one token by a half) or nothing ("skip").
    """

    levels: int = 32
    loss_weight: str = "none"
    empty_level: str = "zero"

    def __post_init__(self):
        whole_number("levels", self.levels, 1)
        one_of("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        one_of("empty_level", self.empty_level, EMPTY_LEVELS)

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """The forwards of a part of `count` tokens, those without a masked one left out."""
        masked = level_masks(count, self.levels, rng)
        return _some(masked, level_weights(masked, self.loss_weight, self.empty_level))


@dataclasses.dataclass(frozen=True)
class FixedCounts:
    """LLaDA's evaluator: exactly k tokens are masked, anywhere, and their sum counts n / k.

    Attributes:
      draws: masks; a part of one token has one alone, they would be equal.
      stratum: of so many masks the counts k, k + n/b, ..., wrapped into 1..n, are evenly spread.
    """

    draws: int = 128
    stratum: int = 32

    def __post_init__(self):
        _check_draws(self.draws, self.stratum)

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """The forwards of a part of `count` tokens."""
        stratum = min(self.stratum, self.draws) if count > 1 else 1
        counts = []
        for _ in range(self.draws // stratum if count > 1 else 1):
            first = rng.integers(1, count + 1)
            spread = np.round(np.linspace(first, first + (stratum - 1) * count / stratum, stratum))
            counts.append((spread.astype(np.int64) - 1) % count + 1)
        masked_count = np.concatenate(counts)
        places = rng.permuted(np.tile(np.arange(count), (len(masked_count), 1)), axis=1)
        return _some(places < masked_count[:, None], count / masked_count / len(masked_count))


@dataclasses.dataclass(frozen=True)
class Stratified:
    """Dream's evaluator: tokens are masked with probability p, and their sum counts 1 / p.

    Attributes:
      draws: masks.
      stratum: of so many masks, the times t are one uniform offset + i/b, wrapped into 0..1; p = t but
        for a least of 0.001.
      eos: whether EOS stands behind the text, seen and not scored, where it fits.
    """

    draws: int = 128
    stratum: int = 32
    eos: bool = True

    def __post_init__(self):
        _check_draws(self.draws, self.stratum)

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """The forwards of a part of `count` tokens, those without a masked one left out."""
        stratum = min(self.stratum, self.draws)
        offsets = np.repeat(rng.random(self.draws // stratum), stratum)
        times = (offsets + np.tile(np.arange(stratum) / stratum, self.draws // stratum)) % 1.0
        share = times * (1 - _DREAM_EPS) + _DREAM_EPS
        return _some(rng.random((self.draws, count)) < share[:, None], 1 / share / self.draws)


@dataclasses.dataclass(frozen=True)
class FrontToBack:
    """The chain rule from left to right, all that is still to come being masked: exact, n forwards."""

    def masks(self, count: int, rng: np.random.Generator) -> Masks:
        """The forwards of a part of `count` tokens; nothing is drawn."""
        del rng
        return Masks(np.tri(count, dtype=bool).T, np.eye(count, dtype=bool), np.ones(count))


Estimator = Levels | FixedCounts | Stratified | FrontToBack
ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "levels": Levels,
    "llada": FixedCounts,
    "dream": Stratified,
    "ar_ftb": FrontToBack,
}


def make_estimator(name: str, options: dict[str, Any] | None = None) -> Estimator:
    """An estimator by name.

    Raises:
      InputError: an unknown name, option or value.
    """
    if name not in ESTIMATORS:
        known = f"{', '.join(ESTIMATORS)}, got {name!r}{nearest(name, ESTIMATORS)}"
        raise InputError(f"must be one of {known}", field="scorer")
    return make_options(ESTIMATORS[name], options or {})


def usual_estimator(config: ModelConfig) -> str:
    """The estimator of the models that a checkpoint is one of: LLaDA's, Dream's, or else DiffuLLaMA's."""
    return {"llada": "llada", "qwen2": "dream"}.get(config.family, "levels")


def _some(masked: np.ndarray, weights: np.ndarray) -> Masks:
    """The masks that mask something, with all that is masked scored."""
    kept = masked.any(axis=1)
    return Masks(masked[kept], masked[kept], weights[kept])


def _check_draws(draws: int, stratum: int) -> None:
    whole_number("draws", draws, 1)
    whole_number("stratum", stratum, 1)
    if draws > stratum and draws % stratum:
        raise InputError(f"{stratum} does not divide draws={draws}", field="stratum")
