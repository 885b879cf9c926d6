"""Answers become records, one per example, and records become figures.

A record is plain JSON: the answer, and per metric a number from 0 to 1. Figures are means over the records
in points (x100) with their standard errors.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.borders import completion
from a3_jax.evaluation.tasks import metrics
from a3_jax.evaluation.tasks.catalogue import CODE, Task
from a3_jax.evaluation.tasks.code_sandbox import check_program
from a3_jax.evaluation.tasks.examples import ChoiceExample, Example, FillExample
from a3_jax.evaluation.tasks.metrics import Figure, mean_figure
from a3_jax.evaluation.tasks.profiles import Profile
from a3_jax.tokenizer import Tokenizer

PASS_AT = (1, 10, 100)


def grade(
    task: Task,
    profile: Profile,
    example: Example,
    answer: Any,
    tokenizer: Tokenizer,
    allow_code_execution: bool = False,
) -> dict[str, Any]:
    """Grades a model's answer to an example; returns the record.

    Args:
      answer: for choices, [C] log-probabilities in nats; for a blank, its [n] tokens, or None for an
        example that was too long and counts as an empty completion.
      allow_code_execution: without it no program runs, and the record of a program has no figures.

    Returns:
      {"id", "row", "sample", "figures": {metric: 0..1}}; for choices also {"gold", "scores", "tokens",
      "characters", "bytes", "chosen"}, for blanks {"completion", "references"}, for code {"result"}.
    """
    record = {"id": example.id, "row": example.row, "sample": example.sample}
    if isinstance(example, ChoiceExample):
        return record | _grade_choice(task, profile, example, answer)
    text = ""
    if answer is not None:
        text = completion(tokenizer, example.blank.prefix, answer, example.before, example.after)
        text = cut_at_stops(task, profile, text)
    record |= {"completion": text, "references": list(example.references)}
    if task.kind != CODE:
        record |= {"figures": _fill_figures(task, profile, example, text)}
        if task.name == "triviaqa":  # empty aliases are in every answer, so they are left out
            empty = sum(not alias.strip() for alias in example.values["answer"]["normalized_aliases"])
            record |= {"empty_aliases": empty} if empty else {}
        return record
    if not allow_code_execution:
        return record | {"result": "not run", "figures": {}}
    outcome = check_program(program_of(example, text))
    return record | {"result": outcome.result, "figures": {"passed": float(outcome.passed)}}


def cut_at_stops(task: Task, profile: Profile, text: str) -> str:
    """Returns a completion up to the first of the profile's stops."""
    found = [text.find(stop) for stop in profile.stops.get(task.name, ())]
    return text[: min((position for position in found if position >= 0), default=len(text))]


def program_of(example: FillExample, completion: str) -> str:
    """Returns the program that is run: prompt, completion and suffix, the tests, and a call of them."""
    values = example.values
    body = f"{values['prompt']}{completion}{values['suffix']}"
    return f"{body}\n{values['test']}\ncheck({values['entry_point']})"


def summarise(task: Task, records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Returns the figures of a task, by metric: the published ones first.

    The value of a row with several completions is their mean; pass@k is the unbiased estimate, for those k
    of 1, 10, 100 that there are enough completions for. Code that was not run has no figures.
    """
    rows = collections.defaultdict(list)
    for record in records:
        rows[record["row"]].append(record["figures"])
    if task.kind == CODE:
        if any("passed" not in record["figures"] for record in records):
            return {}
        passed = [[figures["passed"] for figures in row] for row in rows.values()]
        fewest = min(map(len, passed), default=1)
        return {
            f"pass@{k}": mean_figure([metrics.pass_at_k(len(row), round(sum(row)), k) for row in passed])
            for k in PASS_AT
            if k <= fewest
        }
    names = [name for name in task.metrics if all(name in record["figures"] for record in records)]
    return {
        name: mean_figure([float(np.mean([figures[name] for figures in row])) for row in rows.values()])
        for name in names
    }


def _grade_choice(task: Task, profile: Profile, example: ChoiceExample, scores) -> dict[str, Any]:
    scores = [float(score) for score in scores]
    chosen = metrics.best_choices(scores, example.tokens, example.characters, example.bytes)
    figures = {f"accuracy_{rule}": float(choice == example.gold) for rule, choice in chosen.items()}
    return {
        "gold": example.gold,
        "scores": scores,
        "tokens": list(example.tokens),
        "characters": list(example.characters),
        "bytes": list(example.bytes),
        "chosen": chosen[profile.rule[task.name]],
        "figures": {"accuracy": figures[f"accuracy_{profile.rule[task.name]}"], **figures},
    }


def _fill_figures(task: Task, profile: Profile, example: FillExample, text: str) -> dict[str, float]:
    if task.name == "rocstories":
        return metrics.rouge(text, example.references[0])
    if task.name == "lambada":
        return {"accuracy": metrics.last_word_is(text, example.references[0])}
    if task.name == "gsm8k":
        return metrics.gsm8k_figures(text, example.references[0])
    answer = example.values["answer"]  # TriviaQA's
    figures = metrics.triviaqa_figures(
        text, answer["aliases"], answer["normalized_aliases"], profile.triviaqa_norm
    )
    match = "containment" if profile.triviaqa_match == "containment" else "strict_exact_match"
    return {"exact_match": figures[match], **figures}
