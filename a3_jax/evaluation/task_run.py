"""A task of a run as work to do: chunks of items, how a chunk is answered, what its records come to."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from a3_jax.errors import EXIT_FAILED, InputError, RunError
from a3_jax.evaluation.models.subjects import Subject
from a3_jax.evaluation.tasks import perplexity
from a3_jax.evaluation.tasks.catalogue import CHOICE, Task
from a3_jax.evaluation.tasks.examples import ChoiceExample, Example, is_too_long, make_examples
from a3_jax.evaluation.tasks.files import TaskFiles, read_rows
from a3_jax.evaluation.tasks.grading import grade, summarise
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.evaluation.tasks.perplexity import Variant, Writing
from a3_jax.evaluation.tasks.profiles import Profile

_CHUNK = {CHOICE: 256}  # examples whose records are written together
_FILLED_CHUNK, _TEXT_CHUNK = 64, 32

Record = dict[str, Any]
Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What all tasks of a run have in common.

    Attributes:
      subject: what is evaluated. evaluator: what judges texts, or None.
      profile: with the caller's changes. overrides: these. generate: of them the decoding options.
      data_dir: of task files.
      limit, samples, seed, allow_code_execution, download: as `evaluate` takes them.
    """

    subject: Subject
    evaluator: Subject | None
    profile: Profile
    overrides: dict[str, Any]
    generate: dict[str, Any]
    data_dir: Any
    limit: int | None
    samples: int
    seed: int
    allow_code_execution: bool
    download: bool


@dataclasses.dataclass
class TaskRun:
    """One task, ready to be run.

    Attributes:
      task, kind, split: of it.
      settings: "profile", "model" and "evaluator".
      data: SHA-256 of its files by name.
      chunks: items in the order in which they run.
      key_of: the key of an item's record.
      answer: the records of a chunk.
      figures: of all records.
      skipped: examples left out, by reason: of all records.
      notes: of all records, for readers.
    """

    task: str
    kind: str
    split: str
    settings: dict[str, Any]
    data: dict[str, str]
    chunks: list[list[Any]]
    key_of: Callable[[Any], Key]
    answer: Callable[[list[Any]], list[Record]]
    figures: Callable[[list[Record]], dict[str, Figure]]
    skipped: Callable[[list[Record]], dict[str, int]]
    notes: Callable[[list[Record]], list[str]]


def example_run(run: RunSettings, task: Task, files: TaskFiles) -> TaskRun:
    """A task of examples: choices that are scored, blanks that are filled.

    Raises:
      InputError: a row that gives no example, or all examples are too long.
    """
    model, profile = run.subject.model, run.profile
    limit = profile.limit_of(task) if run.limit is None else run.limit
    shots = list(read_rows(task, files, shots=True)) if files.shots else ()
    rows = read_rows(task, files, limit)
    examples = list(
        make_examples(task, profile, rows, model.tokenizer, seed=run.seed, samples=run.samples, shots=shots)
    )
    long = [example for example in examples if is_too_long(task, profile, example, model.max_length)]
    out = set(map(id, long))
    fitting = sorted((one for one in examples if id(one) not in out), key=lambda example: example.length)
    if not fitting:
        message = f"every example of {task.name} is longer than the {model.max_length} tokens of the model"
        raise InputError(message, field="tasks")
    skips = task.too_long == "skip"
    if task.kind != CHOICE:
        model = with_generate(model, profile.generate.get(task.name, {}))

    def answer(chunk: list[Example]) -> list[Record]:
        blank = id(chunk[0]) in out
        answers = [None] * len(chunk) if blank else _answers(task, model, chunk)
        return [
            grade(task, profile, example, one, model.tokenizer, run.allow_code_execution)
            for example, one in zip(chunk, answers, strict=True)
        ]

    size = _CHUNK.get(task.kind, _FILLED_CHUNK)
    return TaskRun(
        task=task.name,
        kind=task.kind,
        split=task.split,
        settings={"profile": profile.settings(task), "model": model.describe(), "evaluator": None},
        data=files.sha256(),
        chunks=[*_chunked(fitting, size), *([] if skips else _chunked(long, size))],
        key_of=lambda example: (example.id, example.row, example.sample),
        answer=answer,
        figures=lambda records: summarise(task, records),
        skipped=lambda records: {"too_long": len(long)} if skips and long else {},
        notes=lambda records: _example_notes(records, 0 if skips else len(long)),
    )


