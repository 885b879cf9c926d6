"""Rows become what a model is asked: token by token as the profile's protocol puts texts together.

    context            choice                      prefix          blank        suffix
    Question: .. Answer:| by train                 s1 s2 |  _  _  _  _  _ | s4 s5

Pieces are encoded each by itself, so that a token boundary lies between them, unless the profile says
"joint". Longer examples than the model takes are made all the same: the caller counts them.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from a3_jax.errors import InputError
from a3_jax.evaluation.cleaning import clean
from a3_jax.evaluation.files import Row
from a3_jax.evaluation.profiles import AR, Profile
from a3_jax.evaluation.requests import Blank, Target
from a3_jax.evaluation.tasks import CHOICE, CODE, PERPLEXITY, Task
from a3_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceExample:
    """A row of a task of choices.

    Attributes:
      id: the row's own name, or its number.
      row: its number over all files, from 1. sample: always 0.
      targets: one a choice.
      gold: index of the right choice.
      choices: their texts as scored, without the space in front.
      tokens, characters, bytes: how long each is; tokens as scored, special ones included.
    """

    id: str
    row: int
    targets: tuple[Target, ...]
    gold: int
    choices: tuple[str, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]
    bytes: tuple[int, ...]
    sample: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest choice with its context."""
        return max(len(target.tokens) for target in self.targets)


@dataclasses.dataclass(frozen=True, eq=False)
class FillExample:
    """A row whose blank is to be filled.

    Attributes:
      id, row: as of a `ChoiceExample`. sample: which of several completions of the row, from 0.
      blank: what the model gets.
      gold: [n] int32, tokens of a right answer.
      references: texts of right answers.
      values: the row, for the judge.
    """

    id: str
    row: int
    sample: int
    blank: Blank
    gold: np.ndarray
    references: tuple[str, ...]
    values: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens with the blank's."""
        return len(self.blank)


Example = ChoiceExample | FillExample


def make_examples(
    task: Task,
    profile: Profile,
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    samples: int = 1,
    shots: Sequence[Row] = (),
) -> Iterator[Example]:
    """The examples of a task, in the order of its rows.

    Args:
      seed: each target's and blank's own seed is a function of it, the row's number and the choice
        (or sample) alone.
      samples: completions a row; choices have one.
      shots: training rows, the first of which stand before each prompt where the profile says so.

    Raises:
      InputError: a row that gives no example, with its file and number.
    """
    if task.kind == PERPLEXITY:
        raise ValueError(f"{task.name} has no examples: see `prompts`")
    maker = _Maker(task, profile, tokenizer, _prompts_before(task, profile, shots))
    for number, row in enumerate(rows, start=1):
        name = _name(task, row, number)
        if task.kind == CHOICE:
            yield maker.choice(row, number, name, seed)
        else:
            yield from maker.fills(row, number, name, seed, samples)


def is_too_long(task: Task, profile: Profile, example: Example, max_length: int) -> bool:
    """Whether an example is longer than the model takes, or than the profile takes programs."""
    cap = profile.code_max_tokens if task.kind == CODE else None
    return example.length > (max_length if cap is None else min(max_length, cap))


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed below 2**32 from a seed and whole numbers, by NumPy's hash."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])


