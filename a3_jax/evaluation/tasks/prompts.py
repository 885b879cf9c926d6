"""What perplexity is measured on: beginnings of Pile documents to go on from, or nothing at all."""

import dataclasses
import heapq
from collections.abc import Iterable

import numpy as np

from a3_jax.borders import whole_text
from a3_jax.errors import InputError
from a3_jax.evaluation.models.interface import TextBlank
from a3_jax.evaluation.tasks.examples import derived_seed
from a3_jax.evaluation.tasks.files import DataRow
from a3_jax.evaluation.tasks.profiles import PileSettings
from a3_jax.tokenizer import Tokenizer

_CHARACTERS_A_TOKEN = 32  # a text is cut far behind the tokens that are looked at: books are long


@dataclasses.dataclass(frozen=True, eq=False)
class PromptExample:
    """The beginning of a document.

    Attributes:
      row: the document's number in its files, from 1.
      text: of the prompt, without a last character that the evaluator's tokens hold only in part.
      tokens: [P] int32 of the evaluated model, BOS first where its tokenizer adds one.
      seed: of what goes on from it.
    """

    row: int
    text: str
    tokens: np.ndarray
    seed: int

    def blank(self, length: int) -> TextBlank:
        """The rest of a text of `length` tokens, this prompt included.

        Raises:
          InputError: the prompt alone has as many.
        """
        if length <= len(self.tokens):
            message = f"{length} tokens are no more than the prompt of row {self.row}, {len(self.tokens)}"
            raise InputError(message, field="pile.lengths")
        return TextBlank(self.tokens, np.zeros(0, np.int32), length - len(self.tokens), self.seed)


def pile_prompts(
    rows: Iterable[DataRow], tokenizer: Tokenizer, evaluator: Tokenizer, settings: PileSettings, seed: int = 0
) -> list[PromptExample]:
    """The first `settings.prompt` evaluator tokens of documents that are long enough, drawn by seed.

    Every document gets a number from (seed, row); of those with at least `settings.min_tokens` evaluator
    tokens, the `settings.samples` with the smallest numbers are taken, in the order of the file. So which
    ones they are does not depend on the evaluated model. Documents are encoded only while they could
    still be among them.

    Raises:
      InputError: fewer documents than wanted are long enough.
    """
    kept: list[tuple[int, int, str]] = []  # a heap: (-draw, -row, prompt)
    for number, row in enumerate(rows, start=1):
        draw = derived_seed(seed, number)
        if len(kept) == settings.samples and -draw <= kept[0][0]:
            continue
        text = row.values["text"][: settings.min_tokens * _CHARACTERS_A_TOKEN]
        ((tokens, offsets),) = evaluator.encode_with_offsets([text])
        if len(tokens) >= settings.min_tokens:
            entry = (-draw, -number, whole_text(text, offsets, settings.prompt))
            (heapq.heappushpop if len(kept) == settings.samples else heapq.heappush)(kept, entry)
    if len(kept) < settings.samples:
        wanted = f"{settings.samples} documents of {settings.min_tokens} tokens"
        message = f"{wanted} are wanted, {len(kept)} are there"
        raise InputError(message, field="pile.samples")
    chosen = sorted((-number, text) for _, number, text in kept)
    return [
        PromptExample(number, text, np.asarray(tokenizer.encode(text), np.int32), derived_seed(seed, number))
        for number, text in chosen
    ]


def unconditional_blanks(tokenizer: Tokenizer, length: int, samples: int, seed: int = 0) -> list[TextBlank]:
    """Blanks of whole texts of `length` tokens, BOS included; of EOS where a tokenizer has no BOS.

    Raises:
      InputError: a tokenizer with neither.
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise InputError("the tokenizer has neither BOS nor EOS, and a text must begin with one")
    if length < 2 or samples < 1:
        raise InputError(f"{samples} texts of {length} tokens, BOS included, hold nothing to write")
    prefix, nothing = np.asarray([first], np.int32), np.zeros(0, np.int32)
    return [TextBlank(prefix, nothing, length - 1, derived_seed(seed, number)) for number in range(samples)]
