"""`lm_eval:NAME`: a task of lm-evaluation-harness with its data set replaced by local files."""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from a3_jax.checks import check_seed
from a3_jax.data.documents import COMPRESSIONS, DocumentSource
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.models.interface import EvaluatedModel
from a3_jax.evaluation.task_run import RunSettings
from a3_jax.evaluation.tasks.files import TaskFiles
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.paths import as_path, local_path, read_beginning, refuse_pointer, without_mark, write_text

HARNESS = "lm_eval:"
_NOT_FIGURES = ("alias", "sample_len", "sample_count", "name")
# Builders of `datasets` by file suffix.
_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".jsonl.zst": "json",
    ".parquet": "parquet", ".csv": "csv",
}  # fmt: skip
_SPLIT_FIELDS = ("test_split", "validation_split", "training_split", "fewshot_split")
_BOOTSTRAPS = 1000  # for metrics whose standard error has no formula


@dataclasses.dataclass(frozen=True)
class HarnessResult:
    """The result of a task or group of the harness.

    Attributes:
      split: the split that was evaluated.
      examples: number of documents.
      figures: figures by metric, on the harness's scale, with the filter after a comma where there is one;
        those of a group's tasks as TASK/METRIC after the group's own.
      settings: versions, few-shot examples and configs of the tasks.
    """

    split: str
    examples: int
    figures: dict[str, Figure]
    settings: dict[str, Any]


def harness_files(name: str, data_dir) -> dict[str, str]:
    """Returns the SHA-256 of the local files of a task; empty where it has no directory."""
    if data_dir is None:
        return {}
    task, directory = name.removeprefix(HARNESS), local_path(data_dir, "lm-evaluation-harness")
    entry, directory = _known_tasks().task_index.get(task), directory / task
    if entry is None or not directory.is_dir():
        return {}
    splits = local_splits(directory, _splits_of(entry)).values()
    return TaskFiles(tuple(as_path(path) for files in splits for path in files)).sha256()


def run_harness(run: RunSettings, name: str, records_path) -> HarnessResult:
    """Runs a task of the harness and writes its documents' records."""
    task = name.removeprefix(HARNESS)
    found = run_lm_eval(
        run.subject.model, [task], run.data_dir,
        limit=run.limit, seed=run.seed, download=run.download, log_samples=True,
    )  # fmt: skip
    lines = [
        json.dumps({"task": one, **sample}, default=str)
        for one, documents in sorted((found.get("samples") or {}).items())
        for sample in documents
    ]
    write_text(records_path, "".join(f"{line}\n" for line in lines))
    counts = {one: number["effective"] for one, number in found.get("n-samples", {}).items()}
    figures: dict[str, Figure] = {}
    for one in sorted(found["results"], key=lambda one: one != task):
        front, count = "" if one == task else f"{one}/", counts.get(one, sum(counts.values()))
        figures |= {front + key: figure for key, figure in _figures(found["results"][one], count).items()}
    if not figures:
        raise InputError(f"{name} gave no figures", field="tasks")
    configs = found.get("configs", {}).values()
    splits = {config.get("test_split") or config.get("validation_split") or "" for config in configs}
    settings = {key: found[key] for key in ("versions", "n-shot", "configs") if key in found}
    return HarnessResult(", ".join(sorted(map(str, splits))), sum(counts.values()), figures, settings)


def _figures(entry: dict[str, Any], count: int) -> dict[str, Figure]:
    """Joins `acc,none` and `acc_stderr,none` into one figure, `acc`."""
    found = {}
    for key, value in entry.items():
        metric, _, kind = key.partition(",")
        if metric in _NOT_FIGURES or metric.endswith("_stderr") or isinstance(value, bool | str):
            continue
        error = entry.get(f"{metric}_stderr,{kind}")
        error = float(error) if isinstance(error, int | float) else None
        found[metric if kind in ("none", "") else key] = Figure(float(value), error, count)
    return found


