"""Checkpoint, tasks and profile in; results out, each written as soon as its task is done.

Examples run sorted by length in chunks, always the same ones, and the records of a chunk are on disk before
the next begins: an interrupted run continues with the chunk it was in and gives the same numbers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from a3_jax.checks import check_seed, whole_number
from a3_jax.errors import EXIT_PREEMPTED, InputError, RunError
from a3_jax.evaluation.lm_eval_run import HARNESS, harness_files, run_harness
from a3_jax.evaluation.models import AR
from a3_jax.evaluation.models.opening import kind_of, load_model
from a3_jax.evaluation.results import (
    RECORDS_SUFFIX,
    RecordFile,
    Result,
    check_directory,
    identity_of,
    load_result,
    record_key,
    result_path,
    write_result,
)
from a3_jax.evaluation.task_run import RunSettings, TaskRun, example_run, text_run
from a3_jax.evaluation.tasks.catalogue import PERPLEXITY, Task, task_named
from a3_jax.evaluation.tasks.code_sandbox import check_execution
from a3_jax.evaluation.tasks.files import TaskFiles, fetch_data, find_data
from a3_jax.evaluation.tasks.profiles import DEFAULT_PROFILE, Profile, profile_for
from a3_jax.runtime.versions import software_versions

Stop = Callable[[], bool]
Tell = Callable[[str], None]


def _never() -> bool:
    return False


def _quietly(line: str) -> None:
    del line


def evaluate(
    checkpoint,
    tasks: Sequence[str],
    data_dir=None,
    profile: str | Profile = DEFAULT_PROFILE,
    results="results",
    *,
    model: str | None = None,
    scorer: str | None = None,
    scorer_options: Mapping[str, Any] | None = None,
    generate: Mapping[str, Any] | None = None,
    switches: Mapping[str, Any] | None = None,
    limit: int | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: str | None = None,
    mesh=None,
    evaluator=None,
    allow_code_execution: bool = False,
    download: bool = False,
    stop: Stop = _never,
    tell: Tell = _quietly,
) -> list[Result]:
    """Evaluates a model on tasks.

        evaluate("runs/tiny", ["piqa", "lambada"], "data", results="results/tiny")

    A task whose result under exactly these settings is in `results` is not run again; an interrupted one
    continues.

    Args:
      checkpoint: as `open_checkpoint` takes it, or an `EvaluatedModel` of your own, which should have its
        own directory of results.
      tasks: names of `catalogue.TASKS`, or "lm_eval:NAME" for tasks of lm-evaluation-harness.
      data_dir: directory of their files.
      profile: its name, or one of your own.
      results: directory of the results.
      model: "a3", "ar" or "masked_diffusion"; None: by the checkpoint.
      scorer, scorer_options: scorer in place of the profile's, and its options.
      generate: decoding options in place of the profile's, for all tasks.
      switches: switches of the profile by name, as `profiles.profile_for` takes them.
      limit: rows per task, texts per column of perplexities; None: as many as the published figures have.
      samples: completions per row, for blanks.
      seed: seed of all that is drawn.
      batch_size: the most requests per batch; it changes numbers by rounding alone.
      dtype, mesh: as in `open_model`.
      evaluator: checkpoint that scores texts, read from left to right; `pile` and `unconditional` need it.
      allow_code_execution: whether programs that the model wrote may be run.
      download: whether files missing from `data_dir` are downloaded into it.
      stop: called between chunks; True stops the run.
      tell: called with lines of progress.

    Returns:
      One result per task, in their order, each already written.

    Raises:
      RunError: stopped (status 75), or the model's scores are NaN (status 1).
    """
    known = _check(tasks, limit, samples, seed, evaluator, allow_code_execution)
    check_directory(results)
    kind = kind_of(checkpoint, model)
    changed = profile_for(profile, kind, scorer, generate, switches)
    files = {task.name: _files(task, changed, data_dir, download) for task in known}
    options = {**changed.scorer_options, **(scorer_options or {})}
    shared = {"dtype": dtype, "batch_size": batch_size, "mesh": mesh}
    subject = load_model(checkpoint, kind, scorer=changed.scorer, scorer_options=options, seed=seed, **shared)
    given = {"scorer": scorer, "scorer_options": scorer_options, "generate": generate, "switches": switches}
    run = RunSettings(
        subject=subject,
        evaluator=None if evaluator is None else load_model(evaluator, AR, **shared),
        profile=changed,
        overrides={name: dict(it) if isinstance(it, Mapping) else it for name, it in given.items() if it},
        generate=dict(generate or {}),
        data_dir=data_dir, limit=limit, samples=samples, seed=seed,
        allow_code_execution=allow_code_execution, download=download,
    )  # fmt: skip
    return [_run_task(run, name, files, results, stop, tell) for name in dict.fromkeys(tasks)]


def run_chunks(task_run: TaskRun, records: RecordFile, stop: Stop = _never, tell: Tell = _quietly) -> None:
    """Answers what has no record yet. An incomplete chunk runs whole, so that its batches are the same."""
    known = {record_key(record) for record in records.all}
    total, done = sum(map(len, task_run.chunks)), 0
    for chunk in task_run.chunks:
        missing = [index for index, item in enumerate(chunk) if task_run.key_of(item) not in known]
        if missing:
            if stop():
                where = f"{task_run.task}: stopped at {done:,} of {total:,} examples"
                raise RunError(EXIT_PREEMPTED, f"{where}; the same command goes on")
            started = time.monotonic()
            found = task_run.answer(chunk)
            seconds = round((time.monotonic() - started) / len(missing), 6)
            records.append([found[index] | {"seconds": seconds} for index in missing])
        done += len(chunk)
        tell(f"{task_run.task}: {done:,} of {total:,} examples")


def _check(tasks, limit, samples, seed, evaluator, allow_code_execution) -> list[Task]:
    """Refuses bad arguments before any file is read; returns the tasks that are not the harness's."""
    if isinstance(tasks, str):
        raise InputError("expected a list of names", field="tasks")
    if not tasks:
        raise InputError("no task given", field="tasks")
    known = [task_named(name) for name in dict.fromkeys(tasks) if not name.startswith(HARNESS)]
    check_execution(known, allow_code_execution)
    written = [task.name for task in known if task.kind == PERPLEXITY]
    if written and evaluator is None:
        message = f"{written[0]} needs one: a left-to-right model, such as Llama-3.1-8B"
        raise InputError(message, field="evaluator")
    check_seed(seed)
    whole_number("samples", samples, 1)
    if limit is not None:
        whole_number("limit", limit, 1)
    return known


