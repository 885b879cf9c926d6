"""Tasks of lm-evaluation-harness as tasks of `a3 eval`: `lm_eval:NAME`."""

import dataclasses
import json
from typing import Any

from a3_jax.errors import InputError
from a3_jax.evaluation.task_run import RunSettings
from a3_jax.evaluation.tasks.files import TaskFiles
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.paths import as_path, write_text

HARNESS = "lm_eval:"
_NOT_FIGURES = ("alias", "sample_len", "sample_count", "name")


@dataclasses.dataclass(frozen=True)
class HarnessResult:
    """What the harness said of a task or group.

    Attributes:
      split: that was evaluated.
      examples: documents.
      figures: by metric, on the harness' scale, with the filter behind a comma where there is one; those of
        a group's tasks as TASK/METRIC behind the group's own.
      settings: versions, few-shot examples and configs of the tasks.
    """

    split: str
    examples: int
    figures: dict[str, Figure]
    settings: dict[str, Any]


def harness_files(name: str, data_dir) -> dict[str, str]:
    """SHA-256 of the local files of a task; none where it has no directory.

    Raises:
      InputError: lm-evaluation-harness is not installed, or a directory in a bucket.
    """
    from a3_jax.evaluation.lm_eval_run import task_files

    if data_dir is None:
        return {}
    paths = [as_path(path) for path in task_files(name.removeprefix(HARNESS), data_dir)]
    return TaskFiles(tuple(paths)).sha256()


def run_harness(run: RunSettings, name: str, records_path) -> HarnessResult:
    """Runs a task of the harness and writes its documents' records.

    Raises:
      InputError: an unknown task, files that are missing, a data set that can't be loaded.
    """
    from a3_jax.evaluation.lm_eval_run import run_lm_eval

    task = name.removeprefix(HARNESS)
    told = run_lm_eval(
        run.subject.model, [task], run.data_dir,
        limit=run.limit, seed=run.seed, download=run.download, log_samples=True,
    )  # fmt: skip
    samples = told.get("samples") or {}
    lines = [
        json.dumps({"task": one, **sample}, default=str)
        for one, documents in sorted(samples.items())
        for sample in documents
    ]
    write_text(records_path, "".join(f"{line}\n" for line in lines))
    counts = {one: number["effective"] for one, number in told.get("n-samples", {}).items()}
    configs = told.get("configs", {})
    figures: dict[str, Figure] = {}
    for one in sorted(told["results"], key=lambda one: one != task):
        count = counts.get(one, sum(counts.values()))
        front = "" if one == task else f"{one}/"
        figures |= {
            front + metric: figure for metric, figure in _figures(told["results"][one], count).items()
        }
    splits = {config.get("test_split") or config.get("validation_split") or "" for config in configs.values()}
    kept = {key: told[key] for key in ("versions", "n-shot", "configs") if key in told}
    if not figures:
        raise InputError(f"{name} gave no figures", field="tasks")
    return HarnessResult(", ".join(sorted(map(str, splits))), sum(counts.values()), figures, kept)


def _figures(entry: dict[str, Any], count: int) -> dict[str, Figure]:
    """`acc,none` and `acc_stderr,none` as one figure, `acc`."""
    found = {}
    for key, value in entry.items():
        metric, _, kind = key.partition(",")
        if metric in _NOT_FIGURES or metric.endswith("_stderr") or isinstance(value, bool | str):
            continue
        error = entry.get(f"{metric}_stderr,{kind}")
        name = metric if kind in ("none", "") else key
        error = float(error) if isinstance(error, int | float) else None
        found[name] = Figure(float(value), error, count)
    return found
