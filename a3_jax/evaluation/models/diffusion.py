"""A masked-diffusion checkpoint under evaluation: LLaDA, Dream, DiffuLLaMA, DiffuGPT, or one trained here."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.errors import InputError
from a3_jax.evaluation.models import DIFFUSION
from a3_jax.evaluation.models.diffusion_forward import run_masks
from a3_jax.evaluation.models.diffusion_sampler import Sampler, fill_blanks, make_sampler, usual_sampler
from a3_jax.evaluation.models.interface import CheckpointModel, ScoreTarget, TextBlank
from a3_jax.evaluation.models.scorers import (
    FrontToBack,
    Stratified,
    describe_scorer,
    make_estimator,
    usual_estimator,
)


class MaskedDiffusion(CheckpointModel):
    """An `EvaluatedModel` of the content rows, each of which sees the whole text.

    Attributes:
      estimator: how a part is scored, one of `scorers.ESTIMATORS`.
      sampler: how blanks are filled, of `diffusion_sampler`.
    """

    def __init__(
        self,
        checkpoint,
        estimator: str | None = None,
        estimator_options: dict[str, Any] | None = None,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        dtype: str | None = None,
        batch_size: int | None = None,
    ):
        """Makes a masked-diffusion model.

        Args:
          checkpoint: from `open_checkpoint`, with a tokenizer and a mask token.
          estimator, estimator_options: as `make_estimator` takes them; None: that of the model's family.
          sampler, sampler_options: as `make_sampler` takes them; None: that of the model's family.
          dtype: "float32" or "bfloat16"; None: float32 on CPU, bfloat16 on accelerators.
          batch_size: the most forwards per batch; None: as many as their rows allow.
        """
        config = checkpoint.config
        super().__init__(checkpoint, config.max_length, dtype, batch_size)
        if config.mask_token is None:
            message = "the checkpoint has no mask token (mask_token_id in config.json)"
            raise InputError(message, field="checkpoint")
        self._estimator_name = estimator or usual_estimator(config)
        self.estimator = make_estimator(self._estimator_name, estimator_options)
        self.sampler = make_sampler(sampler or usual_sampler(config), sampler_options)

    def with_generate(self, sampler: str | None = None, **options: Any) -> Self:
        """Returns the same model with another sampler, or with some of its options changed."""
        other, now = copy.copy(self), dataclasses.asdict(self.sampler)
        name = now.pop("name")
        other.sampler = make_sampler(sampler or name, options if sampler else {**now, **options})
        return other

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """Returns the estimate of log p(part | the rest) of each target, in nats, by its seed."""
        for target in targets:
            self._check_target(target, np.asarray(target.tokens))
        if isinstance(self.estimator, Stratified) and self.estimator.eos:
            targets = [self._with_eos(target) for target in targets]
        return [total for total, _ in self._run(targets)]

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """Returns [stop - start] float32: log p(token | tokens to its left), as many masked to its right."""
        if not isinstance(self.estimator, FrontToBack):
            why = f"{self._estimator_name!r} gives no exact left-to-right log-probabilities: 'ar_ftb' does"
            raise InputError(why, field="scorer")
        for target in targets:
            self._check_target(target, np.asarray(target.tokens))
        left = [dataclasses.replace(target, tokens=target.tokens[: target.stop]) for target in targets]
        return [by_token.astype(np.float32) for _, by_token in self._run(left)]

    def score_and_greedy(self, targets: Sequence[ScoreTarget]) -> list[tuple[float, bool]]:
        """Returns `score`, and whether LLaDA's evaluator fills in the part: token by token, surest first."""
        scores = self.score(targets)
        blanks = [
            TextBlank(one.tokens[: one.start], one.tokens[one.stop :], one.stop - one.start, one.seed)
            for one in targets
        ]
        return [
            (score, bool(np.array_equal(tokens, target.tokens[target.start : target.stop])))
            for score, tokens, target in zip(
                scores, self._fill(blanks, Sampler("low_confidence")), targets, strict=True
            )
        ]

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """Returns the [length] int32 tokens of each blank, given both sides."""
        for blank in blanks:
            self._check_blank(blank, blank.suffix)
        return self._fill(blanks, self.sampler)

    def describe(self) -> dict[str, Any]:
        """Returns every setting that the numbers depend on: plain JSON."""
        config = self.checkpoint.config
        return {
            "model": DIFFUSION,
            "family": config.family,
            "mask_token": config.mask_token,
            "logit_shift": config.logit_shift,
            "scorer": describe_scorer(self._estimator_name, self.estimator),
            "sampler": dataclasses.asdict(self.sampler),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }

    def _run(self, targets):
        def masks_of(index):
            target = targets[index]
            return self.estimator.masks(target.stop - target.start, np.random.default_rng(target.seed))

        return run_masks(self.checkpoint, targets, masks_of, dtype=self.dtype, most=self.batch_size)

    def _fill(self, blanks, sampler):
        config = self.checkpoint.config
        filled = fill_blanks(self._params, config, blanks, sampler, self.dtype, self.batch_size)
        return [one.tokens for one in filled]

    def _with_eos(self, target: ScoreTarget) -> ScoreTarget:
        if self.tokenizer.eos_id is None or len(target.tokens) >= self.max_length:
            return target
        return dataclasses.replace(target, tokens=np.append(target.tokens, np.int32(self.tokenizer.eos_id)))

    @functools.cached_property
    def _params(self):
        """The parameters in the dtype of the computation, cast once for all blanks."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), self.checkpoint.params)
