"""What the two ways to read a checkpoint, any order and left to right, have in common under evaluation."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from a3_jax.decoding.batched_decode import BlankRequest, DecodeRequest, decoding_params, fill
from a3_jax.decoding.batching import bucket, length_bucket, padded_count
from a3_jax.decoding.generation import context_of
from a3_jax.decoding.options import GenerateOptions, make_options, one_of, whole_number
from a3_jax.decoding.scoring import PassRows, PassScores, run_passes
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.model.two_stream import default_dtype
from a3_jax.tokenizer import Tokenizer

MODELS = ("a3", "ar")
_FEWEST_QUERIES = 8  # of a bucket of scored tokens
_NOT_FOR_TASKS = ("model", "dtype", "bos", "num_samples", "rerank", "stop_at_eos", "no_blanks")
_ALL_OPTIONS = tuple(field.name for field in dataclasses.fields(GenerateOptions))
DECODING_OPTIONS = tuple(name for name in _ALL_OPTIONS if name not in _NOT_FOR_TASKS)


class Decoder:
    """A checkpoint with its settings, which runs passes and fills blanks in batches.

    Attributes:
      checkpoint: of `a3_jax.open_checkpoint`.
      tokenizer: its own.
      max_length: tokens of the longest text that the model reads exactly.
      dtype: of the computation, by name.
      batch_size: requests a batch at most, or None: as many as their rows allow.
      options: how blanks are filled, `DECODING_OPTIONS` of it.
    """

    def __init__(self, checkpoint, model: str, generate, dtype: str | None, batch_size: int | None):
        one_of("model", model, MODELS)
        if checkpoint.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, which every task needs", field="checkpoint")
        if batch_size is not None:
            whole_number("batch_size", batch_size, 1)
        self.checkpoint, self.model, self.batch_size = checkpoint, model, batch_size
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.max_length: int = checkpoint.config.context_length(model == "ar")
        self.dtype = dtype or default_dtype()
        self.options = self._options({"group_size": 1}, generate or {})

    def with_generate(self, **generate: Any) -> Self:
        """The same model with some decoding options changed; the parameters are shared.

        Raises:
          InputError: an unknown option, a bad value, or options that contradict each other.
        """
        other = copy.copy(self)
        other.options = self._options(dataclasses.asdict(self.options), generate)
        return other

    def describe(self) -> dict[str, Any]:
        """Every setting that its numbers depend on: plain JSON."""
        options = dataclasses.asdict(self.options)
        return {
            "model": self.model,
            "generate": {name: options[name] for name in DECODING_OPTIONS},
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }

    def _options(self, defaults: dict[str, Any], generate: dict[str, Any]) -> GenerateOptions:
        for name in generate:
            if name not in DECODING_OPTIONS:
                known = nearest(name, DECODING_OPTIONS)
                raise InputError(f"no option of how a task's blanks are filled{known}", field=name)
        fixed = {"model": self.model, "dtype": self.dtype}
        options = make_options(GenerateOptions, {**defaults, **generate, **fixed})
        return dataclasses.replace(options, context=context_of(self.checkpoint, options))

    def _run(self, passes: Sequence[PassRows]) -> list[PassScores]:
        """The passes' scores, in their order."""
        scores: list[PassScores | None] = [None] * len(passes)
        results = run_passes(
            self.checkpoint, passes, _shape_of, lambda rows: rows,
            model=self.model, dtype=self.dtype, most=self.batch_size, padded_count=padded_count,
        )  # fmt: skip
        for index, result in results:
            scores[index] = result
        return [score for score in scores if score is not None]

    def _fill(self, requests: Sequence[BlankRequest]) -> list[np.ndarray]:
        """[n] int32 tokens of each request's n blanks; EOS is a token like any other."""
        context = self.options.context or "flat"
        tasks = [DecodeRequest(request, 0, context, self.options) for request in requests]
        results = fill(
            self._decoding_params, self.checkpoint.config, tasks, self.options, (), self.batch_size
        )
        return [
            result["tokens"][: len(request.blank)][request.blank]
            for request, result in zip(requests, results, strict=True)
        ]

    def _request(self, blank: TextBlank, suffix: np.ndarray) -> BlankRequest:
        """A blank as the decoding engine takes it; its seed is what its randomness is a function of."""
        whole_number("length", blank.length, 1)
        tokens = np.concatenate([blank.prefix, np.zeros(blank.length, np.int32), suffix]).astype(np.int32)
        place = np.arange(len(tokens)) - len(blank.prefix)
        self._check(tokens)
        return BlankRequest(blank.seed, tokens, (place >= 0) & (place < blank.length), None)

    def _check(self, tokens: np.ndarray, most: int | None = None) -> None:
        """Refuses a text that the model can't read."""
        most = self.max_length if most is None else most
        if len(tokens) > most:
            raise InputError(f"{len(tokens)} tokens, the model's context is {most}", field="tokens")
        size = self.checkpoint.config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= size)]
        if outside.size:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {size}", field="tokens")

    @functools.cached_property
    def _decoding_params(self):
        """Cast and laid out for decoding, once for all blanks."""
        return decoding_params(self.checkpoint.params, self.checkpoint.config, self.options)


def check_target(target: ScoreTarget) -> None:
    """Refuses a target whose part is empty or not in its text."""
    if not 0 <= target.start < target.stop <= len(target.tokens):
        part = f"{target.start}:{target.stop} of {len(target.tokens)}"
        raise InputError(f"tokens {part} are no part of the text", field="target")


def left_rows(target: ScoreTarget) -> PassRows:
    """The tokens up to the target's end in reading order, its part scored; what follows has no row."""
    place = np.arange(target.stop, dtype=np.int32)
    return PassRows(np.asarray(target.tokens[: target.stop], np.int32), place, place, place >= target.start)


def total(scores: PassScores) -> float:
    """The sum of a pass's log-probabilities, taken in float64, in nats."""
    return float(np.sum(scores.logprobs, dtype=np.float64))


def _shape_of(rows: PassRows) -> tuple[int, int]:
    return length_bucket(len(rows.tokens)), bucket(int(rows.scored.sum()), _FEWEST_QUERIES)
