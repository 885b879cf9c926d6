"""Rows of data files: parquet, JSON lines (plain, .gz, .zst), a JSON list, CSV, plain text, label files.

A row is checked when it is read: every column present and of its kind, labels among those that the task
knows. Errors name the file and the row; rows count from 1, as lines do in JSON lines.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

from a3_jax.data.documents import BadRecord, DocumentSource, check_single
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.tasks.catalogue import Field, Task
from a3_jax.paths import as_path, local_path, parse_json, read_text, snapshot_hint

_BLOCK = 1 << 20
_STREAMED = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_READABLE = (*_STREAMED, ".json", ".csv", ".txt")


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """The files of a task.

    Attributes:
      paths: files of its rows, in order; none for a task without data.
      labels: the file with one label per line, where labels have a file of their own.
      shots: files of the training rows.
    """

    paths: tuple[Any, ...] = ()
    labels: Any = None
    shots: tuple[Any, ...] = ()

    def sha256(self) -> dict[str, str]:
        """Returns the SHA-256 (hex) of each file by name: what a result was measured on."""
        files = [*self.paths, *([self.labels] if self.labels else []), *self.shots]
        found = {}
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            found[path.name] = digest.hexdigest()
        return found


@dataclasses.dataclass(frozen=True)
class DataRow:
    """A row of a task.

    Attributes:
      number: its number in its file, from 1.
      file: the file's path.
      values: by field name: a text, a list of texts, the index of a label, or TriviaQA's answer as
        {"aliases", "normalized_aliases"}. Columns that were not required may be missing.
    """

    number: int
    file: str
    values: dict[str, Any]

    def error(self, message: str, field: str | None = None) -> InputError:
        """Returns an error about this row."""
        return InputError(message, file=self.file, line=self.number, field=field)


def find_data(task: Task, data_dir, shots: bool = False) -> TaskFiles:
    """Finds the files of a task; reads nothing yet.

    Args:
      data_dir: a directory that is searched for the task's file names, a sub-directory of the task's name
        first; or the file itself.
      shots: whether the training rows are wanted too.
    """
    if not task.files:
        return TaskFiles()
    if data_dir is None:
        raise _missing(task, task.file_names, "no data directory given", None)
    directory = as_path(data_dir)
    paths = (directory,) if _is_file(directory) else _first_match(task, directory, task.file_names)
    if not paths:
        reason = (
            f"no file of this task{snapshot_hint(directory)}" if directory.exists() else "no such directory"
        )
        raise _missing(task, task.file_names, reason, directory)
    for path in paths:
        if not path.name.endswith(_READABLE):
            raise InputError(f"not a file that is read: {', '.join(_READABLE)}", file=path)
    shot_files = ()
    if shots:
        folder = paths[0].parent if _is_file(directory) else directory
        shot_files = _first_match(task, folder, task.shots_files)
        if not shot_files:
            raise _missing(
                task, task.shots_files, "no training rows, of which the prompts are made", directory
            )
    return TaskFiles(paths, _labels_beside(task, paths[0]), shot_files)


def read_rows(
    task: Task, files: TaskFiles, limit: int | None = None, shots: bool = False
) -> Iterator[DataRow]:
    """Yields the checked rows of a task in file order, read on demand.

    Args:
      limit: the most rows; None: all.
      shots: whether to read the training rows instead.
    """
    given = _records(files.shots if shots else files.paths, task)
    labels = None if shots or files.labels is None else read_text(files.labels).split()
    count = 0
    for path, number, record in given:
        if limit is not None and count >= limit:
            return
        row = DataRow(number, str(path), record)
        if labels is not None:
            record = _with_label(task, record, labels, row, files.labels)
        yield DataRow(number, str(path), dict(_checked(task, row, record)))
        count += 1
    if labels is not None and len(labels) != count:
        raise InputError(f"holds {len(labels)} labels, the data file {count} rows", file=files.labels)
    if not count and limit != 0:
        raise InputError("holds no rows", file=(files.shots if shots else files.paths)[0])


def fetch_data(task: Task, data_dir) -> None:
    """Downloads a task's files from the Hugging Face hub into DATA_DIR/TASK: only on the user's request."""
    if task.hub is None:
        raise InputError(f"{task.name} is not on the hub: {task.where}", field="download")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        message = "needs the package huggingface_hub: pip install huggingface_hub"
        raise InputError(message, field="download") from error
    name, patterns = task.hub
    directory = local_path(data_dir, "the hub's client") / task.name
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns), local_dir=str(directory))
    except Exception as error:  # whatever the hub's client, the network or the disk raises
        raise InputError(
            f"{name} can't be fetched: {type(error).__name__}: {error}", file=directory
        ) from error


def _is_file(path) -> bool:
    return path.exists() and not path.is_dir()


def _first_match(task: Task, directory, names) -> tuple[Any, ...]:
    """Returns the files of the first name that exists; several where it is a pattern."""
    for folder in (directory / task.name, directory):
        for name in names:
            found = sorted(folder.glob(name)) if "*" in name and folder.exists() else [folder / name]
            found = tuple(path for path in found if _is_file(path))
            if found:
                return found
    return ()


def _missing(task: Task, names, reason: str, directory) -> InputError:
    wanted = " or ".join(names)
    return InputError(
        f"{reason}: {task.name} needs {wanted}, with columns {task.columns}; get it from {task.where}",
        file=directory,
        field=None if directory is not None else "data_dir",
    )


def _labels_beside(task: Task, path):
    """Returns the label file that belongs to a data file, if there is one."""
    if task.labels_file is None:
        return None
    data_name, labels_name = task.labels_file
    names = [labels_name] if path.name == data_name else []
    names.append(f"{path.name.split('.jsonl')[0]}-labels.lst")
    return next((path.parent / name for name in names if _is_file(path.parent / name)), None)


def _with_label(task: Task, record: dict, labels: list[str], row: DataRow, file) -> dict:
    label = next(field for field in task.fields if field.kind == "label")
    if any(name in record for name in label.names):  # it has its own: the file beside is another's
        return record
    if row.number > len(labels):
        raise InputError(f"holds {len(labels)} labels, {row.file} has a row {row.number}", file=file)
    return {**record, label.name: labels[row.number - 1]}


def _records(paths, task: Task) -> Iterator[tuple[Any, int, dict]]:
    """Yields (file, number from 1, the columns as they are in the file)."""
    for path in paths:
        if path.name.endswith(_STREAMED):
            yield from _streamed(path, task)
        else:
            readers = {".json": _json_list, ".csv": _csv_rows, ".txt": _lines}
            for number, record in readers[path.suffix](path, task):
                yield path, number, record


def _streamed(path, task: Task) -> Iterator[tuple[Any, int, dict]]:
    source = DocumentSource(str(path))
    names = source.column_names() if path.name.endswith(".parquet") else []
    columns = [_present(field, names, path) for field in task.fields] if names else []
    for number, record in source.records([name for name in columns if name]):
        if isinstance(record, BadRecord):
            raise InputError(record.message, file=path, line=number + 1, field=record.field)
        yield path, number + 1, record


def _present(field: Field, names, path) -> str | None:
    """Returns which of a field's names a table has."""
    found = next((name for name in field.names if name in names), None)
    if found is None and field.required:
        message = f"no such column{nearest(field.name, names) or ': it has ' + ', '.join(names)}"
        raise InputError(message, file=path, field=field.name)
    if found is not None:
        check_single(found, names, path)
    return found


