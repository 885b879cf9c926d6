"""Documents to token ids and roles.

text      BOS? t t t t t t EOS?
dialog    BOS? given ... | predicted ... EOS | filler: EOS EOS EOS
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from a3_jax.data.dialogs import Part
from a3_jax.data.documents import BadRecord
from a3_jax.data.table import FILLER, GIVEN, PREDICTED
from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer

EOS_POLICIES = ("auto", "yes", "no")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A record that can be used.

    Attributes:
      source, number: where it is, see `documents.Source`.
      digest: of what it holds; equal for equal documents.
      content: its text, or the parts of a dialog.
    """

    source: int
    number: int
    digest: int
    content: str | list[Part]


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
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: str, eos: str, seq_len: int, filler: int):
        if eos not in EOS_POLICIES:
            raise InputError(f"must be one of {', '.join(EOS_POLICIES)}, got {eos!r}", field="eos")
        if eos == "yes" and not tokenizer.eos_ids:
            raise InputError("the tokenizer has no EOS token", field="eos")
        self.tokenizer, self.seq_len, self.filler = tokenizer, seq_len, filler
        self.bos = tokenizer.encode("", bos)
        self.eos = [] if eos == "no" else [*tokenizer.eos_ids[:1]]

    def encode(self, items: Sequence[Document | BadRecord]) -> list[Encoded | BadRecord]:
        """Documents in tokens, in their order; a `BadRecord` in place of each that can't be encoded."""
        texts = [text for item in items if isinstance(item, Document) for text in _texts(item)]
        ids = iter(self._ids(texts))
        return [item if isinstance(item, BadRecord) else self._encoded(item, ids) for item in items]

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
        taken = [next(ids) for _ in _texts(document)]
        failure = next((one for one in taken if isinstance(one, InputError)), None)
        if failure is not None:
            return _bad(document, "not_encodable", failure.message)
        if isinstance(document.content, str):
            if not taken[0]:
                return _bad(document, "empty", "the tokenizer makes nothing of its text")
            return Encoded(document, np.array(self.bos + taken[0] + self.eos, np.int32))
        return self._dialog(document, taken)

    def _dialog(self, document: Document, taken) -> Encoded | BadRecord:
        """The parts one after the other; nothing behind the first EOS of a response is predicted."""
        tokens, roles = [], []
        texts, eos_ids = iter(taken), self.tokenizer.eos_ids
        response = 0  # tokens of the last one that are predicted
        for role, pieces in document.content:
            part = []
            for piece in pieces:
                part += [piece] if isinstance(piece, int) else next(texts)
            tokens += part
            if role == PREDICTED:
                ends = (index for index, token in enumerate(part, 1) if token in eos_ids)
                response = next(ends, len(part))
                roles += [PREDICTED] * response + [GIVEN] * (len(part) - response)
            else:
                roles += [GIVEN] * len(part)
        behind = len(part) - response
        tokens, roles = tokens[: len(tokens) - behind], roles[: len(roles) - behind]
        if tokens[: len(self.bos)] != self.bos:
            tokens, roles = self.bos + tokens, [GIVEN] * len(self.bos) + roles
        return self._framed(document, tokens, roles, response)

    def _framed(self, document, tokens, roles, response) -> Encoded | BadRecord:
        """A dialog with one EOS behind its last response, filler, and its end cut off if need be."""
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


def _texts(document: Document) -> list[str]:
    """The texts of a document that are encoded, in their order."""
    if isinstance(document.content, str):
        return [document.content]
    return [piece for _, pieces in document.content for piece in pieces if isinstance(piece, str)]


def _bad(document: Document, reason: str, message: str) -> BadRecord:
    error = BadRecord(reason, message)
    error.source, error.number, error.line = document.source, document.number, document.number + 1
    return error
