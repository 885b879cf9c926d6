"""A checkpoint under evaluation as the any-order model: query rows score, any strategy fills."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.decoding.scoring import PassRows
from a3_jax.evaluation.models import A3
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.evaluation.models.left_to_right import Decoder, sum_of
from a3_jax.evaluation.models.scorers import describe_scorer, make_scorer


class AnyOrder(Decoder):
    """An `EvaluatedModel` of both streams.

    Attributes:
      scorer: which forwards make up a target's log-probability, one of `scorers`.
    """

    def __init__(
        self,
        checkpoint,
        scorer: str = "chain",
        scorer_options: dict[str, Any] | None = None,
        generate: dict[str, Any] | None = None,
        dtype: str | None = None,
        batch_size: int | None = None,
    ):
        """Makes an any-order model.

        Args:
          checkpoint: from `a3_jax.open_checkpoint`, with a tokenizer.
          scorer, scorer_options: as `scorers.make_scorer` takes them.
          generate: `DECODING_OPTIONS` of `GenerateOptions`; by default one token at a time, from left to
            right, each the likeliest.
          dtype: as in `GenerateOptions`.
          batch_size: the most requests per batch; None: as many as their rows allow.
        """
        super().__init__(checkpoint, A3, generate, dtype, batch_size)
        self._scorer_name, self.scorer = scorer, make_scorer(scorer, scorer_options)

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """Returns the scorer's estimate of log p(part | the rest) of each target, in nats.

        The rest includes what is to the right of the part. The first token of a text without BOS is
        predicted from nothing.
        """
        owners: list[int] = []
        weights: list[float] = []
        rows: list[PassRows] = []
        for index, target in enumerate(targets):
            tokens = np.asarray(target.tokens, np.int32)
            self._check_target(target, tokens)
            column = np.arange(len(tokens), dtype=np.int32)
            has_bos = self.tokenizer.bos_id is not None and tokens[0] == self.tokenizer.bos_id
            for one in self.scorer.passes(target, has_bos):
                owners.append(index)
                weights.append(one.weight)
                rows.append(PassRows(tokens, column, one.ranks, one.scored))
        scores = [0.0] * len(targets)
        for owner, weight, result in zip(owners, weights, self._run(rows), strict=True):
            scores[owner] += weight * sum_of(result)
        return scores

    def score_and_greedy(self, targets: Sequence[ScoreTarget]) -> list[tuple[float, bool]]:
        """Returns `score`, and whether each token of the part is the likeliest given those to its left."""
        left = self._left(targets)
        ends_with_part = all(len(target.tokens) == target.stop for target in targets)
        if self._scorer_name == "chain" and ends_with_part:  # the same passes
            scores = [sum_of(result) for result in left]
        else:
            scores = self.score(targets)
        return [(score, bool(result.likeliest.all())) for score, result in zip(scores, left, strict=True)]

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """Returns the [length] int32 tokens of each blank, given both sides."""
        return self._fill(blanks, [blank.suffix for blank in blanks])

    def describe(self) -> dict[str, Any]:
        """Returns every setting that the numbers depend on: plain JSON."""
        return super().describe() | {"scorer": describe_scorer(self._scorer_name, self.scorer)}