def _json_list(path, task: Task) -> Iterator[tuple[int, dict]]:
    """Yields the objects of a JSON list, or of JSON lines under this file name."""
    del task
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = enumerate(parse_json(text, path), start=1)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = ((number, _json_line(line, path, number)) for number, line in lines if line.strip())
    for number, record in rows:
        if not isinstance(record, dict):
            message = f"expected a JSON object, got {type(record).__name__}"
            raise InputError(message, file=path, line=number)
        yield number, record


def _json_line(line: str, path, number: int):
    try:
        return json.loads(line.removeprefix("\ufeff"))  # files with a byte order mark may have been joined
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", file=path, line=number) from error


def _csv_rows(path, task: Task) -> Iterator[tuple[int, dict]]:
    """Yields rows under a heading: quotes as in RFC 4180, any line ends. The first row below it is 1."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    number = 0
    try:
        names = [name.strip() for name in next(reader, [])]
        for field in task.fields:
            _present(field, names, path)
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(names):
                message = f"has {len(cells)} cells, the heading {len(names)}"
                raise InputError(message, file=path, line=number)
            yield number, dict(zip(names, cells))
    except csv.Error as error:
        raise InputError(f"not CSV: {error}", file=path, line=number + 1) from error


def _lines(path, task: Task) -> Iterator[tuple[int, dict]]:
    """Yields non-empty lines, as the task's only column."""
    if len([field for field in task.fields if field.required]) > 1:
        raise InputError(f"plain text has no columns; {task.name} needs {task.columns}", file=path)
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, {task.fields[0].name: line.rstrip("\r")}


