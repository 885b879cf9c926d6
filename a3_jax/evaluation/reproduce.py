"""The paper's tables beside results: RESULTS/ROW/*.json against `paper_tables.json`.

A result belongs to the row of its directory and to the columns of its task. It counts if it has the requested
profile and the row's kind of model. Other directories are rows of their own, below the paper's.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.paper_tables import (
    COPIED,
    ROWS,
    SUSPECT,
    PaperTable,
    Published,
    TableRow,
    data_files,
    evaluation_command,
    needs,
    published,
    sources,
    statuses,
)  # fmt: skip
from a3_jax.evaluation.results import Result, load_results
from a3_jax.evaluation.tasks.catalogue import TASKS, Task
from a3_jax.evaluation.tasks.metrics import Figure
from a3_jax.evaluation.tasks.profiles import DEFAULT_PROFILE, profile_named
from a3_jax.paths import as_path

NOT_RUN, CITED, CHANGED = "not run", "cited", "~"
_MARKS = {COPIED: "*", SUSPECT: "?"}
_LEGEND = "Each cell: the paper's figure; ours with its standard error; their difference in standard errors."
_EXPLANATIONS = {
    "*": "* copied in the paper from DiffuLLaMA, arXiv 2410.17891",
    "?": "? probably a slip of the paper: equal to the ROCStories figures of Llama-3.1-8B",
}
_HEADINGS = {
    "triviaqa_em": "TriviaQA", "hellaswag_acc": "HellaSwag", "winogrande_acc": "WinoGrande",
    "siqa_acc": "SIQA", "piqa_acc": "PIQA", "rocstories_rouge1": "ROC R-1", "rocstories_rouge2": "ROC R-2",
    "rocstories_rougeL": "ROC R-L",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure of the paper and ours.

    Attributes:
      task, metric: the task and metric of our results.
      paper_metric: the metric's name in `paper_tables.json`.
      published: the paper's figure; None where it has none (a row of your own).
      result: our result; None where nothing ran.
    """

    task: Task
    metric: str
    paper_metric: str
    published: Published | None
    result: Result | None

    @property
    def ours(self) -> Figure | None:
        """Our figure; None where nothing ran."""
        return self.result.figure(self.metric) if self.result else None

    @property
    def standard_errors(self) -> float | None:
        """(ours - published) in standard errors of ours, as the paper states none; None where unknown."""
        if self.published is None or self.ours is None or not self.ours.standard_error:
            return None
        distance = (self.ours.value - self.published.value) / self.ours.standard_error
        return distance if math.isfinite(distance) else None

    @property
    def changes(self) -> tuple[str, ...]:
        """The result's differences from its profile; () if it has none."""
        return _changes(self.result) if self.result else ()

    def to_dict(self, row: "RowComparison") -> dict[str, Any]:
        """Returns plain JSON; with the commands of the row where nothing ran."""
        value: dict[str, Any] = {
            "task": self.task.name,
            "metric": self.metric,
            "paper_metric": self.paper_metric,
            "published": dataclasses.asdict(self.published) if self.published else None,
            "ours": None,
            "standard_errors": self.standard_errors,
        }
        if self.ours is None or self.result is None:
            commands = row.commands_of((self.task,))
            needed = [*row.needs_of((self.task,)), *(data_files((self.task,)) if commands else ())]
            return {**value, "commands": list(commands), "needs": needed}
        value["ours"] = {
            **dataclasses.asdict(self.ours),
            "profile": self.result.profile,
            "changes": list(self.changes),
            "seed": self.result.seed,
            "skipped": self.result.skipped,
            "checkpoint": self.result.checkpoint,
            "identity": self.result.identity,
        }
        return value