def text_run(run: RunSettings, task: Task, files: TaskFiles) -> TaskRun:
    """A task of texts that the model writes and an evaluator judges.

    Raises:
      InputError: no evaluator, too few documents, lengths that the model can't write.
    """
    if run.evaluator is None:
        raise InputError(f"{task.name} needs one, a left-to-right model", field="evaluator")
    subject, judge_model, profile = run.subject.model, run.evaluator.model, run.profile
    variants = perplexity.variants_of(profile, run.subject.family, run.generate)
    longest = max(variant.length for variant in variants)
    if longest > subject.max_length:
        message = f"{longest} tokens are more than the {subject.max_length} of the model"
        raise InputError(message, field="pile.lengths")
    models = {variant.name: with_generate(subject, variant.generate) for variant in variants}
    by_variant = perplexity.writings(
        task, files, profile, variants, subject.tokenizer, judge_model.tokenizer, run.seed, run.limit
    )

    def answer(chunk: list[Writing]) -> list[Record]:
        return perplexity.write_and_judge(chunk, models[chunk[0].variant.name], judge_model)

    options = {variant.name: variant.generate for variant in variants}
    return TaskRun(
        task=task.name,
        kind=task.kind,
        split=task.split,
        settings={
            "profile": profile.settings(task),
            "model": subject.describe() | {"generate": options},
            "evaluator": judge_model.describe(),
        },
        data=files.sha256(),
        chunks=[chunk for items in by_variant for chunk in _chunked(items, _TEXT_CHUNK)],
        key_of=lambda writing: writing.key,
        answer=answer,
        figures=lambda records: perplexity.summarise_texts(records, variants),
        skipped=_textless,
        notes=lambda records: _text_notes(records, subject, judge_model, variants),
    )


def with_generate(model, options: Mapping[str, Any]):
    """The model with decoding options; one of the caller's own may have none."""
    return model.with_generate(**options) if hasattr(model, "with_generate") else model


def _answers(task: Task, model, chunk: Sequence[Example]) -> list[Any]:
    """What the model says: [C] scores of choices, [n] tokens of blanks."""
    if task.kind != CHOICE:
        return model.fill([example.blank for example in chunk if not isinstance(example, ChoiceExample)])
    choices = [example for example in chunk if isinstance(example, ChoiceExample)]
    scores = iter(model.score([target for example in choices for target in example.targets]))
    answers = [[next(scores) for _ in example.targets] for example in choices]
    for example, found in zip(choices, answers, strict=True):
        if np.isnan(found).any():
            raise RunError(EXIT_FAILED, f"{task.name}: the model's score of row {example.row} is no number")
    return answers


def _chunked(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[first : first + size]) for first in range(0, len(items), size)]


def _example_notes(records: list[Record], emptied: int) -> list[str]:
    notes = []
    if emptied:
        notes.append(f"{emptied} examples were too long and count as empty completions.")
    empty = sum(record.get("empty_aliases", 0) for record in records)
    if empty:
        notes.append(f"{empty} aliases without a letter were left out: they are in every answer.")
    return notes


def _textless(records: list[Record]) -> dict[str, int]:
    number = sum(not record["scored"] for record in records)
    return {"no_text": number} if number else {}


def _text_notes(records: list[Record], model, judge_model, variants: Sequence[Variant]) -> list[str]:
    notes = ["ppl is of what was written, given the prompt; ppl_full of the prompt too."]
    if perplexity.is_retokenised(model, judge_model):
        notes.append(
            "The evaluator has another tokenizer: texts were decoded and encoded again, the border lies "
            "behind the prompt's last character, and special tokens are gone."
        )
    cut = sum(record["cut"] > 0 for record in records)
    if cut:
        notes.append(f"{cut} texts were cut at the evaluator's context.")
    rows = sorted({record["row"] for record in records if record["variant"] == variants[0].name})
    return [*notes, f"Rows: {', '.join(map(str, rows))}."]