class _Maker:
    """Makes examples of one task under one profile."""

    def __init__(self, task: Task, profile: Profile, tokenizer: Tokenizer, shots: str):
        self.task, self.profile, self.tokenizer, self.shots = task, profile, tokenizer, shots
        self._bos = profile.bos[task.name]
        self._front = [] if self._bos == "none" else tokenizer.encode("")

    def choice(self, row: Row, number: int, name: str, seed: int) -> ChoiceExample:
        parts = _gap_choices(self, row) if self.task.gap else _plain_choices(self, row)
        targets = tuple(
            self._target(row, context, pieces, derived_seed(seed, number, index))
            for index, (context, pieces, _) in enumerate(parts)
        )
        texts = tuple(text for _, _, text in parts)
        label = next(field.name for field in self.task.fields if field.kind == "label")
        return ChoiceExample(
            id=name,
            row=number,
            targets=targets,
            gold=row.values[label],
            choices=texts,
            tokens=tuple(target.stop - target.start for target in targets),
            characters=tuple(len(text) for text in texts),
            bytes=tuple(len(text.encode()) for text in texts),
        )

    def fills(self, row: Row, number: int, name: str, seed: int, samples: int) -> Iterator[FillExample]:
        gap = (_code_gap if self.task.kind == CODE else _GAPS[self.task.name])(self, row)
        prefix = np.asarray(self._with_front(gap.prefix), np.int32)
        suffix, gold = np.asarray(gap.suffix, np.int32), np.asarray(gap.gold, np.int32)
        for sample in range(samples):
            blank = Blank(prefix, suffix, gap.length, derived_seed(seed, number, sample))
            yield FillExample(name, number, sample, blank, gold, gap.references, row.values)

    def context(self, row: Row) -> str:
        """What stands before the choices or the blank."""
        values = {name: row.values[name].capitalize() for name in self.task.capitalised}
        text = self.profile.context_of(self.task).format(**{**row.values, **values})
        return clean(text) if self.task.is_cleaned else text

    def joined(self, before: str, after: str) -> tuple[str, str]:
        """Two texts that meet, with the space between them where the profile wants it."""
        if self.profile.join_space != "natural":
            return before, f" {after}" if self.profile.join_space == "delimiter" else after
        before, after = before.rstrip(" "), after.lstrip(" ")
        return before, f" {after}" if before and not before[-1].isspace() else after

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece within a text. A space that the tokenizer puts in front is not typed too."""
        if self.profile.join_space != "script" and self.tokenizer.prepends_space:
            text = text.removeprefix(" ")
        return self.tokenizer.encode(text, "no")

    def _target(self, row: Row, context: str, pieces: Sequence[str], seed: int) -> Target:
        if self.profile.tokenising == "joint":
            whole = self.tokenizer.encode(context + "".join(pieces), "no")
            start = min(len(self.tokenizer.encode(context, "no")), len(whole) - 1)
            before, scored = whole[: max(start, 0)], whole[max(start, 0) :]
        else:
            before = self.encode(context) if context else []
            again = self._front if self._bos == "each" else []
            scored = [token for piece in pieces if piece for token in (*again, *self.encode(piece))]
        if not scored:
            raise row.error("leaves no token to score")
        before = self._with_front(before)
        tokens = np.asarray([*before, *scored], np.int32)
        return Target(tokens, len(before), len(tokens), seed)

    def _with_front(self, tokens: list[int]) -> list[int]:
        """With BOS, where the profile has one; where nothing else stands before what is predicted, always."""
        if not self._front and not tokens:
            first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            return [] if first is None else [first]
        return [*self._front, *tokens]


def _name(task: Task, row: Row, number: int) -> str:
    return next((row.values[field] for field in task.id_fields if field in row.values), str(number))


def _plain_choices(maker: _Maker, row: Row) -> list[tuple[str, tuple[str, ...], str]]:
    """(context, pieces scored, text) of each choice."""
    fields = maker.task.choices
    texts = row.values[fields[0]] if len(fields) == 1 else [row.values[field] for field in fields]
    if maker.task.is_cleaned:
        texts = [clean(text) for text in texts]
    if "" in texts:  # of nothing but marks
        raise row.error("is empty once cleaned", fields[0])
    context, found = maker.context(row), []
    for text in texts:
        before, after = maker.joined(context, maker.profile.before_choice.get(maker.task.name, "") + text)
        found.append((before, (after,), text))
    return found


def _gap_choices(maker: _Maker, row: Row) -> list[tuple[str, tuple[str, ...], str]]:
    """The same where a choice stands in a gap `_` of a sentence, and the sentence goes on behind it."""
    field = maker.task.gap or ""
    before, found, behind = row.values[field].partition("_")
    if not found:
        raise row.error("has no gap '_'", field)
    is_natural = maker.profile.join_space == "natural"
    rest = behind.rstrip() if is_natural else behind.strip()
    parts = []
    for option in (row.values[field] for field in maker.task.choices):
        context, choice = maker.joined(before, option) if is_natural else (before, option)
        if maker.profile.winogrande_pieces == "suffix":
            context, rest_scored = context + choice, rest if is_natural else maker.joined("", rest)[1]
            parts.append((context, (rest_scored,), rest.strip()))
        elif maker.profile.winogrande_pieces == "three":
            parts.append((context, (choice, rest), option + rest))
        else:
            whole = rest if is_natural or not rest else f" {rest}"
            parts.append((context, (choice + whole,), option + whole))
    return parts


@dataclasses.dataclass(frozen=True)
class _Gap:
    """A blank's surroundings in tokens, without BOS, and what may stand in it."""

    prefix: list[int]
    suffix: list[int]
    gold: list[int]
    length: int
    references: tuple[str, ...]


