"""Documents to token ids and roles.

text      BOS? t t t t t t EOS?
dialog    BOS? given ... | predicted ... EOS | filler: EOS EOS EOS
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.borders import predicted_tokens
from a3_jax.checks import one_of
from a3_jax.data.dialogs import Part
from a3_jax.data.documents import BadRecord
from a3_jax.data.table import FILLER, GIVEN, PREDICTED
from a3_jax.errors import InputError
from a3_jax.paths import as_path, read_json
from a3_jax.tokenizer import Tokenizer

EOS_POLICIES = ("auto", "yes", "no")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A record that can be used.

    Attributes:
      source, number: where it is, see `documents.DocumentSource`.
      digest: of what it holds; equal for equal documents.
      content: its text, or the parts of a dialog.
      ignored: names of a dialog's fields that nothing reads.
    """

    source: int
    number: int
    digest: int
    content: str | list[Part]
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A document in tokens.

    Attributes:
      tokens: [n] int32. roles: [n] uint8 of a dialog's, else None.
      is_cut: whether some did not fit.
    """

    document: Document
    tokens: np.ndarray
    roles: np.ndarray | None = None
    is_cut: bool = False


class Encoder:
    """What is put around the tokens of a text.

    Attributes:
      tokenizer: makes the ids.
      bos, eos: token lists, of one or none, in front of a document and behind it.
      seq_len: a dialog is cut there. filler: a response is filled up to a multiple of it.
      rows: token ids are below it; None: any.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, bos: str, eos: str, seq_len: int, filler: int, rows: int | None = None
    ):
        one_of("eos", eos, EOS_POLICIES)
        if eos == "yes" and not tokenizer.eos_ids:
            raise InputError("the tokenizer has no EOS token", field="eos")
        self.tokenizer, self.seq_len, self.filler, self.rows = tokenizer, seq_len, filler, rows
        self.bos = tokenizer.encode("", bos)
        self.eos = [] if eos == "no" else [*tokenizer.eos_ids[:1]]

    def encode(self, items: Sequence[Document | BadRecord]) -> list[Encoded | BadRecord]:
        """Documents in tokens, in their order; a `BadRecord` in place of each that can't be encoded."""
        documents = [item for item in items if isinstance(item, Document)]
        texts = [document.content for document in documents if isinstance(document.content, str)]
        ids = iter(self._ids(texts))
        return [
            self._checked(self._encoded(item, ids)) if isinstance(item, Document) else item for item in items
        ]

    def _checked(self, item: Encoded | BadRecord) -> Encoded | BadRecord:
        """Returns the same, or a `BadRecord` if the model has no embedding for one of the tokens."""
        if self.rows is None or isinstance(item, BadRecord) or item.tokens.max() < self.rows:
            return item
        token = int(item.tokens[item.tokens >= self.rows][0])
        name = self.tokenizer.token_text(token)
        message = f"token id {token} ({name!r}) is outside the model's vocabulary of {self.rows}"
        return _bad(item.document, "outside_vocabulary", message)

    def _ids(self, texts: list[str]) -> list[list[int] | InputError]:
        try:
            return [*self.tokenizer.encode_batch(texts, "no")]
        except InputError:
            return [self._ids_or_error(text) for text in texts]

    def _ids_or_error(self, text: str) -> list[int] | InputError:
        try:
            return self.tokenizer.encode(text, "no")
        except InputError as error:
            return error

    def _encoded(self, document: Document, ids) -> Encoded | BadRecord:
        try:
            if not isinstance(document.content, str):
                return self._dialog(document, document.content)
            taken = next(ids)
            if isinstance(taken, InputError):
                raise taken
        except InputError as error:
            return _bad(document, "not_encodable", error.message)
        if not taken:
            return _bad(document, "empty", "the tokenizer makes nothing of its text")
        return Encoded(document, np.array(self.bos + taken + self.eos, np.int32))

    def _dialog(self, document: Document, parts: list[Part]) -> Encoded | BadRecord:
        """Encodes the parts of a dialog as one text; nothing after a response's first EOS is predicted."""
        tokens, predicted, begins = self._tokens_and_predicted(parts)
        is_end = np.isin(tokens, self.tokenizer.eos_ids)
        response = 0  # predicted tokens of the last response
        for start, stop in _responses(predicted, is_end, begins):
            ends = np.flatnonzero(is_end[start:stop])
            response = int(ends[0]) + 1 if ends.size else stop - start
            predicted[start + response : stop] = False
        length = int(np.flatnonzero(predicted)[-1]) + 1 if predicted.any() else len(tokens)
        tokens = tokens[:length].tolist()
        roles = np.where(predicted[:length], PREDICTED, GIVEN).tolist()
        if tokens[: len(self.bos)] != self.bos:
            tokens, roles = self.bos + tokens, [GIVEN] * len(self.bos) + roles
        return self._framed(document, tokens, roles, response)

    def _tokens_and_predicted(self, parts: list[Part]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """[T] int32 tokens, [T] bool which of them are predicted, and where each predicted part begins.

        Text between special tokens is encoded as a whole, as a chat template's text is by `transformers`.
        """
        tokens, predicted, begins, goes_on = [], [], [], False
        texts: list[tuple[str, bool]] = []  # since the last special token
        firsts: list[int] = []  # those of the texts that a predicted part begins with

        def encode_texts():
            if texts:
                ((ids, offsets),) = self.tokenizer.encode_with_offsets(["".join(next(zip(*texts)))], goes_on)
                for first in firsts:
                    only = [(text, index == first) for index, (text, _) in enumerate(texts)]
                    begins.extend(len(tokens) + np.flatnonzero(predicted_tokens(offsets, only))[:1])
                tokens.extend(ids)
                predicted.extend(predicted_tokens(offsets, texts))
                texts.clear()
                firsts.clear()

        for role, pieces in parts:
            for number, piece in enumerate(pieces):
                is_first = role == PREDICTED and not number
                if isinstance(piece, str):
                    firsts.extend([len(texts)] if is_first else [])
                    texts.append((piece, role == PREDICTED))
                    continue
                encode_texts()
                begins.extend([len(tokens)] if is_first else [])
                tokens.append(piece)
                predicted.append(role == PREDICTED)
                goes_on = not self.tokenizer.restarts_after_special
        encode_texts()
        return np.array(tokens, np.int32), np.array(predicted, bool), begins

    def _framed(self, document, tokens, roles, response) -> Encoded | BadRecord:
        """Returns a dialog with one EOS behind its last response, filler, and its end cut off if need be."""
        if PREDICTED not in roles:
            return _bad(document, "empty", "nothing of its response is left to predict")
        if PREDICTED not in roles[: self.seq_len]:
            message = f"its prompt alone fills the {self.seq_len} tokens of a row"
            return _bad(document, "long_prompt", message)
        if self.eos and tokens[-1] not in self.tokenizer.eos_ids:
            tokens, roles, response = tokens + self.eos, [*roles, PREDICTED], response + 1
        is_cut = len(tokens) > self.seq_len
        fill = -response % self.filler if self.filler and self.eos else 0
        tokens, roles = tokens + tokens[-1:] * fill, roles + [FILLER] * fill
        return Encoded(
            document,
            np.array(tokens[: self.seq_len], np.int32),
            np.array(roles[: self.seq_len], np.uint8),
            is_cut,
        )


def _responses(predicted: np.ndarray, is_end: np.ndarray, begins: list[int]) -> list[tuple[int, int]]:
    """Returns the runs of predicted tokens; where one part follows another that has ended, two of them.

    Args:
      predicted, is_end: [T] bool, the second of them at each EOS.
      begins: where predicted parts begin.
    """
    before = np.append(False, predicted[:-1])
    starts = []
    for index in np.union1d(np.flatnonzero(predicted & ~before), np.array(begins, np.int64)).tolist():
        if not before[index] or is_end[starts[-1] : index].any():
            starts.append(index)
    stops = [start + int(np.argmin(np.append(predicted[start:], False))) for start in starts]
    return list(zip(starts, map(min, stops, [*starts[1:], len(predicted)])))


def _bad(document: Document, reason: str, message: str) -> BadRecord:
    error = BadRecord(reason, message)
    error.source, error.number, error.line = document.source, document.number, document.number + 1
    return error


# Where a model says so, from its tokenizer's directory: beside it, or in the A3 checkpoint around it.
_PLACES = (("config.json", ()), ("config.json", ("text_config",)), ("../meta/a3.json", ("model",)))


def embedding_rows(tokenizer) -> int | None:
    """Returns the size of the vocabulary of the model that a tokenizer lies with; None where none does.

    Tokenizers may have ids beyond it, such as Gemma 3's for images.

    Args:
      tokenizer: as for `load_tokenizer`.
    """
    directory = as_path(tokenizer)
    if not directory.is_dir():
        return None
    for name, keys in _PLACES:
        fields: Any = {}
        with contextlib.suppress(InputError):  # absent; whoever reads the model tells what else it is
            fields = read_json(directory / name)
        for key in keys:
            fields = fields.get(key) if isinstance(fields, dict) else None
        size = fields.get("vocab_size") if isinstance(fields, dict) else None
        if type(size) is int and size > 0:
            return size
    return None
