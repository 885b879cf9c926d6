"""Answers become records, one an example, and records become figures.

A record is plain JSON: what was answered, and per metric a number from 0 to 1. Figures are means over
the records in points (x100) with their standard errors.
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
    """The record of an example.

    Args:
      answer: of choices, [C] log-probabilities in nats; of a blank, its [n] tokens, or None for an
        example that was too long and counts as an empty completion.
      allow_code_execution: without it no program runs, and the record of one has no figures.

    Returns:
      {"id", "row", "sample", "figures": {metric: 0..1}}, and of choices {"gold", "scores", "tokens",
      "characters", "bytes", "chosen"}, of blanks {"completion", "references"}, of code {"result"} too.
    """
    record = {"id": example.id, "row": example.row, "sample": example.sample}
    if isinstance(example, ChoiceExample):
        return record | _judged_choice(task, profile, example, answer)
    text = ""
    if answer is not None:
        text = completion(tokenizer, example.blank.prefix, answer, example.before, example.after)
        text = cut_at_stops(task, profile, text)
    record |= {"completion": text, "references": list(example.references)}
    if task.kind != CODE:
        return record | {"figures": _FIGURES[task.name](profile, example, text)} | _left_out(task, example)
    if not allow_code_execution:
        return record | {"result": "not run", "figures": {}}
    outcome = check_program(program_of(example, text))
    return record | {"result": outcome.result, "figures": {"passed": float(outcome.passed)}}


def cut_at_stops(task: Task, profile: Profile, text: str) -> str:
    """Returns a completion up to the first of the profile's stops."""
    found = [text.find(stop) for stop in profile.stops.get(task.name, ())]
    return text[: min((place for place in found if place >= 0), default=len(text))]


def program_of(example: FillExample, completion: str) -> str:
    """The program that is run: prompt, completion and suffix, the tests, and a call of them."""
    values = example.values
    body = f"{values['prompt']}{completion}{values['suffix']}"
    return f"{body}\n{values['test']}\ncheck({values['entry_point']})"


def summarise(task: Task, records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The figures of a task, by metric: the published ones first.

    Of several completions of a row, their mean is the row's value; pass@k is by the unbiased estimator,
    for those k of 1, 10, 100 that there are completions for. Code that was not run has no figures.

    Raises:
      InputError: no records.
    """
    if task.kind == CODE:
        return _pass_figures(records)
    rows = collections.defaultdict(list)
    for record in records:
        rows[record["row"]].append(record["figures"])
    names = [name for name in task.metrics if all(name in record["figures"] for record in records)]
    return {
        name: mean_figure([float(np.mean([figures[name] for figures in row])) for row in rows.values()])
        for name in names
    }


def _judged_choice(task: Task, profile: Profile, example: ChoiceExample, scores) -> dict[str, Any]:
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


def _triviaqa(profile: Profile, example: FillExample, text: str) -> dict[str, float]:
    answer = example.values["answer"]
    figures = metrics.triviaqa_figures(
        text, answer["aliases"], answer["normalized_aliases"], profile.triviaqa_norm
    )
    match = "containment" if profile.triviaqa_match == "containment" else "strict_exact_match"
    return {"exact_match": figures[match], **figures}


def _left_out(task: Task, example: FillExample) -> dict[str, int]:
    """How many normalised aliases were left out: empty ones are in every answer."""
    if task.name != "triviaqa":
        return {}
    empty = sum(not alias.strip() for alias in example.values["answer"]["normalized_aliases"])
    return {"empty_aliases": empty} if empty else {}


def _rocstories(profile: Profile, example: FillExample, text: str) -> dict[str, float]:
    del profile
    return metrics.rouge(text, example.references[0])


def _lambada(profile: Profile, example: FillExample, text: str) -> dict[str, float]:
    del profile
    return {"accuracy": metrics.last_word_is(text, example.references[0])}


def _gsm8k(profile: Profile, example: FillExample, text: str) -> dict[str, float]:
    del profile
    return metrics.gsm8k_figures(text, example.references[0])


_FIGURES = {"triviaqa": _triviaqa, "rocstories": _rocstories, "lambada": _lambada, "gsm8k": _gsm8k}


def _pass_figures(records: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    if any("passed" not in record["figures"] for record in records):
        return {}
    rows = collections.defaultdict(list)
    for record in records:
        rows[record["row"]].append(record["figures"]["passed"])
    fewest = min((len(passed) for passed in rows.values()), default=1)
    return {
        f"pass@{k}": mean_figure(
            [metrics.pass_at_k(len(passed), round(sum(passed)), k) for passed in rows.values()]
        )
        for k in PASS_AT
        if k <= fewest
    }
