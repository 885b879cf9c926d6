"""Checkpoint, tasks and profile in; results out, each written as soon as its task is done.

Examples run sorted by length in chunks, always the same ones, whose records are on disk before the next
begins: a run that was stopped, in whatever way, goes on with the chunk that it was in and gives the same
numbers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from a3_jax.decoding.options import whole_number
from a3_jax.errors import EXIT_PREEMPTED, InputError, RunError, check_seed
from a3_jax.evaluation.harness_tasks import HARNESS, harness_files, run_harness
from a3_jax.evaluation.models.subjects import kind_of, open_subject
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
from a3_jax.evaluation.tasks.downloading import fetch_data
from a3_jax.evaluation.tasks.files import TaskFiles, find_data
from a3_jax.evaluation.tasks.overrides import profile_for
from a3_jax.evaluation.tasks.profiles import AR, DEFAULT_PROFILE, Profile
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

    A task whose result of the very same settings is in `results` is not run again; one that was stopped
    goes on.

    Args:
      checkpoint: what `open_checkpoint` opens, or an `EvaluatedModel` of your own, which should have a
        directory of results to itself.
      tasks: names of `tasks.TASKS`, or "lm_eval:NAME" of tasks of lm-evaluation-harness.
      data_dir: where their files are.
      profile: its name, or one of your own.
      results: directory of the results.
      model: "a3", "ar" or "masked_diffusion"; None: by the checkpoint.
      scorer, scorer_options: other than the profile's.
      generate: decoding options other than the profile's, of all tasks.
      switches: of the profile, by name, as in `switches.profile_for`.
      limit: rows a task, texts a column of perplexities; None: as many as the published figures have.
      samples: completions a row, of blanks.
      seed: of all that is drawn.
      batch_size: requests a batch at most; it changes no number beyond rounding.
      dtype, mesh: as in `open_model`.
      evaluator: checkpoint that judges texts, read from left to right; `pile` and `unconditional` need it.
      allow_code_execution: whether programs that the model wrote may be run.
      download: whether files that are not in `data_dir` are fetched into it.
      stop: asked between chunks whether to stop. tell: told of progress, a line each.

    Returns:
      One result a task, in their order, each of them written by then.

    Raises:
      InputError: anything given that can't be used, missing or damaged files.
      RunError: stopped (status 75), or the model gives no numbers (status 1).
    """
    known = _check(tasks, limit, samples, seed, evaluator, allow_code_execution)
    check_directory(results)
    kind = kind_of(checkpoint, model)
    changed = profile_for(profile, kind, scorer, generate, switches)
    files = {task.name: _files(task, changed, data_dir, download) for task in known}
    options = {**changed.scorer_options, **(scorer_options or {})}
    shared = {"dtype": dtype, "batch_size": batch_size, "mesh": mesh}
    subject = open_subject(
        checkpoint, kind, scorer=changed.scorer, scorer_options=options, seed=seed, **shared
    )
    given = {"scorer": scorer, "scorer_options": scorer_options, "generate": generate, "switches": switches}
    run = RunSettings(
        subject=subject,
        evaluator=None if evaluator is None else open_subject(evaluator, AR, **shared),
        profile=changed,
        overrides={name: dict(it) if isinstance(it, Mapping) else it for name, it in given.items() if it},
        generate=dict(generate or {}),
        data_dir=data_dir, limit=limit, samples=samples, seed=seed,
        allow_code_execution=allow_code_execution, download=download,
    )  # fmt: skip
    return [_run_task(run, name, files, results, stop, tell) for name in dict.fromkeys(tasks)]


def run_chunks(work: TaskRun, records: RecordFile, stop: Stop = _never, tell: Tell = _quietly) -> None:
    """Answers what has no record yet. A chunk with a gap runs whole, so that its batches are what they were.

    Raises:
      RunError: told to stop.
    """
    known = {record_key(record) for record in records.all}
    total, done = sum(map(len, work.chunks)), 0
    for chunk in work.chunks:
        missing = [index for index, item in enumerate(chunk) if work.key_of(item) not in known]
        if missing:
            if stop():
                told = f"{work.task}: stopped at {done:,} of {total:,} examples; the same command goes on"
                raise RunError(EXIT_PREEMPTED, told)
            started = time.monotonic()
            found = work.answer(chunk)
            seconds = round((time.monotonic() - started) / len(missing), 6)
            records.append([found[index] | {"seconds": seconds} for index in missing])
        done += len(chunk)
        tell(f"{work.task}: {done:,} of {total:,} examples")


