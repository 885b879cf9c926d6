"""Rows of data become requests to a model, their texts put together as the profile's protocol says.

    context            choice                      prefix          blank        suffix
    Question: .. Answer:| by train                 s1 s2 |  _  _  _  _  _ | s4 s5

A text is encoded as a whole and cut as `borders.cut` says, unless the profile follows a script that
encodes pieces by themselves. Examples longer than the model's context are made too: the caller counts them.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from a3_jax.borders import Cut, cut
from a3_jax.errors import InputError
from a3_jax.evaluation.models import AR
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.evaluation.tasks.catalogue import CHOICE, CODE, PERPLEXITY, Task
from a3_jax.evaluation.tasks.files import DataRow
from a3_jax.evaluation.tasks.profiles import Profile
from a3_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceExample:
    """A row whose choices are to be scored.

    Attributes:
      id: the row's own name, or its number.
      row: its number over all files, from 1.
      sample: always 0.
      targets: one per choice.
      gold: index of the right choice.
      choices: their texts as scored, without the space in front.
      tokens, characters, bytes: length of each; tokens as scored, special ones included.
    """

    id: str
    row: int
    targets: tuple[ScoreTarget, ...]
    gold: int
    choices: tuple[str, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]
    bytes: tuple[int, ...]
    sample: int = 0

    @property
    def length(self) -> int:
        """Number of tokens of the longest choice with its context."""
        return max(len(target.tokens) for target in self.targets)


@dataclasses.dataclass(frozen=True, eq=False)
class FillExample:
    """A row whose blank is to be filled.

    Attributes:
      id, row: as in `ChoiceExample`.
      sample: which of several completions of the row, from 0.
      blank: the request to the model.
      gold: [n] int32, tokens of a right answer.
      references: texts of right answers.
      values: the row, for grading.
      before, after: given text that the blank holds at its ends, as in `borders.Cut`.
    """

    id: str
    row: int
    sample: int
    blank: TextBlank
    gold: np.ndarray
    references: tuple[str, ...]
    values: dict[str, Any]
    before: str = ""
    after: str = ""

    @property
    def length(self) -> int:
        """Number of tokens, the blank's included."""
        return len(self.blank)


Example = ChoiceExample | FillExample


def make_examples(
    task: Task,
    profile: Profile,
    rows: Iterable[DataRow],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    samples: int = 1,
    shots: Sequence[DataRow] = (),
) -> Iterator[Example]:
    """Yields the examples of a task, in the order of its rows.

    Args:
      seed: each target's and blank's own seed is a function of it, the row's number and the choice
        (or sample) alone.
      samples: completions per row; choices have one.
      shots: training rows, the first of which precede each prompt where the profile says so.
    """
    if task.kind == PERPLEXITY:
        raise ValueError(f"{task.name} has no examples: see `perplexity`")
    maker = _Maker(task, profile, tokenizer, _prompts_before(task, profile, shots))
    for number, row in enumerate(rows, start=1):
        name = next((row.values[field] for field in task.id_fields if field in row.values), str(number))
        if task.kind == CHOICE:
            yield maker.choice(row, number, name, seed)
        else:
            yield from maker.fills(row, number, name, seed, samples)


def is_too_long(task: Task, profile: Profile, example: Example, max_length: int) -> bool:
    """Tells whether an example exceeds the model's context, or a program the profile's cap."""
    cap = profile.code_max_tokens if task.kind == CODE else None
    return example.length > (max_length if cap is None else min(max_length, cap))


def derived_seed(seed: int, *numbers: int) -> int:
    """Returns a seed below 2**32 made of a seed and whole numbers, by NumPy's hash."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])


def clean(text: str) -> str:
    """Cleans a text of HellaSwag as every evaluator does.

    Outer space goes; " [title]" becomes ". "; every shortest `[...]` goes; each double space becomes a
    single one, once:

        "Roof [title] Tools [step] Get  a ladder."  ->  "Roof. Tools Get a ladder."
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


