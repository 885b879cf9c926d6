"""What a task asks of a model: to score a part of a text, or to fill a blank in one.

A request carries its own seed, so that what a model draws for it depends neither on the batch it runs in
nor on what ran before: a run that goes on after a stop gives the same numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from a3_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreTarget:
    """Tokens of which a contiguous part is scored, given all the others.

        tokens  Question : ... Answer :  by train .     start = 9, stop = 12

    Attributes:
      tokens: [T] int32, special tokens included.
      start, stop: the scored part is tokens[start:stop]; never empty.
      seed: of what an estimator draws.
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
      length: blank tokens between them, at least 1.
      seed: of what is drawn.
    """

    prefix: np.ndarray
    suffix: np.ndarray
    length: int
    seed: int = 0

    def __len__(self):
        return len(self.prefix) + self.length + len(self.suffix)


class EvaluatedModel(Protocol):
    """A model under evaluation. Requests come in any order and are batched by the model, by length.

    Attributes:
      tokenizer: of its checkpoint.
      max_length: the longest text in tokens, special tokens included; callers skip and count longer ones.
    """

    tokenizer: Tokenizer
    max_length: int

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """log p(target part | the rest) of each in nats, or the model's estimate of it."""
        ...

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """[stop - start] float32 of each: exact log p(token | tokens to its left), in nats.

        Raises:
          InputError: a model that knows no exact left-to-right conditionals.
        """
        ...

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """The [length] int32 tokens of each blank."""
        ...

    def describe(self) -> dict[str, Any]:
        """Every setting that its numbers depend on, for the result file: plain JSON."""
        ...
