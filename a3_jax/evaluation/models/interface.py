"""What a task asks of a model: to score a part of a text, or to fill a blank in one.

A request carries its own seed, so that what a model draws for it depends neither on its batch nor on what
ran before: an interrupted run that continues gives the same numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from a3_jax.checks import one_of, whole_number
from a3_jax.decoding.options import DTYPES
from a3_jax.errors import InputError
from a3_jax.model.two_stream import default_dtype
from a3_jax.tokenizer import Tokenizer

NO_TOKENS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreTarget:
    """Tokens of which a contiguous part is scored, given all the others.

        tokens  Question : ... Answer :  by train .     start = 9, stop = 12

    Attributes:
      tokens: [T] int32, special tokens included.
      start, stop: the scored part is tokens[start:stop]; never empty.
      seed: seed of what an estimator draws.
    """

    tokens: np.ndarray
    start: int
    stop: int
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TextBlank:
    """A text with one blank in it.

    Attributes:
      prefix, suffix: [P], [S] int32, special tokens included; the suffix may be empty.
      length: number of blank tokens between them, at least 1.
      seed: seed of what is drawn.
    """

    prefix: np.ndarray
    suffix: np.ndarray
    length: int
    seed: int = 0

    def __len__(self):
        return len(self.prefix) + self.length + len(self.suffix)


class EvaluatedModel(Protocol):
    """A model under evaluation. Requests come in any order; the model batches them by length.

    Attributes:
      tokenizer: its checkpoint's.
      max_length: the longest text in tokens, special tokens included; callers skip and count longer ones.
    """

    tokenizer: Tokenizer
    max_length: int

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """Returns log p(part | the rest) of each target in nats, or the model's estimate of it."""
        ...

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """Returns [stop - start] float32 of each target: exact log p(token | tokens to its left), in nats."""
        ...

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """Returns the [length] int32 tokens of each blank."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns every setting that the numbers depend on, for the result file: plain JSON."""
        ...


class CheckpointModel:
    """What the models made of a checkpoint share: settings, and checks of requests.

    Attributes:
      checkpoint: from `open_checkpoint`, with a tokenizer.
      tokenizer: the checkpoint's.
      max_length: number of tokens of the longest text that the model reads exactly.
      dtype: dtype of the computation, by name.
      batch_size: the most forwards per batch, or None: as many as their rows allow.
    """

    def __init__(self, checkpoint, max_length: int, dtype: str | None, batch_size: int | None):
        if checkpoint.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, which every task needs", field="checkpoint")
        if dtype is not None:
            one_of("dtype", dtype, DTYPES)
        if batch_size is not None:
            whole_number("batch_size", batch_size, 1)
        self.checkpoint, self.dtype, self.batch_size = checkpoint, dtype or default_dtype(), batch_size
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.max_length = max_length

    @property
    def scored_length(self) -> int:
        """Number of tokens of the longest text that can be scored."""
        return self.max_length

    def _check_target(self, target: ScoreTarget, tokens: np.ndarray) -> None:
        """Refuses a target whose part is empty or outside its text, and `tokens` that can't be scored."""
        if not 0 <= target.start < target.stop <= len(target.tokens):
            part = f"{target.start}:{target.stop} of {len(target.tokens)}"
            raise InputError(f"tokens {part} are no part of the text", field="target")
        self._check_tokens(tokens, len(tokens), self.scored_length)

    def _check_blank(self, blank: TextBlank, suffix: np.ndarray) -> None:
        """Refuses a blank that is empty, or that the model can't read between its prefix and `suffix`."""
        whole_number("length", blank.length, 1)
        given = np.concatenate([blank.prefix, suffix])
        self._check_tokens(given, len(given) + blank.length, self.max_length)

    def _check_tokens(self, tokens: np.ndarray, length: int, longest: int) -> None:
        if length > longest:
            raise InputError(f"{length} tokens, the model's context is {longest}", field="tokens")
        size = self.checkpoint.config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= size)]
        if outside.size:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {size}", field="tokens")