class _Maker:
    """Makes examples of one task under one profile."""

    def __init__(self, task: Task, profile: Profile, tokenizer: Tokenizer, shots: str):
        self.task, self.profile, self.tokenizer, self.shots = task, profile, tokenizer, shots
        self._bos = profile.bos[task.name]
        self._front = [] if self._bos == "none" else tokenizer.encode("")

    def choice(self, row: DataRow, number: int, name: str, seed: int) -> ChoiceExample:
        parts = _gap_choices(self, row) if self.task.gap else _plain_choices(self, row)
        targets = tuple(
            self._target(row, context, pieces, derived_seed(seed, number, index))
            for index, (context, pieces, _) in enumerate(parts)
        )
        texts = tuple(text for _, _, text in parts)
        label = next(field.name for field in self.task.fields if field.kind == "label")
        lengths = tuple(target.stop - target.start for target in targets)
        characters, sizes = tuple(map(len, texts)), tuple(len(text.encode()) for text in texts)
        return ChoiceExample(name, number, targets, row.values[label], texts, lengths, characters, sizes)

    def fills(self, row: DataRow, number: int, name: str, seed: int, samples: int) -> Iterator[FillExample]:
        gap = (_code_gap if self.task.kind == CODE else _GAPS[self.task.name])(self, row)
        text, length = gap.text, max(gap.length, 1)
        prefix = np.asarray(self._with_front(text.prefix), np.int32)
        suffix, gold = np.asarray(text.suffix, np.int32), np.asarray(text.middle[:length], np.int32)
        for sample in range(samples):
            blank = TextBlank(prefix, suffix, length, derived_seed(seed, number, sample))
            yield FillExample(
                name, number, sample, blank, gold, gap.references, row.values, text.before, text.after
            )

    def context(self, row: DataRow) -> str:
        """Returns what precedes the choices or the blank."""
        values = {name: row.values[name].capitalize() for name in self.task.capitalised}
        text = self.profile.context_of(self.task).format(**{**row.values, **values})
        return clean(text) if self.task.is_cleaned else text

    def joined(self, before: str, after: str) -> tuple[str, str]:
        """Returns two texts that meet, with a space between them where the profile wants it."""
        if self.profile.join_space != "natural":
            return before, after
        before, after = before.rstrip(" "), after.lstrip(" ")
        return before, f" {after}" if before and not before[-1].isspace() else after

    def tidy(self, text: str) -> str:
        """Removes outer and doubled white space from a choice or an answer, where texts are natural."""
        return re.sub(" {2,}", " ", text.strip()) if self.profile.join_space == "natural" else text

    def cut(self, prefix: str, middle: str, suffix: str = "") -> Cut:
        """Returns the tokens of a text and of its predicted middle."""
        if self.profile.tokenising != "separate":
            return cut(self.tokenizer, prefix, middle, suffix)
        prefix_ids, middle_ids, suffix_ids = self.tokenizer.encode_batch([prefix, middle, suffix], "no")
        return Cut(prefix_ids if prefix else [], middle_ids, suffix_ids if suffix else [])

    def _target(self, row: DataRow, context: str, pieces: Sequence[str], seed: int) -> ScoreTarget:
        if self.profile.tokenising == "whole":
            text = cut(self.tokenizer, context, "".join(pieces))
            before, scored = text.prefix, text.middle
        else:
            before = self.tokenizer.encode(context, "no") if context else []
            again = self._front if self._bos == "each" else []
            scored = [
                token for piece in pieces if piece for token in (*again, *self.tokenizer.encode(piece, "no"))
            ]
        if not scored:
            raise row.error("leaves no token to score")
        before = self._with_front(before)
        tokens = np.asarray([*before, *scored], np.int32)
        return ScoreTarget(tokens, len(before), len(tokens), seed)

    def _with_front(self, tokens: list[int]) -> list[int]:
        """Adds BOS where the profile has one; always where nothing else precedes what is predicted."""
        if not self._front and not tokens:
            first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            return [] if first is None else [first]
        return [*self._front, *tokens]


def _plain_choices(maker: _Maker, row: DataRow) -> list[tuple[str, tuple[str, ...], str]]:
    """Returns (context, pieces scored, text) of each choice."""
    fields = maker.task.choices
    texts = row.values[fields[0]] if len(fields) == 1 else [row.values[field] for field in fields]
    if maker.task.is_cleaned:
        texts = [clean(text) for text in texts]
    texts = [maker.tidy(text) for text in texts]
    if "" in texts:  # of nothing but marks
        raise row.error("is empty once cleaned", fields[0])
    context, found = maker.context(row), []
    for text in texts:
        before, after = maker.joined(context, maker.profile.before_choice.get(maker.task.name, "") + text)
        found.append((before, (after,), text))
    return found


