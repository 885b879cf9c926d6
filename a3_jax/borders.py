"""Where given text meets predicted text, in tokens: one rule for the whole program.

A text's tokens are those of the whole text. A token that holds a character of a predicted part is
predicted as a whole, so that where a border falls inside a token, the given side is cut back:

    given "Q: the m", predicted "at"     Q  :  ▁the | ▁mat           the given side loses " m"

Where the predicted part is not known yet, at a blank, the given text around it is encoded as it would be
inside a text, and one space before the blank belongs to the blank wherever spaces start words:

    "The [[1]], and"                     ▁The | None | ,  ▁and       the given side loses " "

What a model writes is read back by `completion`: the text with it, less the text before it.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer

MAX_BLANK = 1 << 20  # tokens in one blank: far above any context, far below what fills the memory

Part = tuple[str, bool]  # a text, and whether it is predicted

_OPENING = re.compile(r"(\\*)\[\[")
_BLANK = re.compile(r"\[\[([0-9]+)\]\]")


def predicted_tokens(offsets: Sequence[tuple[int, int]], parts: Sequence[Part]) -> np.ndarray:
    """Tells which tokens of a text hold a character of a predicted part.

    Args:
      offsets: (start, end) of each token in the text, as `Tokenizer.encode_with_offsets` gives them.
      parts: the text in parts, from its beginning to its end.

    Returns:
      [T] bool.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    predicted, stop = np.zeros(len(starts), bool), 0
    for text, is_predicted in parts:
        start, stop = stop, stop + len(text)
        if is_predicted and text:
            predicted |= (starts < stop) & (np.maximum(ends, starts + 1) > start)
    return predicted


@dataclasses.dataclass(frozen=True)
class Cut:
    """A text with one predicted part, cut into tokens.

    Attributes:
      prefix, middle, suffix: token ids before the predicted part, of it, and after it.
      before, after: the ends of the given texts that `middle` holds, as it shares a token with them.
    """

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    before: str = ""
    after: str = ""


def cut(tokenizer: Tokenizer, prefix: str, middle: str, suffix: str = "") -> Cut:
    """Encodes prefix + middle + suffix as one text, of which the middle is predicted."""
    ((ids, offsets),) = tokenizer.encode_with_offsets([prefix + middle + suffix])
    where = np.flatnonzero(predicted_tokens(offsets, [(prefix, False), (middle, True), (suffix, False)]))
    if not where.size:
        border = sum(end <= len(prefix) for _, end in offsets)
        return Cut(ids[:border], [], ids[border:])
    first, last = int(where[0]), int(where[-1]) + 1
    given_until = min(offsets[first - 1][1] if first else 0, offsets[first][0])
    given_from = offsets[last][0] if last < len(ids) else len(prefix + middle + suffix)
    after = suffix[: max(given_from - len(prefix + middle), 0)]
    return Cut(ids[:first], ids[first:last], ids[last:], prefix[given_until:], after)


def whole_text(text: str, offsets: Sequence[tuple[int, int]], count: int) -> str:
    """Returns the text of the first `count` tokens, without a last character that they hold only in part."""
    return text if count >= len(offsets) else text[: offsets[count][0]]


def completion(tokenizer: Tokenizer, prefix, answer, before: str = "", after: str = "") -> str:
    """Returns the text that an answer adds to a prefix, without the given text that it repeats.

    Args:
      prefix, answer: token ids.
      before, after: as of a `Cut`: given text that the answer should hold at its ends, and loses.
    """
    text = tokenizer.completion(prefix, answer)
    return text.removeprefix(before).removesuffix(after)


@dataclasses.dataclass(frozen=True)
class BlankText:
    """A text with blanks, in tokens.

    Attributes:
      tokens: ids, None at the blanks; BOS first where the text gets one.
      pieces: (tokens of it, text) of the given text before, between and after the blanks: always one
        more than there are blanks.
      blanks: tokens of each blank.
    """

    tokens: list[int | None]
    pieces: tuple[tuple[int, str], ...]
    blanks: tuple[int, ...]

    def filled(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
        """Returns the text with its blanks filled: the given text letter for letter, whatever the tokens say.

        Args:
          tokens: ids at least up to the last one that counts; what lies beyond them is left out.
        """
        text, position = "", 0
        for (count, given), length in zip(self.pieces, (*self.blanks, 0)):
            if position > len(tokens):  # an EOS ended the text inside a blank
                break
            text, position = text + given, position + count
            owed = " " if _gives_space(tokenizer, given) else ""
            text += completion(tokenizer, tokens[:position], tokens[position : position + length], owed)
            position += length
        return text


def encode_blanks(
    tokenizer: Tokenizer, text: str, bos: str = "auto", are_blanks_read: bool = True
) -> BlankText:
    r"""Encodes a text with blanks: `[[n]]` becomes n times None.

        "The [[2]] sat."  ->  The  None  None  Ġsat  .

    `\[[` is a `[[` that is no blank; `\\[[2]]` is a backslash, then a blank.

    Args:
      are_blanks_read: without it, `[[` is text like any other.
    """
    pieces, blanks = _split(text) if are_blanks_read else ([text], [])
    tokens: list[int | None] = []
    counted = []
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        kept = piece if is_last or not _gives_space(tokenizer, piece) else piece.removesuffix(" ")
        ids = tokenizer.encode_continuation(kept) if index else tokenizer.encode(kept, bos)
        counted.append((len(ids), piece))
        tokens += [*ids, *([] if is_last else [None] * blanks[index])]
    return BlankText(tokens, tuple(counted), tuple(blanks))


def _gives_space(tokenizer: Tokenizer, piece: str) -> bool:
    return piece.endswith(" ") and tokenizer.space_starts_word


def _split(text: str) -> tuple[list[str], list[int]]:
    """Returns the pieces of text around blanks, and the blanks' lengths; blanks side by side are one."""
    pieces, blanks, position = [""], [], 0
    for opening in _OPENING.finditer(text):
        if opening.start() < position:
            continue
        slashes = opening[1]
        pieces[-1] += text[position : opening.start()] + "\\" * (len(slashes) // 2)
        start = opening.end() - 2
        if len(slashes) % 2:
            pieces[-1], position = f"{pieces[-1]}[[", opening.end()
            continue
        blank = _BLANK.match(text, start)
        if blank is None:
            shown = text[start:][:12]
            raise InputError(
                f"malformed blank {shown!r}: write [[n]] with n a number of tokens, or \\[[ for the text"
            )
        if blanks and not pieces[-1]:
            blanks[-1] += _blank_length(blank[1])
        else:
            blanks.append(_blank_length(blank[1]))
            pieces.append("")
        position = blank.end()
    pieces[-1] += text[position:]
    return pieces, blanks


def _blank_length(digits: str) -> int:
    digits = digits.lstrip("0")
    if not digits:
        raise InputError("malformed blank '[[0]]': a blank has at least one token")
    if len(digits) > len(str(MAX_BLANK)) or int(digits) > MAX_BLANK:
        raise InputError(f"a blank has at most {MAX_BLANK} tokens, got [[{digits[:12]}]]")
    return int(digits)
