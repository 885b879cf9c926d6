"""Texts with parts taken out, and what checkpoints put there."""

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence

from a3_jax.data import embedded

NUM_INFILLINGS = 10
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Question:
    """A text with blanks.

    Attributes:
      text: with `[[n]]` at its blanks.
      truth: the whole text.
    """

    text: str
    truth: str


@dataclasses.dataclass(frozen=True)
class Infilling:
    """One question and its answers, whole texts."""

    text: str
    truth: str
    a3: str
    ar: str


def fill(checkpoint, texts: Iterable[str], **options) -> list[str]:
    """Each text with its blanks filled greedily; `options` are those of `decoding.generate`."""
    from a3_jax.decoding import generate

    return [result["text"] for result in generate(checkpoint, [{"text": text} for text in texts], **options)]


def exact_match(checkpoint, blanks: Sequence[embedded.HiddenWords], **options) -> float:
    """Returns the share of one-word blanks that are filled with the very word, 0 to 1."""
    filled = fill(checkpoint, (blank.text for blank in blanks), **options)
    truths = [blank.text.replace("[[1]]", blank.answer) for blank in blanks]
    return sum(text == truth for text, truth in zip(filled, truths, strict=True)) / len(truths)


def infillings(a3_checkpoint, ar_checkpoint, questions: Sequence[Question]) -> list[Infilling]:
    """A3 takes the surest word first, wherever it is; the AR model fills from the left alone."""
    texts = [question.text for question in questions]
    a3 = fill(a3_checkpoint, texts, strategy="dynamic", step_size=1)
    ar = fill(ar_checkpoint, texts, model="ar")
    return [
        Infilling(question.text, question.truth, *answers)
        for question, *answers in zip(questions, a3, ar, strict=True)
    ]


def story_questions(count: int = NUM_INFILLINGS) -> list[Question]:
    """Held-out stories with different parts taken out, in turn."""
    ways = itertools.cycle((first_mentions, sentence(1), all_but_last_mentions, sentence(-1)))
    return [
        Question(blank_out(story, way(_TOKEN.findall(story))), story)
        for story, way in zip(embedded.stories("heldout")[:count], ways)
    ]


def text_questions(
    documents: Sequence[str], count: int = NUM_INFILLINGS, length: int = 100
) -> list[Question]:
    """Returns the user's own text, byte by byte, with two words out of the middle of each piece."""
    questions = []
    for document in documents:
        piece = document.strip()[:length]
        words = list(re.finditer(r"\S+", piece))
        if len(words) < 6 or "[[" in piece:
            continue
        first = len(words) // 2 - 1
        begin, end = words[first].start(), words[first + 1].end()
        missing = len(piece[begin:end].encode("utf-8"))
        questions.append(Question(f"{piece[:begin]}[[{missing}]]{piece[end:]}", piece))
    random.Random(0).shuffle(questions)
    return questions[:count]


def blank_out(story: str, hidden: set[int]) -> str:
    """Returns a story with the words of these indices (full stops count) as blanks, neighbours as one.

    blank_out("Ben found a kite.", {0, 1, 3})  ->  "[[2]] a [[1]]."
    """
    tokens = _TOKEN.findall(story)
    written = []
    for is_hidden, run in itertools.groupby(range(len(tokens)), key=lambda index: index in hidden):
        indices = list(run)
        written += [f"[[{len(indices)}]]"] if is_hidden else [tokens[index] for index in indices]
    return " ".join(written).replace(" .", ".")


def first_mentions(tokens: Sequence[str]) -> set[int]:
    """Returns where each value comes up first: only what follows tells which it is."""
    return {tokens.index(word) for word in _values(tokens)}


def all_but_last_mentions(tokens: Sequence[str]) -> set[int]:
    """Returns every mention of the values but the last one of each."""
    mentions = [[index for index, token in enumerate(tokens) if token == word] for word in _values(tokens)]
    return {index for indices in mentions for index in indices[:-1]}


def sentence(number: int) -> Callable[[Sequence[str]], set[int]]:
    """Returns the words of a sentence, without its full stop."""

    def words(tokens: Sequence[str]) -> set[int]:
        stops = [index for index, token in enumerate(tokens) if token == "."]
        last = stops[number]
        before = [stop for stop in stops if stop < last]
        return set(range(before[-1] + 1 if before else 0, last))

    return words


def _values(tokens: Sequence[str]) -> set[str]:
    known = set(itertools.chain.from_iterable(embedded.VALUES.values()))
    return known.intersection(tokens)