def _gap_choices(maker: _Maker, row: DataRow) -> list[tuple[str, tuple[str, ...], str]]:
    """Returns the same where choices fill a gap `_` of a sentence, which continues after it."""
    field = maker.task.gap or ""
    before, found, after = row.values[field].partition("_")
    if not found:
        raise row.error("has no gap '_'", field)
    is_natural = maker.profile.join_space == "natural"
    rest = re.sub(" {2,}", " ", after).rstrip() if is_natural else after.strip()
    parts = []
    for option in (maker.tidy(row.values[field]) for field in maker.task.choices):
        context, choice = maker.joined(before, option) if is_natural else (before, option)
        if maker.profile.winogrande_pieces == "suffix":
            parts.append((context + choice, (rest,), rest.strip()))
        elif maker.profile.winogrande_pieces == "three":
            parts.append((context, (choice, rest), option + rest))
        else:
            whole = rest if is_natural or not rest else f" {rest}"
            parts.append((context, (choice + whole,), option + whole))
    return parts


@dataclasses.dataclass(frozen=True)
class _Gap:
    """A text with its gap, the number of blank tokens in place of it, and the texts that may fill it."""

    text: Cut
    length: int
    references: tuple[str, ...]


def _triviaqa_gap(maker: _Maker, row: DataRow) -> _Gap:
    """Takes a prompt; the blank is as long as the longest alias, plus what the profile adds."""
    prompt, aliases = maker.context(row), row.values["answer"]["aliases"]
    cuts = [maker.cut(*maker.joined(prompt, maker.tidy(alias))) for alias in aliases if alias.strip()]
    text, length = max(cuts, key=lambda one: len(one.middle)), maker.profile.length.get(maker.task.name)
    if length is None:
        return _Gap(text, len(text.middle) + maker.profile.triviaqa_extra, tuple(aliases))
    short = [one for one in cuts if len(one.middle) <= length]
    return _Gap(max(short, key=lambda one: len(one.middle), default=text), length, tuple(aliases))


def _rocstories_gap(maker: _Maker, row: DataRow) -> _Gap:
    """Takes sentences 1 and 2, a blank for the third, then 4 and the right ending."""
    first, second, third, fourth = (
        maker.tidy(row.values[f"InputSentence{number}"]) for number in (1, 2, 3, 4)
    )
    ending = maker.tidy(row.values[maker.task.choices[row.values["AnswerRightEnding"]]])
    before, middle = maker.joined(f"{first} {second}", third)
    _, after = maker.joined(third, f"{fourth} {ending}")
    text = maker.cut(before, middle, after)
    is_by_slip = maker.profile.model == AR and maker.profile.ar_cap == "characters"
    return _Gap(text, len(third) if is_by_slip else len(text.middle), (third,))


def _lambada_gap(maker: _Maker, row: DataRow) -> _Gap:
    """Takes all of a passage but its last word; the spaces before that word belong to the blank."""
    text = row.values["text"].strip()
    start = len(text) - len(re.split(r"\s", text)[-1])
    if not start:
        raise row.error("holds one word: no context for the last one", "text")
    context = text[:start].rstrip(" ")
    passage = cut(maker.tokenizer, context, text[len(context) :])
    return _Gap(passage, len(passage.middle), (text[start:],))


def _gsm8k_gap(maker: _Maker, row: DataRow) -> _Gap:
    prompt, answer = maker.shots + maker.context(row), maker.tidy(row.values["answer"])
    text = maker.cut(*maker.joined(prompt, answer))
    return _Gap(text, maker.profile.length.get(maker.task.name, len(text.middle)), (answer,))


def _code_gap(maker: _Maker, row: DataRow) -> _Gap:
    """Takes a program with a hole as it is, under every profile: its spaces have a meaning."""
    middle = row.values["canonical_solution"]
    text = cut(maker.tokenizer, row.values["prompt"], middle, row.values["suffix"])
    return _Gap(text, len(text.middle), (middle,))


_GAPS = {
    "triviaqa": _triviaqa_gap, "rocstories": _rocstories_gap, "lambada": _lambada_gap, "gsm8k": _gsm8k_gap,
}  # fmt: skip


def _prompts_before(task: Task, profile: Profile, shots: Sequence[DataRow]) -> str:
    """Returns the solved examples in front of a prompt."""
    wanted = profile.shots.get(task.name, 0)
    if len(shots) < wanted:
        raise InputError(f"{wanted} training rows are needed, got {len(shots)}", field=task.name)
    context = profile.context_of(task)
    solved = (f"{context.format(**row.values).rstrip()} {row.values['answer']}" for row in shots[:wanted])
    return "".join(f"{text}\n\n" for text in solved)
