"""A masked-diffusion checkpoint under evaluation: LLaDA, Dream, DiffuLLaMA, DiffuGPT, or one trained here."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.options import DTYPES, one_of, whole_number
from a3_jax.errors import InputError
from a3_jax.evaluation.models.diffusion_forward import run_masks
from a3_jax.evaluation.models.diffusion_sampler import Sampler, fill_blanks, make_sampler, usual_sampler
from a3_jax.evaluation.models.estimators import (
    FrontToBack,
    Stratified,
    make_estimator,
    usual_estimator,
)
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.model.two_stream import default_dtype
from a3_jax.tokenizer import Tokenizer

_NOTHING = np.zeros(0, np.int32)


class MaskedDiffusion:
    """An `EvaluatedModel` of the content rows, each of which sees the whole text.

    Attributes:
      checkpoint: of `open_checkpoint`.
      tokenizer: its own.
      max_length: tokens of the longest text.
      dtype: of the computation, by name.
      batch_size: forwards of a batch at most, or None: as many as their rows allow.
      estimator: of `masked_diffusion_estimators`.
      sampler: of `masked_diffusion_sampler`.
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
        """A masked-diffusion model.

        Args:
          checkpoint: of `open_checkpoint`, with a tokenizer and a mask token.
          estimator, estimator_options: of `make_estimator`; None: that of the model's family.
          sampler, sampler_options: of `make_sampler`; None: that of the model's family.
          dtype: "float32" or "bfloat16"; None: float32 on CPU, bfloat16 on accelerators.
          batch_size: forwards of a batch at most; None: as many as their rows allow.

        Raises:
          InputError: no tokenizer, no mask token, or an option that can't be used.
        """
        config = checkpoint.config
        if checkpoint.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, which every task needs", field="checkpoint")
        if config.mask_token is None:
            raise InputError(
                "the checkpoint has no mask token (mask_token_id in config.json)", field="checkpoint"
            )
        if dtype is not None:
            one_of("dtype", dtype, DTYPES)
        if batch_size is not None:
            whole_number("batch_size", batch_size, 1)
        self.checkpoint, self.batch_size, self.dtype = checkpoint, batch_size, dtype or default_dtype()
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.max_length: int = config.max_length
        self._estimator_name = estimator or usual_estimator(config)
        self.estimator = make_estimator(self._estimator_name, estimator_options)
        self.sampler = make_sampler(sampler or usual_sampler(config), sampler_options)

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows, the mask token's among them."""
        return self.checkpoint.config.vocab_size

    def with_generate(self, sampler: str | None = None, **options: Any) -> Self:
        """The same model with another sampler, or with some of its options changed.

        Raises:
          InputError: an unknown name or option, or a bad value.
        """
        other, now = copy.copy(self), dataclasses.asdict(self.sampler)
        name = now.pop("name")
        other.sampler = make_sampler(sampler or name, options if sampler else {**now, **options})
        return other

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """The estimate of log p(part | the rest) of each, in nats; what is drawn follows from its seed.

        Raises:
          InputError: a text longer than the context, an id outside the vocabulary, an empty part.
        """
        for target in targets:
            self._check(target)
        if isinstance(self.estimator, Stratified) and self.estimator.eos:
            targets = [self._with_eos(target) for target in targets]
        return [total for total, _ in self._run(targets, self.estimator)]

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """[stop - start] float32 of each: log p(token | tokens to its left) with as many masked behind.

        Raises:
          InputError: another estimator than "ar_ftb".
        """
        if not isinstance(self.estimator, FrontToBack):
            why = f"{self._estimator_name!r} gives no exact left-to-right log-probabilities: 'ar_ftb' does"
            raise InputError(why, field="scorer")
        for target in targets:
            self._check(target)
        left = [dataclasses.replace(target, tokens=target.tokens[: target.stop]) for target in targets]
        return [by_token.astype(np.float32) for _, by_token in self._run(left, self.estimator)]

    def score_and_greedy(self, targets: Sequence[ScoreTarget]) -> list[tuple[float, bool]]:
        """`score`, and whether the part is what LLaDA's evaluator fills in: the surest token at a time."""
        scores = self.score(targets)
        filled = self._fill([_as_blank(target) for target in targets], Sampler("low_confidence"))
        return [
            (score, bool(np.array_equal(tokens, target.tokens[target.start : target.stop])))
            for score, tokens, target in zip(scores, filled, targets, strict=True)
        ]

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """[length] int32 tokens of each blank, given both sides.

        Raises:
          InputError: a text longer than the context, an id outside the vocabulary.
        """
        for blank in blanks:
            whole_number("length", blank.length, 1)
            self._check_tokens(blank.prefix, len(blank))
            self._check_tokens(blank.suffix, len(blank))
        return self._fill(blanks, self.sampler)

    def describe(self) -> dict[str, Any]:
        """Every setting that its numbers depend on: plain JSON."""
        config = self.checkpoint.config
        return {
            "model": "masked_diffusion",
            "family": config.family,
            "mask_token": config.mask_token,
            "logit_shift": config.logit_shift,
            "scorer": {"name": self._estimator_name, **dataclasses.asdict(self.estimator)},
            "sampler": dataclasses.asdict(self.sampler),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }

    def _run(self, targets, estimator):
        def masks_of(index):
            target = targets[index]
            return estimator.masks(target.stop - target.start, np.random.default_rng(target.seed))

        return run_masks(self.checkpoint, targets, masks_of, dtype=self.dtype, most=self.batch_size)

    def _fill(self, blanks, sampler):
        config = self.checkpoint.config
        filled = fill_blanks(self._params, config, blanks, sampler, self.dtype, self.batch_size)
        return [one.tokens for one in filled]

    def _with_eos(self, target: ScoreTarget) -> ScoreTarget:
        if self.tokenizer.eos_id is None or len(target.tokens) >= self.max_length:
            return target
        return dataclasses.replace(target, tokens=np.append(target.tokens, np.int32(self.tokenizer.eos_id)))

    def _check(self, target: ScoreTarget) -> None:
        if not 0 <= target.start < target.stop <= len(target.tokens):
            part = f"{target.start}:{target.stop} of {len(target.tokens)}"
            raise InputError(f"tokens {part} are no part of the text", field="target")
        self._check_tokens(target.tokens, len(target.tokens))

    def _check_tokens(self, tokens, length: int) -> None:
        if length > self.max_length:
            raise InputError(f"{length} tokens, the model's context is {self.max_length}", field="tokens")
        tokens = np.asarray(tokens)
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if outside.size:
            raise InputError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}", field="tokens"
            )

    @functools.cached_property
    def _params(self):
        """In the dtype of the computation, once for all blanks."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), self.checkpoint.params)


def _as_blank(target: ScoreTarget) -> TextBlank:
    suffix = target.tokens[target.stop :] if target.stop < len(target.tokens) else _NOTHING
    return TextBlank(target.tokens[: target.start], suffix, target.stop - target.start, target.seed)
