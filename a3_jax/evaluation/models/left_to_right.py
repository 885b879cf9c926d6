"""A checkpoint under evaluation as the plain left-to-right model: its content stream alone.

It reads what is to the left and nothing else, as the baselines of the paper's tables do: in a blank with
text on both sides it is at a disadvantage by construction.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.errors import InputError
from a3_jax.evaluation.models.decoder import Decoder, check_target, left_rows, total
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank

_NOTHING = np.zeros(0, np.int32)


class LeftToRight(Decoder):
    """An `EvaluatedModel` of the content stream."""

    def __init__(
        self,
        checkpoint,
        generate: dict[str, Any] | None = None,
        dtype: str | None = None,
        batch_size: int | None = None,
    ):
        """A left-to-right model.

        Args:
          checkpoint: of `a3_jax.open_checkpoint`, with a tokenizer.
          generate: of `DECODING_OPTIONS` temperature, filters and seed; greedy by default.
          dtype: as in `GenerateOptions`.
          batch_size: requests a batch at most; None: as many as their rows allow.

        Raises:
          InputError: no tokenizer, or an option that can't be used.
        """
        super().__init__(checkpoint, "ar", generate, dtype, batch_size)

    @property
    def scored_length(self) -> int:
        """Tokens of the longest text that can be scored: of the last one only the law is needed."""
        return self.max_length + 1

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """log p(part | what is to its left) of each, in nats: what is to its right is not read.

        Raises:
          InputError: a text longer than the context, an id outside the vocabulary, or a part that has
            nothing to its left.
        """
        return [total(result) for result in self._left(targets)]

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """[stop - start] float32 of each: log p(token | tokens to its left), in nats."""
        return [result.logprobs for result in self._left(targets)]

    def score_and_greedy(self, targets: Sequence[ScoreTarget]) -> list[tuple[float, bool]]:
        """`score`, and whether each token of the part is the likeliest given those to its left."""
        return [(total(result), bool(result.likeliest.all())) for result in self._left(targets)]

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """[length] int32 tokens of each blank, given its prefix: the suffix is not read.

        Raises:
          InputError: an empty prefix, a text longer than the context, an id outside the vocabulary.
        """
        for blank in blanks:
            if not len(blank.prefix):
                raise InputError("a left-to-right model needs a token before a blank, such as BOS",
                                 field="prefix")  # fmt: skip
        return self._fill([self._request(blank, _NOTHING) for blank in blanks])

    def _left(self, targets):
        for target in targets:
            check_target(target)
            if target.start == 0:
                raise InputError("a left-to-right model scores no first token: put BOS before it",
                                 field="target")  # fmt: skip
            self._check(target.tokens[: target.stop], self.scored_length)
        return self._run([left_rows(target) for target in targets])