def _files(task: Task, profile: Profile, data_dir, download: bool) -> TaskFiles:
    """Finds the task's files; downloads them where that is allowed."""
    shots = profile.shots.get(task.name, 0) > 0
    try:
        return find_data(task, data_dir, shots)
    except InputError:
        if not download or data_dir is None:
            raise
    fetch_data(task, data_dir)
    return find_data(task, data_dir, shots)


def _run_task(
    run: RunSettings, name: str, files: Mapping[str, TaskFiles], results, stop: Stop, tell: Tell
) -> Result:
    """Runs a task, or what is left of it, and writes its result."""
    task_run = None
    if name.startswith(HARNESS):
        settings = {"profile": None, "model": run.subject.model.describe(), "evaluator": None}
        data = harness_files(name, run.data_dir)
    else:
        task = task_named(name)
        task_run = (text_run if task.kind == PERPLEXITY else example_run)(run, task, files[name])
        settings, data = task_run.settings, task_run.data
    identity = identity_of(_facts(run, name, settings, data))
    path = result_path(results, name, identity)
    if path.exists():
        tell(f"{name}: done before, {path.name}")
        return load_result(path)
    records_path = path.parent / (path.name.removesuffix(".json") + RECORDS_SUFFIX)
    if task_run is None:
        outcome = _run_harness(run, name, settings, records_path, stop)
    else:
        outcome = _run_own(task_run, records_path, stop, tell)
    result = Result(
        task=name,
        **outcome,
        profile=run.profile.name,
        overrides=run.overrides,
        limit=run.limit,
        samples=run.samples,
        seed=run.seed,
        checkpoint=run.subject.origin,
        evaluator=run.evaluator.origin if run.evaluator and settings["evaluator"] is not None else None,
        data=data,
        versions=software_versions(),
        identity=identity,
        records=records_path.name,
    )
    write_result(results, result)
    return result


def _run_own(task_run: TaskRun, records_path, stop: Stop, tell: Tell) -> dict[str, Any]:
    """Runs a task of the catalogue; returns the fields of its result that come from its records."""
    with RecordFile(records_path) as records:
        run_chunks(task_run, records, stop, tell)
        found = sorted(records.all, key=lambda record: (record["row"], record["sample"], record["id"]))
    skipped = task_run.skipped(found)
    return {
        "kind": task_run.kind,
        "split": task_run.split,
        "examples": len(found) - skipped.get("no_text", 0),
        "skipped": skipped,
        "figures": task_run.figures(found),
        "settings": task_run.settings,
        "seconds": round(sum(record.get("seconds", 0.0) for record in found), 3),
        "notes": task_run.notes(found),
    }


def _run_harness(run: RunSettings, name: str, settings, records_path, stop: Stop) -> dict[str, Any]:
    """Runs a task of the harness, whole or not at all; returns the same fields."""
    if stop():
        raise RunError(EXIT_PREEMPTED, f"{name}: stopped before it began; the same command goes on")
    started = time.monotonic()
    found = run_harness(run, name, records_path)
    return {
        "kind": "lm_eval",
        "split": found.split,
        "examples": found.examples,
        "skipped": {},
        "figures": found.figures,
        "settings": settings | {"harness": found.settings},
        "seconds": round(time.monotonic() - started, 3),
        "notes": ["Figures are on the harness' own scale."],
    }


def _facts(run: RunSettings, task: str, settings: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """Returns everything that the numbers depend on: neither batch size nor paths."""
    models = {
        name: {key: value for key, value in (settings[name] or {}).items() if key != "batch_size"}
        for name in ("model", "evaluator")
    }
    return {
        "task": task,
        "profile": settings["profile"],
        **models,
        "limit": run.limit,
        "samples": run.samples,
        "seed": run.seed,
        "subject": run.subject.identity,
        "judge": run.evaluator.identity if run.evaluator and settings["evaluator"] else None,
        "data": data,
    }