def run_lm_eval(
    model: EvaluatedModel,
    task_names: Sequence[str],
    data_dir=None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bos: str = "auto",
    seed: int = 0,
    download: bool = False,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Runs tasks of lm-evaluation-harness.

        run_lm_eval(model, ["hellaswag"], "data")        reads data/hellaswag/validation.jsonl

    Args:
      model: the model that answers.
      task_names: tasks, groups or tags of the harness.
      data_dir: a task's rows are in DATA_DIR/TASK/SPLIT.jsonl (or .json, .jsonl.gz, .jsonl.zst, .parquet,
        .csv; SPLIT-00000-of-00004.parquet and so on), in the columns of its data set. Files of the split
        that is evaluated are needed, and with few-shot examples those of the split that they come from.
        Other files there, and the directories of other tasks, are left alone.
      limit: the most documents per task.
      num_fewshot: examples before each question; None: as the task says.
      bos: "auto", "yes" or "no".
      seed: seed of few-shot examples, and of what is drawn.
      download: whether data of tasks without local files is downloaded; otherwise they are refused.
      log_samples: whether the result holds each document's requests and answers.

    Returns:
      The result of `lm_eval.simple_evaluate`, as plain JSON.
    """
    check_seed(seed)
    manager = _known_tasks()
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from a3_jax.evaluation.lm_eval_model import HarnessModel

    for name in task_names:
        if name not in manager.task_index:
            raise InputError(
                f"unknown task {name!r} of lm-evaluation-harness{nearest(name, manager.all_tasks)}",
                field="tasks",
            )
    with (
        tempfile.TemporaryDirectory() as scratch,
        _network(download),
        _local_files(manager, task_names, data_dir, Path(scratch), num_fewshot) as local,
    ):
        if not download:
            _refuse_absent(manager, task_names, local, data_dir)
        results = simple_evaluate(
            model=HarnessModel(model, bos, seed),
            tasks=_load(manager, task_names, data_dir),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=log_samples,
            bootstrap_iters=_BOOTSTRAPS,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=None,  # type: ignore[arg-type]  # nothing here draws from torch
            fewshot_random_seed=seed,
        )
        return json.loads(json.dumps(results, default=handle_non_serializable))


def local_splits(directory, names: Container[str] | None = None) -> dict[str, list[str]]:
    """Returns the files of a task's directory by split: train-00000-of-00002.parquet belongs to train.

    Files of different kinds are refused: one data set can't have them.

    Args:
      names: the splits that count; None: all.
    """
    splits: dict[str, list[str]] = {}
    kinds = set()
    for path in sorted(directory.iterdir()):
        ending = next((end for end in _BUILDERS if path.name.endswith(end)), None)
        split = path.name.removesuffix(ending or "").split("-")[0]
        if ending is not None and (names is None or split in names):
            refuse_pointer(read_beginning(path), path)
            splits.setdefault(split, []).append(str(path))
            kinds.add(_BUILDERS[ending])
    if len(kinds) > 1:
        raise InputError(f"holds files of several kinds: {', '.join(sorted(kinds))}", file=directory)
    return splits


def _splits_of(entry) -> set[str]:
    """Returns the splits that a task's config names."""
    return {entry.cfg[name] for name in _SPLIT_FIELDS if (entry.cfg or {}).get(name)}


def _needed(index, names: Iterable[str]) -> set[str]:
    """Returns names of tasks, groups and tags, and of all members of the groups and tags."""
    found: set[str] = set()
    waiting: list[Any] = list(names)
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):  # a member with settings of its own, or a group written inside a group
            waiting += [item.get("group"), item.get("task")]
        elif isinstance(item, list):
            waiting += item
        elif item in index and item not in found:
            found.add(item)
            entry = index[item]
            is_tag = entry.yaml_path is None
            waiting += sorted(entry.tags) if is_tag else [(entry.cfg or {}).get("task")]
    return found