def _checked(task: Task, row: DataRow, record: dict) -> Iterator[tuple[str, Any]]:
    """Yields (field, value) of the columns of a row, each of the kind that the task says."""
    for field in task.fields:
        name = next((name for name in field.names if name in record), None)
        if name is not None:
            yield field.name, _value(task, row, field, record[name])
        elif field.required:
            message = f"is missing{nearest(field.name, record) or '; the row has ' + ', '.join(record)}"
            if field.kind == "label" and task.labels_file:
                message += f", and no {task.labels_file[1]} is beside it"
            raise row.error(message, field.name)


def _value(task: Task, row: DataRow, field: Field, value) -> Any:
    """Checks a value; labels become the index of the choice, identifiers texts."""
    if field.kind == "answer":
        return _aliases(row, field, value)
    if field.kind == "texts":
        if not isinstance(value, list | tuple) or len(value) != len(task.labels):
            got = f"{len(value)} of them" if isinstance(value, list | tuple) else _type(value)
            raise row.error(f"must be a list of {len(task.labels)} texts, got {got}", field.name)
        return [_text(row, field, text) for text in value]
    if field.kind == "text":
        return _text(row, field, value)
    is_name = isinstance(value, str | int) and not isinstance(value, bool)  # files hold either
    if field.kind == "id":
        if not is_name:
            raise row.error(f"must be a text or a whole number, got {_type(value)}", field.name)
        return str(value)
    if not is_name:
        raise row.error(f"must be one of {', '.join(task.labels)}, got {_type(value)}", field.name)
    label = str(value).strip()
    if label in ("", "-1"):
        message = f"has no label ({value!r}), as in a test split: take the validation split"
        raise row.error(message, field.name)
    if label not in task.labels:
        raise row.error(f"must be one of {', '.join(task.labels)}, got {value!r}", field.name)
    return task.labels.index(label)


def _text(row: DataRow, field: Field, value) -> str:
    if not isinstance(value, str):
        raise row.error(f"must be a text, got {_type(value)}", field.name)
    if not value.strip() and not field.may_be_empty:
        raise row.error("is empty", field.name)
    return value


def _aliases(row: DataRow, field: Field, value) -> dict[str, list[str]]:
    """Returns the aliases of a TriviaQA answer, as written and normalised by the data set's authors."""
    if not isinstance(value, dict):
        raise row.error(f"must be a record with aliases, got {_type(value)}", field.name)
    found = {}
    for name in ("aliases", "normalized_aliases"):
        texts = value.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise row.error(f"must be a list of texts, got {_type(texts)}", f"{field.name}.{name}")
        found[name] = texts
    if not any(alias.strip() for alias in found["aliases"]):
        raise row.error("has no alias", f"{field.name}.aliases")
    return found


def _type(value) -> str:
    return "nothing" if value is None else type(value).__name__
