"""A two-stream checkpoint under evaluation, and its content stream alone as the left-to-right model.

`LeftToRight` reads what is to the left and nothing else, as the baselines of the paper's tables do: in a
blank with text on both sides it is at a disadvantage by construction.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from a3_jax.decoding.batched_decode import BlankRequest, DecodeRequest, decoding_params, fill
from a3_jax.decoding.batching import bucket, length_bucket, padded_count
from a3_jax.decoding.generation import context_of
from a3_jax.decoding.options import GenerateOptions, make_options
from a3_jax.decoding.scoring import PassRows, PassScores, run_passes
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.models import AR
from a3_jax.evaluation.models.interface import NO_TOKENS, CheckpointModel, ScoreTarget, TextBlank

_FEWEST_QUERIES = 8  # of a bucket of scored tokens
_NOT_FOR_TASKS = ("model", "dtype", "bos", "num_samples", "rerank", "stop_at_eos", "no_blanks")
_ALL_OPTIONS = tuple(field.name for field in dataclasses.fields(GenerateOptions))
DECODING_OPTIONS = tuple(name for name in _ALL_OPTIONS if name not in _NOT_FOR_TASKS)


class Decoder(CheckpointModel):
    """A two-stream checkpoint that runs passes and fills blanks in batches; read in one of two ways.

    Attributes:
      model: "a3" or "ar".
      options: how blanks are filled, its `DECODING_OPTIONS`.
    """

    def __init__(self, checkpoint, model: str, generate, dtype: str | None, batch_size: int | None):
        super().__init__(checkpoint, checkpoint.config.context_length(model == AR), dtype, batch_size)
        self.model = model
        self.options = self._options({"group_size": 1}, generate or {})

    def with_generate(self, **generate: Any) -> Self:
        """Returns the same model with some decoding options changed; the parameters are shared."""
        other = copy.copy(self)
        other.options = self._options(dataclasses.asdict(self.options), generate)
        return other

    def describe(self) -> dict[str, Any]:
        """Returns every setting that the numbers depend on: plain JSON."""
        options = dataclasses.asdict(self.options)
        return {
            "model": self.model,
            "generate": {name: options[name] for name in DECODING_OPTIONS},
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """Returns for each target [stop - start] float32: log p(token | tokens to its left), in nats."""
        return [result.logprobs for result in self._left(targets)]

    def _options(self, defaults: dict[str, Any], generate: dict[str, Any]) -> GenerateOptions:
        for name in generate:
            if name not in DECODING_OPTIONS:
                known = nearest(name, DECODING_OPTIONS)
                raise InputError(f"no option of how a task's blanks are filled{known}", field=name)
        fixed = {"model": self.model, "dtype": self.dtype}
        options = make_options(GenerateOptions, {**defaults, **generate, **fixed})
        return dataclasses.replace(options, context=context_of(self.checkpoint, options))

    def _left(self, targets: Sequence[ScoreTarget]) -> list[PassScores]:
        """Scores each part from the tokens to its left; what follows the part has no row."""
        passes = []
        for target in targets:
            tokens = np.asarray(target.tokens[: target.stop], np.int32)
            self._check_target(target, tokens)
            column = np.arange(target.stop, dtype=np.int32)
            passes.append(PassRows(tokens, column, column, column >= target.start))
        return self._run(passes)

    def _run(self, passes: Sequence[PassRows]) -> list[PassScores]:
        """Returns the scores of the passes, in their order."""
        results = run_passes(
            self.checkpoint, passes, _shape_of, lambda rows: rows,
            model=self.model, dtype=self.dtype, most=self.batch_size, padded_count=padded_count,
        )  # fmt: skip
        scores = dict(results)
        return [scores[index] for index in range(len(passes))]

    def _fill(self, blanks: Sequence[TextBlank], suffixes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Fills the blank between each prefix and `suffixes`; EOS is a token like any other."""
        context, requests = self.options.context or "flat", []
        for blank, suffix in zip(blanks, suffixes, strict=True):
            self._check_blank(blank, suffix)
            tokens = np.concatenate([blank.prefix, np.zeros(blank.length), suffix]).astype(np.int32)
            column = np.arange(len(tokens)) - len(blank.prefix)
            # The request's number is what its randomness is a function of: here the blank's own seed.
            request = BlankRequest(blank.seed, tokens, (column >= 0) & (column < blank.length), None)
            requests.append(DecodeRequest(request, 0, context, self.options))
        config = self.checkpoint.config
        results = fill(self._decoding_params, config, requests, self.options, (), self.batch_size)
        return [
            result["tokens"][len(blank.prefix) :][: blank.length]
            for blank, result in zip(blanks, results, strict=True)
        ]

    @functools.cached_property
    def _decoding_params(self):
        """The parameters, cast and laid out for decoding once for all blanks."""
        return decoding_params(self.checkpoint.params, self.checkpoint.config, self.options)


class LeftToRight(Decoder):
    """An `EvaluatedModel` of the content stream."""

    def __init__(
        self,
        checkpoint,
        generate: dict[str, Any] | None = None,
        dtype: str | None = None,
        batch_size: int | None = None,
    ):
        """Makes a left-to-right model.

        Args:
          checkpoint: from `a3_jax.open_checkpoint`, with a tokenizer.
          generate: temperature, filters and seed of `DECODING_OPTIONS`; greedy by default.
          dtype: as in `GenerateOptions`.
          batch_size: the most requests per batch; None: as many as their rows allow.
        """
        super().__init__(checkpoint, AR, generate, dtype, batch_size)

    @property
    def scored_length(self) -> int:
        """One more than `max_length`: the last token is only predicted, never read."""
        return self.max_length + 1

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """Returns log p(part | what is to its left) of each, in nats; what is to its right is not read.

        Raises:
          InputError: also for a part that has nothing to its left.
        """
        return [sum_of(result) for result in self._left(targets)]

    def score_and_greedy(self, targets: Sequence[ScoreTarget]) -> list[tuple[float, bool]]:
        """Returns `score`, and whether each token of the part is the likeliest given those to its left."""
        return [(sum_of(result), bool(result.likeliest.all())) for result in self._left(targets)]

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """Returns the [length] int32 tokens of each blank, given its prefix; the suffix is not read."""
        for blank in blanks:
            if not len(blank.prefix):
                raise InputError("a left-to-right model needs a token before a blank, such as BOS",
                                 field="prefix")  # fmt: skip
        return self._fill(blanks, [NO_TOKENS] * len(blanks))

    def _check_target(self, target: ScoreTarget, tokens: np.ndarray) -> None:
        super()._check_target(target, tokens)
        if target.start == 0:
            raise InputError("a left-to-right model scores no first token: put BOS before it", field="target")


def sum_of(scores: PassScores) -> float:
    """Returns the sum of a pass's log-probabilities, taken in float64, in nats."""
    return float(np.sum(scores.logprobs, dtype=np.float64))


def _shape_of(rows: PassRows) -> tuple[int, int]:
    return length_bucket(len(rows.tokens)), bucket(int(rows.scored.sum()), _FEWEST_QUERIES)