@dataclasses.dataclass(frozen=True)
class RowComparison:
    """A row.

    Attributes:
      label: its label in the table.
      recipe: the paper's row; None for a row of your own.
      cells: its cells, from left to right.
      profile: profile of the results that count.
      results: the directory of all rows' directories.
    """

    label: str
    recipe: TableRow | None
    cells: tuple[Cell, ...]
    profile: str
    results: str

    @property
    def name(self) -> str:
        """Name of its directory; of a row of your own its label."""
        return self.recipe.name if self.recipe else self.label

    @property
    def missing(self) -> tuple[Task, ...]:
        """Tasks of the cells that did not run."""
        return tuple({cell.task.name: cell.task for cell in self.cells if cell.ours is None}.values())

    @property
    def commands(self) -> tuple[str, ...]:
        """Commands that run the missing tasks."""
        return self.commands_of(self.missing)

    @property
    def needs(self) -> tuple[str, ...]:
        """The needs of these commands, except for data files."""
        return self.needs_of(self.missing)

    def commands_of(self, tasks: Sequence[Task]) -> tuple[str, ...]:
        """Returns the commands that run tasks; () if there are none, or nothing can run the row."""
        if self.recipe is None or self.recipe.model is None or not tasks:
            return ()
        return (*self.recipe.commands, evaluation_command(self.recipe, tasks, self.profile, self.results))

    def needs_of(self, tasks: Sequence[Task]) -> tuple[str, ...]:
        """Returns what the commands of tasks need, except for data files."""
        return tuple(needs(self.recipe, tasks)) if self.recipe and self.commands_of(tasks) else ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return {
            "row": self.name,
            "model": self.label,
            "why_cited": self.recipe.why_cited if self.recipe else "",
            "commands": list(self.commands),
            "needs": [*self.needs, *(data_files(self.missing) if self.commands else ())],
            "cells": [cell.to_dict(self) for cell in self.cells],
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table; `notes` are the table's and those about the results that were found."""

    table: PaperTable
    profile: str
    results: str
    rows: tuple[RowComparison, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON; docs/evaluation.md lists the fields."""
        return {
            "schema": 1,
            "table": self.table.name,
            "title": self.table.title,
            "profile": self.profile,
            "results": self.results,
            "lower_is_better": self.table.lower_is_better,
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
            "sources": sources(),
            "statuses": statuses(),
        }


def compare(table: PaperTable, results, profile: str = DEFAULT_PROFILE) -> Comparison:
    """Puts a table of the paper beside the results in a directory.

    Args:
      table: one of `PAPER_TABLES`.
      results: directory with one directory per row, such as RESULTS/a3-1b/; an absent one has no results.
      profile: profile of the results that count.
    """
    profile_named(profile)
    found, notes = _read(results), list(table.notes)
    if not any(found.values()):
        notes.append(f"No results in {results}/ROW/ so far.")
    if loose := len(found.pop("", ())):
        notes.append(f"{loose} results in {results} itself are in no row: move them to {results}/ROW.")
    figures, rows = published(table.key), []

    def row_of(recipe: TableRow | None, label: str, used: list[Result]) -> RowComparison:
        cells = tuple(
            Cell(task, metric, name, figures.get((label, name)), _best(used, task, metric))
            for task, metric, name in table.columns
        )
        return RowComparison(label, recipe, cells, profile, str(results))

    for name, label in table.rows:
        used, about = _usable(name, ROWS[name].model, found.get(name, ()), profile)
        rows.append(row_of(ROWS[name], label, used))
        notes += about
    for name in sorted(set(found) - set(ROWS)):  # your own rows, one per kind of model
        kinds = sorted({str(_model_of(each)) for each in found[name]})
        for kind in kinds:
            label = name if len(kinds) == 1 else f"{name} ({kind})"
            used, about = _usable(name, kind, found[name], profile)
            row = row_of(None, label, used)
            if any(cell.ours for cell in row.cells):
                rows.append(row)
                notes += [f"{label} is a row of your own{nearest(name, ROWS) or '.'}", *about]
    return Comparison(table, profile, str(results), tuple(rows), tuple(notes))


def _read(results) -> dict[str, list[Result]]:
    """Reads the results of each row's directory; those of the directory itself are under ""."""
    folder = as_path(results)
    if not folder.is_dir():
        if folder.exists():
            raise InputError("is a file; a directory of results is wanted", file=results, field="--results")
        return {}
    found = {"": load_results(folder)}
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            # The harness's results are on another scale.
            found[child.name] = [each for each in load_results(child) if each.task in TASKS]
    return found


def _usable(name, model, found, profile) -> tuple[list[Result], list[str]]:
    """Returns the results of a row that count, and notes about the others."""
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
    overrides = [f"{name}={value}" for name, value in sorted(result.overrides.items())]
    return (*([] if result.limit is None else [f"--limit={result.limit}"]), *overrides)


def _best(results: list[Result], task: Task, metric: str) -> Result | None:
    """Chooses among runs of a cell: the unchanged profile first, then the most examples."""
    having = [each for each in results if each.task == task.name and each.figure(metric)]
    return max(having, key=lambda each: (not _changes(each), each.examples, each.identity), default=None)


def headings(comparison: Comparison) -> list[str]:
    """Returns the headings of the columns, that of the rows' labels first."""
    names = [name for _, _, name in comparison.table.columns]
    return ["model", *(_HEADINGS.get(name) or name.removeprefix("ppl_").replace("_", " ") for name in names)]


def cell_lines(cell: Cell, row: RowComparison) -> list[str]:
    """Returns the lines of a cell: the paper's figure, ours, and the difference where there is one."""
    known, ours = cell.published, cell.ours
    lines = [f"{known.value:.1f}{_MARKS.get(known.status, '')}" if known else "-"]
    if ours is None:
        return [*lines, CITED if row.recipe is not None and row.recipe.why_cited else NOT_RUN]
    error = "" if ours.standard_error is None else f"±{ours.standard_error:.1f}"
    lines.append(f"{ours.value:.1f}{error}{CHANGED if cell.changes else ''}")
    if cell.standard_errors is not None:
        lines.append(f"{cell.standard_errors:+.1f} SE")
    return lines


def rows_of_text(comparison: Comparison, between: str) -> list[list[str]]:
    """Returns the table's rows, the lines of a cell joined by `between`."""
    return [
        [row.label, *(between.join(cell_lines(cell, row)) for cell in row.cells)] for row in comparison.rows
    ]


def footnotes(comparison: Comparison) -> list[str]:
    """Returns the legend, the marks that occur, what is special about results, and the notes."""
    cells = [(row, cell) for row in comparison.rows for cell in row.cells]
    marks = {_MARKS.get(cell.published.status, "") for _, cell in cells if cell.published}
    notes = [_LEGEND, *(text for mark, text in _EXPLANATIONS.items() if mark in marks)]
    for row, cell in cells:
        if cell.changes:
            changes = ", ".join(cell.changes)
            notes.append(f"{CHANGED} {row.label}, {cell.task.name}: not the profile as it is: {changes}")
    for row in comparison.rows:
        notes += _origins(row)
        if row.recipe is not None and row.recipe.why_cited:
            notes.append(f"{row.label} is cited alone: {row.recipe.why_cited}.")
    return [*dict.fromkeys(notes), *comparison.notes]


def _origins(row: RowComparison) -> list[str]:
    """Names the checkpoints of a row's figures, and the number of examples."""
    counts: dict[str, dict[str, str]] = {}
    for cell in row.cells:
        if cell.ours and cell.result:
            origin, skipped = cell.result.checkpoint, sum(cell.result.skipped.values())
            checkpoint = f"{origin.get('path')} ({str(origin.get('fingerprint'))[:16]})"
            count = f"{cell.task.name} {cell.result.examples:,}"
            count += f" ({skipped:,} skipped)" if skipped else ""
            counts.setdefault(checkpoint, {})[cell.task.name] = count
    return [
        f"{row.label}: ours is {checkpoint}; examples: {', '.join(found.values())}"
        for checkpoint, found in counts.items()
    ]


def _missing(comparison: Comparison) -> tuple[list[tuple[str, RowComparison]], list[str]]:
    """Returns the rows with cells that could still run, each with its title, and the data files they read."""
    rows = [row for row in comparison.rows if row.commands]
    titles = [f"{row.label}, not run: {', '.join(task.name for task in row.missing)}" for row in rows]
    tasks = {task.name: task for row in rows for task in row.missing}
    return list(zip(titles, rows, strict=True)), data_files(tasks.values())


def show(comparison: Comparison) -> None:
    """Prints a comparison to the terminal."""
    from a3_jax.console import print_table

    title = f"{comparison.table.title}\nprofile {comparison.profile}, results in {comparison.results}"
    print_table(title, rows_of_text(comparison, "\n"), headings(comparison), "\n".join(footnotes(comparison)))
    rows, files = _missing(comparison)
    for heading, row in rows:
        lines = [f"  needs {text}" for text in row.needs]
        print("\n".join(["", heading, *lines, *(f"    {command}" for command in row.commands)]))
    if files:
        print("\n".join(["", "Data files (a3 eval --list tells more):", *(f"  {text}" for text in files)]))


def markdown(comparison: Comparison) -> str:
    """Returns a comparison as Markdown, commands included."""
    columns = headings(comparison)
    lines = [
        f"## {comparison.table.title}",
        "",
        f"Profile `{comparison.profile}`, results in `{comparison.results}`.",
        "",
        _line(columns),
        _line(["---", *["---:"] * (len(columns) - 1)]),
        *(_line(row) for row in rows_of_text(comparison, "<br>")),
        "",
        *(f"- {_escaped(note)}" for note in footnotes(comparison)),
    ]
    rows, files = _missing(comparison)
    for heading, row in rows:
        needed = [f"- needs {_escaped(text)}" for text in row.needs]
        lines += ["", f"### {_escaped(heading)}", "", *needed, "", "```bash", *row.commands, "```"]
    if files:
        lines += ["", "### Data files", "", *(f"- {_escaped(text)}" for text in files)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("|", r"\|").replace("~", r"\~")


def _line(cells) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"
