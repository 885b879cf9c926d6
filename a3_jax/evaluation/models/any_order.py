"""A checkpoint under evaluation as the any-order model: query rows score, any strategy fills."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.decoding.scoring import PassRows
from a3_jax.evaluation.models.decoder import Decoder, check_target, left_rows, total
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.evaluation.models.scorers import describe_scorer, make_scorer


class AnyOrder(Decoder):
    """An `EvaluatedModel` of the two-stream network.

    Attributes:
      scorer: how a target's log-probability is taken, of `scorers`.
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
        """An any-order model.

        Args:
          checkpoint: of `a3_jax.open_checkpoint`, with a tokenizer.
          scorer, scorer_options: of `scorers.make_scorer`.
          generate: `DECODING_OPTIONS` of `GenerateOptions`; by default one token at a time, from left to
            right, the likeliest each.
          dtype: as in `GenerateOptions`.
          batch_size: requests a batch at most; None: as many as their rows allow.

        Raises:
          InputError: no tokenizer, or an option that can't be used.
        """
        super().__init__(checkpoint, "a3", generate, dtype, batch_size)
        self._scorer_name, self.scorer = scorer, make_scorer(scorer, scorer_options)

    def score(self, targets: Sequence[ScoreTarget]) -> list[float]:
        """The scorer's estimate of log p(part | the rest) of each, in nats.

        The rest includes what is to the right of the part. The first token of a text without BOS is
        predicted from nothing.

        Raises:
          InputError: a text longer than the context, an id outside the vocabulary, an empty part.
        """
        owners: list[int] = []
        weights: list[float] = []
        rows: list[PassRows] = []
        for index, target in enumerate(targets):
            check_target(target)
            self._check(target.tokens)
            place, tokens = np.arange(len(target.tokens), dtype=np.int32), np.asarray(target.tokens, np.int32)
            for one in self.scorer.passes(target, self._starts_with_bos(target)):
                owners.append(index)
                weights.append(one.weight)
                rows.append(PassRows(tokens, place, one.ranks, one.scored))
        scores = [0.0] * len(targets)
        for owner, weight, result in zip(owners, weights, self._run(rows), strict=True):
            scores[owner] += weight * total(result)
        return scores

    def token_logprobs(self, targets: Sequence[ScoreTarget]) -> list[np.ndarray]:
        """[stop - start] float32 of each: log p(token | tokens to its left), from query rows, in nats."""
        return [result.logprobs for result in self._left(targets)]

    def score_and_greedy(self, targets: Sequence[ScoreTarget]) -> list[tuple[float, bool]]:
        """`score`, and whether each token of the part is the likeliest given those to its left."""
        left = self._left(targets)
        alone = all(len(target.tokens) == target.stop for target in targets)
        if self._scorer_name == "chain" and alone:  # the same passes
            scores = [total(result) for result in left]
        else:
            scores = self.score(targets)
        greedy = [bool(result.likeliest.all()) for result in left]
        return list(zip(scores, greedy, strict=True))

    def fill(self, blanks: Sequence[TextBlank]) -> list[np.ndarray]:
        """[length] int32 tokens of each blank, given both sides.

        Raises:
          InputError: a text longer than the context, an id outside the vocabulary.
        """
        return self._fill([self._request(blank, blank.suffix) for blank in blanks])

    def describe(self) -> dict[str, Any]:
        """Every setting that its numbers depend on: plain JSON."""
        return super().describe() | {"scorer": describe_scorer(self._scorer_name, self.scorer)}

    def _left(self, targets):
        for target in targets:
            check_target(target)
            self._check(target.tokens[: target.stop])
        return self._run([left_rows(target) for target in targets])

    def _starts_with_bos(self, target: ScoreTarget) -> bool:
        return self.tokenizer.bos_id is not None and target.tokens[0] == self.tokenizer.bos_id
