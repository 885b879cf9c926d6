"""The paper's tables beside results: RESULTS/ROW/*.json against `paper_tables.json`.

A result belongs to the row whose directory it lies in and to the columns of its task. It counts if it is of
the profile that is asked for and of the row's kind of model. Directories that are no row of the paper's are
rows of their own, below the others.
"""

import dataclasses
import math
from typing import Any

from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.published import Published, published, sources, statuses
from a3_jax.evaluation.recipes import ROWS, PaperTable, TableRow, data_files, evaluation_command, needs
from a3_jax.evaluation.results import Result, load_results
from a3_jax.evaluation.tasks.catalogue import TASKS, Task
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.evaluation.tasks.profiles import DEFAULT_PROFILE, profile_named
from a3_jax.paths import as_path

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure of the paper and ours.

    Attributes:
      task, metric: of our results. paper_metric: as the paper's table is kept here.
      published: None where the paper has none (a row of one's own).
      ours, result: None where nothing ran.
      standard_errors: (ours - published) in standard errors of ours; the paper states none of its own. None
        where one is missing or the error is zero or unknown.
      changes: how the result differs from its profile; () for not at all.
    """

    task: Task
    metric: str
    paper_metric: str
    published: Published | None
    ours: Figure | None
    result: Result | None
    standard_errors: float | None
    changes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RowComparison:
    """A row.

    Attributes:
      name: of its directory. label: in the table.
      recipe: None for a row of one's own.
      missing: tasks of the cells that did not run; `commands` run them and take `needs`, data files apart.
    """

    name: str
    label: str
    recipe: TableRow | None
    cells: tuple[Cell, ...]
    missing: tuple[Task, ...]
    commands: tuple[str, ...]
    needs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table; `notes` are the table's and those about the results that were found."""

    table: PaperTable
    profile: str
    results: str
    rows: tuple[RowComparison, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; docs/evaluation.md tells the fields."""
        return {
            "schema": SCHEMA,
            "table": self.table.name,
            "title": self.table.title,
            "profile": self.profile,
            "results": self.results,
            "lower_is_better": self.table.lower_is_better,
            "rows": [_row_dict(row, self.profile, self.results) for row in self.rows],
            "notes": list(self.notes),
            "sources": sources(),
            "statuses": statuses(),
        }


def compare(table: PaperTable, results, profile: str = DEFAULT_PROFILE) -> Comparison:
    """A table of the paper beside the results in a directory.

    Args:
      table: of `recipes.PAPER_TABLES`.
      results: directory with a directory a row, such as RESULTS/a3-1b/.
      profile: of the results that count.

    A directory that is absent is one without results.

    Raises:
      InputError: no such profile, or a damaged result.
    """
    profile_named(profile)
    found, notes = _read(results), list(table.notes)
    if not any(found.values()):
        notes.append(f"No results in {results}/ROW/ so far.")
    if loose := len(found.pop("", ())):
        notes.append(f"{loose} results in {results} itself are in no row: move them to {results}/ROW.")
    rows = []
    for name, label in table.rows:
        used, told = _usable(name, ROWS[name].model, found.get(name, ()), profile)
        rows.append(_compare_row(table, ROWS[name], label, used, profile, str(results)))
        notes += told
    for name, model, label in _own_rows(found):
        used, told = _usable(name, model, found[name], profile)
        row = _compare_row(table, None, label, used, profile, str(results))
        if any(cell.ours for cell in row.cells):
            rows.append(row)
            notes += [f"{label} is a row of your own{nearest(name, ROWS) or '.'}", *told]
    return Comparison(table, profile, str(results), tuple(rows), tuple(notes))


def _own_rows(found) -> list[tuple[str, str | None, str]]:
    """(directory, kind of model, label) of the rows that are none of the paper's: one a kind."""
    rows = []
    for name in sorted(set(found) - set(ROWS)):
        kinds = sorted({str(_model_of(each)) for each in found[name]})
        rows += [(name, kind, name if len(kinds) == 1 else f"{name} ({kind})") for kind in kinds]
    return rows


def _read(results) -> dict[str, list[Result]]:
    """The results of each row's directory; of the directory itself under ""."""
    place = as_path(results)
    if not place.is_dir():
        if place.exists():
            raise InputError("is a file; a directory of results is wanted", file=results, field="--results")
        return {}
    found = {"": load_results(place)}
    for child in sorted(place.iterdir()):
        if child.is_dir():
            found[child.name] = [
                each for each in load_results(child) if each.task in TASKS
            ]  # not the harness'
    return found


def _usable(name, model, found, profile) -> tuple[list[Result], list[str]]:
    """The results of a row that count, and what is to be said of the others."""
    right = [each for each in found if model in (None, str(_model_of(each)))]
    notes = []
    if name in ROWS and len(right) < len(found):
        notes.append(f"{name}: {len(found) - len(right)} results of another kind of model are left out.")
    used = [each for each in right if each.profile == profile]
    if (count := len({each.checkpoint.get("fingerprint") for each in used})) > 1:
        notes.append(f"{name} mixes results of {count} checkpoints: keep one checkpoint's in a directory.")
    if others := sorted({each.profile for each in right if each.profile != profile}):
        notes.append(
            f"{name} has results of other profiles: {', '.join(f'--profile={one}' for one in others)}."
        )
    return used, notes


def _model_of(result: Result) -> str | None:
    return (result.settings.get("profile") or {}).get("model")


def _changes(result: Result) -> tuple[str, ...]:
    told = [f"{name}={value}" for name, value in sorted(result.overrides.items())]
    return (*([] if result.limit is None else [f"--limit={result.limit}"]), *told)


def _best(results: list[Result], task: Task, metric: str) -> Result | None:
    """Of several runs of a cell the one that is the profile as it is; of those the one with most examples."""
    having = [each for each in results if each.task == task.name and each.figure(metric)]
    return max(having, key=lambda each: (not _changes(each), each.examples, each.identity), default=None)


def _compare_row(table, recipe, label, results, profile, directory) -> RowComparison:
    figures = published(table.key)
    cells = []
    for task, metric, paper_metric in table.columns:
        known, result = figures.get((label, paper_metric)), _best(results, task, metric)
        ours = result.figure(metric) if result else None
        changes = _changes(result) if result else ()
        cells.append(Cell(task, metric, paper_metric, known, ours, result, _distance(known, ours), changes))
    left = tuple({cell.task.name: cell.task for cell in cells if cell.ours is None}.values())
    commands = _commands(recipe, left, profile, directory)
    takes = tuple(needs(recipe, left)) if recipe and commands else ()
    name = recipe.name if recipe else label
    return RowComparison(name, label, recipe, tuple(cells), left, commands, takes)


def _commands(recipe: TableRow | None, tasks, profile: str, directory: str) -> tuple[str, ...]:
    """What runs tasks of a row; () if nothing is missing, or nothing can run it."""
    if recipe is None or recipe.model is None or not tasks:
        return ()
    return (*recipe.commands, evaluation_command(recipe, tasks, profile, directory))


def _distance(known: Published | None, ours: Figure | None) -> float | None:
    """(ours - published) in standard errors of ours, or None."""
    if known is None or ours is None or not ours.standard_error:
        return None
    distance = (ours.value - known.value) / ours.standard_error
    return distance if math.isfinite(distance) else None


def _row_dict(row: RowComparison, profile: str, directory: str) -> dict[str, Any]:
    return {
        "row": row.name,
        "model": row.label,
        "why_cited": row.recipe.why_cited if row.recipe else "",
        "commands": list(row.commands),
        "needs": [*row.needs, *(data_files(row.missing) if row.commands else ())],
        "cells": [_cell_dict(cell, row.recipe, profile, directory) for cell in row.cells],
    }


def _cell_dict(cell: Cell, recipe: TableRow | None, profile: str, directory: str) -> dict[str, Any]:
    value: dict[str, Any] = {"task": cell.task.name, "metric": cell.metric, "paper_metric": cell.paper_metric}
    value["published"] = dataclasses.asdict(cell.published) if cell.published else None
    value["ours"] = None
    if cell.ours and cell.result:
        value["ours"] = {
            **dataclasses.asdict(cell.ours),
            "profile": cell.result.profile,
            "changes": list(cell.changes),
            "seed": cell.result.seed,
            "skipped": cell.result.skipped,
            "checkpoint": cell.result.checkpoint,
            "identity": cell.result.identity,
        }
    value["standard_errors"] = cell.standard_errors
    if cell.ours is None:
        commands = _commands(recipe, (cell.task,), profile, directory)
        takes = [*needs(recipe, (cell.task,)), *data_files((cell.task,))] if recipe and commands else []
        value["commands"], value["needs"] = list(commands), takes
    return value