def _triviaqa_gap(maker: _Maker, row: Row) -> _Gap:
    """A prompt; the blank is as long as the longest alias, and whatever the profile adds."""
    prompt, aliases = maker.context(row), row.values["answer"]["aliases"]
    coded = [maker.encode(maker.joined(prompt, alias)[1]) for alias in aliases if alias.strip()]
    prefix = maker.encode(maker.joined(prompt, "")[0])
    gold, length = max(coded, key=len), maker.profile.length.get(maker.task.name)
    if length is None:
        length = len(gold) + maker.profile.triviaqa_extra
    else:
        gold = max((tokens for tokens in coded if len(tokens) <= length), key=len, default=gold)
    return _Gap(prefix, [], gold, length, tuple(aliases))


def _rocstories_gap(maker: _Maker, row: Row) -> _Gap:
    """Sentences 1 and 2, a blank for the third, then 4 and the right ending."""
    first, second, third, fourth = (row.values[f"InputSentence{number}"] for number in (1, 2, 3, 4))
    ending = row.values[maker.task.choices[row.values["AnswerRightEnding"]]]
    before, middle = maker.joined(f"{first} {second}", third)
    _, behind = maker.joined(third, f"{fourth} {ending}")
    gold = maker.encode(middle)
    is_by_slip = maker.profile.model == AR and maker.profile.ar_cap == "characters"
    length = len(third) if is_by_slip else len(gold)
    return _Gap(maker.encode(before), maker.encode(behind), gold, length, (third,))


def _lambada_gap(maker: _Maker, row: Row) -> _Gap:
    """All words but the last. The blank has the tokens by which the whole passage is longer."""
    text = row.values["text"].strip()
    words = text.split()
    if len(words) < 2:
        raise row.error("holds one word: no context for the last one", "text")
    prefix = maker.tokenizer.encode(" ".join(words[:-1]), "no")
    gold = maker.tokenizer.encode(text, "no")[len(prefix) :]
    return _Gap(prefix, [], gold, max(len(gold), 1), (words[-1],))


def _gsm8k_gap(maker: _Maker, row: Row) -> _Gap:
    prompt, answer = maker.shots + maker.context(row), row.values["answer"]
    before, after = maker.joined(prompt, answer)
    gold = maker.encode(after)
    length = maker.profile.length.get(maker.task.name, len(gold))
    return _Gap(maker.encode(before), [], gold[:length], length, (answer,))


def _code_gap(maker: _Maker, row: Row) -> _Gap:
    """A program with a hole, as it stands: spaces mean something there, so none is added or moved."""
    encode = maker.tokenizer.encode
    middle = row.values["canonical_solution"]
    gold = encode(middle, "no")
    return _Gap(
        encode(row.values["prompt"], "no"), encode(row.values["suffix"], "no"), gold, len(gold), (middle,)
    )


_GAPS = {
    "triviaqa": _triviaqa_gap,
    "rocstories": _rocstories_gap,
    "lambada": _lambada_gap,
    "gsm8k": _gsm8k_gap,
}


def _prompts_before(task: Task, profile: Profile, shots: Sequence[Row]) -> str:
    """The solved examples in front of a prompt."""
    wanted = profile.shots.get(task.name, 0)
    if len(shots) < wanted:
        raise InputError(f"{wanted} training rows are needed, got {len(shots)}", field=task.name)
    context = profile.context_of(task)
    solved = (f"{context.format(**row.values).rstrip()} {row.values['answer']}" for row in shots[:wanted])
    return "".join(f"{text}\n\n" for text in solved)
