"""One task of an evaluation, ready to run: chunks of items, their answers, figures of the records."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from a3_jax.errors import EXIT_FAILED, InputError, RunError
from a3_jax.evaluation.models.opening import LoadedModel
from a3_jax.evaluation.tasks import perplexity
from a3_jax.evaluation.tasks.catalogue import CHOICE, Task
from a3_jax.evaluation.tasks.examples import ChoiceExample, Example, is_too_long, make_examples
from a3_jax.evaluation.tasks.files import TaskFiles, read_rows
from a3_jax.evaluation.tasks.grading import grade, summarise
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.evaluation.tasks.perplexity import Writing
from a3_jax.evaluation.tasks.profiles import Profile

_CHUNK = {CHOICE: 256}  # examples whose records are written together
_FILLED_CHUNK, _TEXT_CHUNK = 64, 32

Record = dict[str, Any]
Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What all tasks of an evaluation share.

    Attributes:
      subject: the model under evaluation.
      evaluator: the model that scores texts, or None.
      profile: the profile with the caller's changes.
      overrides: these changes.
      generate: the decoding options among them.
      data_dir: directory of task files.
      limit, samples, seed, allow_code_execution, download: as `evaluate` takes them.
    """

    subject: LoadedModel
    evaluator: LoadedModel | None
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
    """One task, ready to run.

    Attributes:
      task, kind, split: its name, kind and split.
      settings: "profile", "model" and "evaluator".
      data: SHA-256 of its files by name.
      chunks: items in the order in which they run.
      key_of: the key of an item's record.
      answer: answers a chunk; returns its records.
      figures: figures of all records.
      skipped: number of examples left out, by reason, given all records.
      notes: notes for readers, given all records.
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
    """Prepares a task of examples: choices that are scored, blanks that are filled."""
    model, profile = run.subject.model, run.profile
    limit = profile.limit_of(task) if run.limit is None else run.limit
    shots = list(read_rows(task, files, shots=True)) if files.shots else ()
    rows = read_rows(task, files, limit)
    examples = list(
        make_examples(task, profile, rows, model.tokenizer, seed=run.seed, samples=run.samples, shots=shots)
    )
    long = [example for example in examples if is_too_long(task, profile, example, model.max_length)]
    long_ids = set(map(id, long))
    fitting = sorted((one for one in examples if id(one) not in long_ids), key=lambda one: one.length)
    if not fitting:
        message = f"every example of {task.name} is longer than the {model.max_length} tokens of the model"
        raise InputError(message, field="tasks")
    skips = task.too_long == "skip"
    if task.kind != CHOICE:
        model = _with_generate(model, profile.generate.get(task.name, {}))

    def answer(chunk: list[Example]) -> list[Record]:
        is_long = id(chunk[0]) in long_ids
        answers = [None] * len(chunk) if is_long else _answers(task, model, chunk)
        return [
            grade(task, profile, example, one, model.tokenizer, run.allow_code_execution)
            for example, one in zip(chunk, answers, strict=True)
        ]

    def notes(records: list[Record]) -> list[str]:
        found = []
        if long and not skips:
            found.append(f"{len(long)} examples were too long and count as empty completions.")
        if empty := sum(record.get("empty_aliases", 0) for record in records):
            found.append(f"{empty} aliases without a letter were left out: they are in every answer.")
        return found

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
        notes=notes,
    )


def text_run(run: RunSettings, task: Task, files: TaskFiles) -> TaskRun:
    """Prepares a task of texts that the model writes and an evaluator scores."""
    if run.evaluator is None:
        raise InputError(f"{task.name} needs one, a left-to-right model", field="evaluator")
    subject, evaluator, profile = run.subject.model, run.evaluator.model, run.profile
    variants = perplexity.variants_of(profile, run.subject.family, run.generate)
    longest = max(variant.length for variant in variants)
    if longest > subject.max_length:
        message = f"{longest} tokens are more than the {subject.max_length} of the model"
        raise InputError(message, field="pile.lengths")
    models = {variant.name: _with_generate(subject, variant.generate) for variant in variants}
    by_variant = perplexity.writings(
        task, files, profile, variants, subject.tokenizer, evaluator.tokenizer, run.seed, run.limit
    )

    def answer(chunk: list[Writing]) -> list[Record]:
        return perplexity.write_and_score(chunk, models[chunk[0].variant.name], evaluator)

    def skipped(records: list[Record]) -> dict[str, int]:
        number = sum(not record["scored"] for record in records)
        return {"no_text": number} if number else {}

    def notes(records: list[Record]) -> list[str]:
        found = ["ppl is of what was written, given the prompt; ppl_full of the prompt too."]
        if perplexity.is_retokenised(subject, evaluator):
            found.append(
                "The evaluator has another tokenizer: texts were decoded and encoded again, the border lies "
                "behind the prompt's last character, and special tokens are gone."
            )
        if cut := sum(record["cut"] > 0 for record in records):
            found.append(f"{cut} texts were cut at the evaluator's context.")
        rows = sorted({record["row"] for record in records if record["variant"] == variants[0].name})
        return [*found, f"Rows: {', '.join(map(str, rows))}."]

    options = {variant.name: variant.generate for variant in variants}
    return TaskRun(
        task=task.name,
        kind=task.kind,
        split=task.split,
        settings={
            "profile": profile.settings(task),
            "model": subject.describe() | {"generate": options},
            "evaluator": evaluator.describe(),
        },
        data=files.sha256(),
        chunks=[chunk for items in by_variant for chunk in _chunked(items, _TEXT_CHUNK)],
        key_of=lambda writing: writing.key,
        answer=answer,
        figures=lambda records: perplexity.summarise_texts(records, variants),
        skipped=skipped,
        notes=notes,
    )


def _with_generate(model, options: Mapping[str, Any]):
    """Returns the model with decoding options; a caller's own model may not have any."""
    return model.with_generate(**options) if hasattr(model, "with_generate") else model


def _answers(task: Task, model, chunk: Sequence[Example]) -> list[Any]:
    """Asks the model: [C] scores of the choices, or the [n] tokens of the blank, of each example."""
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