def _check(tasks, limit, samples, seed, evaluator, allow_code_execution) -> list[Task]:
    """Refuses what needs no file to be refused; the tasks that are our own."""
    if isinstance(tasks, str):
        raise InputError("expected a list of names", field="tasks")
    if not tasks:
        raise InputError("no task given", field="tasks")
    known = [task_named(name) for name in dict.fromkeys(tasks) if not name.startswith(HARNESS)]
    check_execution(known, allow_code_execution)
    judged = [task.name for task in known if task.kind == PERPLEXITY]
    if judged and evaluator is None:
        message = f"{judged[0]} needs one: a left-to-right model, such as Llama-3.1-8B"
        raise InputError(message, field="evaluator")
    check_seed(seed)
    whole_number("samples", samples, 1)
    if limit is not None:
        whole_number("limit", limit, 1)
    return known


def _files(task: Task, profile: Profile, data_dir, download: bool) -> TaskFiles:
    """The task's files, fetched where they may be."""
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
    """Runs a task, or what is left of it; its result, written."""
    if name.startswith(HARNESS):
        return _run_harness(run, name, results, stop, tell)
    task = task_named(name)
    work = (text_run if task.kind == PERPLEXITY else example_run)(run, task, files[name])
    identity = identity_of(_facts(run, work.task, work.settings, work.data))
    path = result_path(results, name, identity)
    if path.exists():
        tell(f"{name}: done before, {path.name}")
        return load_result(path)
    with RecordFile(path.parent / _records_name(path)) as records:
        run_chunks(work, records, stop, tell)
        found = sorted(records.all, key=lambda record: (record["row"], record["sample"], record["id"]))
    skipped = work.skipped(found)
    result = Result(
        task=name,
        kind=work.kind,
        split=work.split,
        examples=len(found) - skipped.get("no_text", 0),
        skipped=skipped,
        figures=work.figures(found),
        settings=work.settings,
        data=work.data,
        seconds=round(sum(record.get("seconds", 0.0) for record in found), 3),
        notes=work.notes(found),
        identity=identity,
        records=_records_name(path),
        **_common(run, work.settings),
    )
    write_result(results, result)
    return result


def _run_harness(run: RunSettings, name: str, results, stop: Stop, tell: Tell) -> Result:
    """A task of the harness, which runs whole or not at all."""
    settings = {"profile": None, "model": run.subject.model.describe(), "evaluator": None}
    data = harness_files(name, run.data_dir)
    identity = identity_of(_facts(run, name, settings, data))
    path = result_path(results, name, identity)
    if path.exists():
        tell(f"{name}: done before, {path.name}")
        return load_result(path)
    if stop():
        raise RunError(EXIT_PREEMPTED, f"{name}: stopped before it began; the same command goes on")
    started = time.monotonic()
    outcome = run_harness(run, name, path.parent / _records_name(path))
    result = Result(
        task=name,
        kind="lm_eval",
        split=outcome.split,
        examples=outcome.examples,
        skipped={},
        figures=outcome.figures,
        settings=settings | {"harness": outcome.settings},
        data=data,
        seconds=round(time.monotonic() - started, 3),
        notes=["Figures are on the harness' own scale."],
        identity=identity,
        records=_records_name(path),
        **_common(run, settings),
    )
    write_result(results, result)
    return result


def _common(run: RunSettings, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of a result that its run decides."""
    judged = settings["evaluator"] is not None and run.evaluator is not None
    return {
        "profile": run.profile.name,
        "overrides": run.overrides,
        "limit": run.limit,
        "samples": run.samples,
        "seed": run.seed,
        "checkpoint": run.subject.origin,
        "evaluator": run.evaluator.origin if judged and run.evaluator else None,
        "versions": software_versions(),
    }


def _facts(run: RunSettings, task: str, settings: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """Everything that the numbers depend on: neither the size of batches nor where files lie."""
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


def _records_name(path) -> str:
    return path.name.removesuffix(".json") + RECORDS_SUFFIX