@functools.cache
def _known_tasks():
    """Reads the harness's index of its tasks: thousands of files, once."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        message = "lm-evaluation-harness is not installed: pip install 'a3_jax[eval]'"
        raise InputError(message, field="lm_eval") from error
    return TaskManager()


@contextlib.contextmanager
def _local_files(manager, task_names, data_dir, scratch: Path, num_fewshot: int | None) -> Iterator[set[str]]:
    """Points every requested task that has a directory of files to them, for a while; yields their names."""
    if data_dir is None:
        yield set()
        return
    data_dir, index = local_path(data_dir, "lm-evaluation-harness"), manager.task_index
    if not data_dir.is_dir():
        raise InputError("no such directory", file=data_dir, field="data_dir")
    replaced = {}
    try:
        for name in sorted(_needed(index, task_names)):
            entry, directory = index[name], data_dir / name
            if entry.yaml_path is None or "task" not in (entry.cfg or {}) or not directory.is_dir():
                continue
            splits = local_splits(directory, _splits_of(entry))
            if splits:
                copies = scratch / name
                splits = {split: [_plain(path, copies) for path in paths] for split, paths in splits.items()}
                config = _local_config(entry.cfg, entry.yaml_path, directory, splits, scratch, num_fewshot)
                path = scratch / f"{directory.name}.yaml"
                path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
                replaced[directory.name] = entry
                index[directory.name] = dataclasses.replace(entry, yaml_path=path)
        yield set(replaced)
    finally:
        index.update(replaced)


def _plain(path: str, copies: Path) -> str:
    """Returns the file, or a copy that `datasets` can read: no compression, no byte order mark."""
    beginning = read_beginning(path)
    is_plain = not path.endswith(tuple(COMPRESSIONS)) and without_mark(beginning, path) == beginning
    if path.endswith(".parquet") or is_plain:
        return path
    copies.mkdir(exist_ok=True)
    copy = copies / Path(path).name.removesuffix(".gz").removesuffix(".zst")
    try:
        with copy.open("wb") as file:
            file.writelines(DocumentSource(path).text_blocks())
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror or error}", file=path) from error
    return str(copy)


def _local_config(
    base: Mapping[str, Any], base_path, directory: Path, splits, scratch: Path, num_fewshot: int | None
) -> dict[str, Any]:
    """Returns a task's config with its data set replaced; splits that have no file don't exist."""
    evaluated = base.get("test_split") or base.get("validation_split") or base.get("training_split")
    needed = {evaluated: "the rows that are evaluated"}
    if (base.get("num_fewshot") or 0) if num_fewshot is None else num_fewshot:
        examples = base.get("fewshot_split") or base.get("training_split") or base.get("validation_split")
        needed.setdefault(examples or evaluated, "the few-shot examples")
    for split, what in needed.items():
        if split not in splits:
            raise InputError(
                f"no file of split {split!r} ({what}): {split}.jsonl, .parquet or .csv", file=directory
            )
    first = next(iter(splits.values()))[0]
    builder = next(kind for ending, kind in _BUILDERS.items() if first.endswith(ending))
    absent = {name: None for name in _SPLIT_FIELDS if base.get(name) and base[name] not in splits}
    return {
        "include": str(base_path),
        "dataset_path": builder,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(scratch / "cache")},
        **absent,
    }


def _refuse_absent(manager, task_names, local: set[str], data_dir) -> None:
    """Refuses tasks without files; members of groups are found out when they are loaded."""
    for name in task_names:
        entry = manager.task_index[name]
        config = entry.cfg or {}
        if name in local or "group" in config or "dataset_path" not in config:
            continue
        directory = Path(data_dir or "DATA_DIR") / name
        split = config.get("test_split") or config.get("validation_split")
        source = "/".join(filter(None, (config["dataset_path"], config.get("dataset_name"))))
        raise InputError(
            f"no local file for lm_eval:{name}: put {split}.jsonl, .parquet or .csv of the hub's data set "
            f"{source} there, or allow --download",
            file=directory,
        )


def _load(manager, task_names, data_dir) -> list[Any]:
    """Loads the tasks and groups with their rows."""
    loaded = []
    for name in task_names:
        try:
            found = manager.load([name])
            loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
        except InputError:
            raise
        except Exception as error:  # whatever the harness, `datasets` or a task's own code raises
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"lm_eval:{name} can't be loaded: {reason}", file=data_dir) from error
    return loaded


@contextlib.contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Lets `datasets` and the hub use the network or not; they read the environment only when imported."""
    from datasets import config
    from huggingface_hub import constants

    offline = [(config, "HF_DATASETS_OFFLINE"), (config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in offline]
    alone = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # forked beside JAX's threads, bootstraps could hang
    try:
        for module, name in offline:
            setattr(module, name, not allowed)
        yield
    finally:
        for (module, name), value in zip(offline, before, strict=True):
            setattr(module, name, value)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
