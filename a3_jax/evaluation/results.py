"""Results of evaluations as files: one JSON per run and task, whole or absent, and its records.

    DIR/hellaswag-1f0c93ab2e.json              figures, and every setting that they depend on
    DIR/hellaswag-1f0c93ab2e.records.jsonl     one example per line

The ten hex digits are a hash of the settings: other settings, checkpoints or data make other files.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.paths import GrowingFile, as_path, check_parents, read_bytes, read_json, write_json

SCHEMA = 1
RECORDS_SUFFIX = ".records.jsonl"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a task; the JSON file has these fields.

    Attributes:
      task, kind, profile, split: names. `task` may be "lm_eval:NAME".
      examples: number of examples that count.
      skipped: number of those that do not, by reason.
      figures: figures by metric, the headline first: in points (x100), perplexities as they are, those of
        lm_eval on the harness's own scale.
      settings: {"profile", "model", "evaluator"}: every switch, changed ones included.
      overrides: the caller's changes to the profile of this name.
      limit: the most rows that were asked for; None: as many as the profile says.
      samples, seed: as `evaluate` takes them.
      checkpoint, evaluator: {"path", "fingerprint"}; no evaluator: None.
      data: SHA-256 by file name.
      versions: versions of the software.
      seconds: time of all the runs that it took.
      notes: what else a reader must know.
      identity: hex digest of what the figures depend on.
      records: file name of the records beside this one.
    """

    task: str
    kind: str
    profile: str
    split: str
    examples: int
    skipped: dict[str, int]
    figures: dict[str, Figure]
    settings: dict[str, Any]
    overrides: dict[str, Any]
    limit: int | None
    samples: int
    seed: int
    checkpoint: dict[str, Any]
    evaluator: dict[str, Any] | None
    data: dict[str, str]
    versions: dict[str, str]
    seconds: float
    notes: list[str]
    identity: str
    records: str
    schema: int = SCHEMA

    def figure(self, metric: str) -> Figure | None:
        """Returns a figure by name, or None."""
        return self.figures.get(metric)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON, the schema first."""
        return {"schema": self.schema, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, value: dict[str, Any], file=None) -> "Result":
        """Reads the JSON of a file; refuses another schema version, missing fields and wrong types."""
        schema = value.get("schema")
        if schema != SCHEMA:
            message = f"version {SCHEMA} is read, this is {schema!r}: run the evaluation again"
            raise InputError(message, file=file, field="schema")
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in value:
                raise InputError("is missing from the result", file=file, field=name)
        for name, kind in _KINDS.items():
            if not isinstance(value[name], kind):
                raise InputError(f"must be a {kind.__name__}", file=file, field=name)
        figures = {name: _figure(name, figure, file) for name, figure in value["figures"].items()}
        found: dict[str, Any] = {name: value[name] for name in fields}
        return cls(**{**found, "figures": figures})


_KINDS = {
    "task": str, "profile": str, "examples": int, "skipped": dict, "figures": dict, "settings": dict,
    "overrides": dict, "checkpoint": dict, "notes": list, "identity": str,
}  # fmt: skip


class RecordFile:
    """The records of a task in progress: JSON lines, appended, so that an interrupted run can continue.

    A last line without its end was cut off by the interruption and is dropped. Any other damage is an error:
    figures of fewer examples than the run had would be silently wrong.

    Attributes:
      all: the records so far, in the order of the file.
    """

    def __init__(self, path):
        """Opens a file, or begins it."""
        path = as_path(path)
        lines = read_bytes(path).split(b"\n")[:-1] if path.exists() else []
        self.all = [_record(line, path, number) for number, line in enumerate(lines, start=1)]
        self._file = GrowingFile(path, b"".join(line + b"\n" for line in lines))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Adds records; once this returns they survive a crash of the process or the machine."""
        added = list(records)
        self._file.append("".join(json.dumps(record) + "\n" for record in added).encode())
        self.all.extend(added)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.__exit__()


def record_key(record: dict[str, Any]) -> tuple[str, int, int]:
    """Returns what names a record's example: its id, row and sample."""
    return record["id"], record["row"], record["sample"]


def identity_of(facts: dict[str, Any]) -> str:
    """Returns the SHA-256 (hex) of plain JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def result_path(directory, task: str, identity: str):
    """Returns DIR/TASK-HEX.json, with dashes for special characters of the task's name."""
    return as_path(directory) / f"{re.sub('[^A-Za-z0-9_.]+', '-', task)}-{identity[:10]}.json"


def check_directory(directory) -> None:
    """Refuses, before anything runs, a directory of results that is a file or below one."""
    check_parents(as_path(directory) / "result.json")


def write_result(directory, result: Result) -> None:
    """Writes DIR/TASK-HEX.json, whole or not at all."""
    write_json(result_path(directory, result.task, result.identity), result.to_dict())


def load_result(path) -> Result:
    """Reads a result."""
    return Result.from_dict(read_json(path), path)


def load_results(directory) -> list[Result]:
    """Reads all results of a directory, in order of task and file name."""
    folder = as_path(directory)
    if not folder.is_dir():
        raise InputError("no such directory of results", file=folder)
    return sorted((load_result(path) for path in sorted(folder.glob("*.json"))), key=lambda each: each.task)


def _figure(name: str, value, file) -> Figure:
    if not isinstance(value, dict) or sorted(value) != ["count", "standard_error", "value"]:
        message = "must have value, standard_error and count"
        raise InputError(message, file=file, field=f"figures.{name}")
    for key in ("value", "standard_error", "count"):
        is_number = isinstance(value[key], int | float) and not isinstance(value[key], bool)
        if not is_number and not (key == "standard_error" and value[key] is None):
            raise InputError("must be a number", file=file, field=f"figures.{name}.{key}")
    return Figure(**value)


def _record(line: bytes, path, number: int) -> dict[str, Any]:
    record = None
    with contextlib.suppress(ValueError):
        record = json.loads(line)
    if not isinstance(record, dict) or not {"id", "row", "sample"} <= record.keys():
        raise InputError("is no record: remove the file to evaluate anew", file=path, line=number)
    return record
