"""Comparisons with the paper's tables as text: for a terminal, and as Markdown."""

from a3_jax.evaluation.published import COPIED, SUSPECT
from a3_jax.evaluation.recipes import data_files
from a3_jax.evaluation.reproduce import Cell, Comparison, RowComparison

NOT_RUN, CITED, CHANGED = "not run", "cited", "~"
_MARKS = {COPIED: "*", SUSPECT: "?"}
_LEGEND = "Each cell: the paper's figure; ours with its standard error; their difference in standard errors."
_TOLD = {
    "*": "* copied in the paper from DiffuLLaMA, arXiv 2410.17891",
    "?": "? probably a slip of the paper: equal to the ROCStories figures of Llama-3.1-8B",
}
_HEADINGS = {
    "triviaqa_em": "TriviaQA", "hellaswag_acc": "HellaSwag", "winogrande_acc": "WinoGrande",
    "siqa_acc": "SIQA", "piqa_acc": "PIQA", "rocstories_rouge1": "ROC R-1", "rocstories_rouge2": "ROC R-2",
    "rocstories_rougeL": "ROC R-L",
}  # fmt: skip


def headings(comparison: Comparison) -> list[str]:
    """Of the columns, the rows' one included."""
    names = [name for _, _, name in comparison.table.columns]
    return ["model", *(_HEADINGS.get(name) or name.removeprefix("ppl_").replace("_", " ") for name in names)]


def cell_lines(cell: Cell, row: RowComparison) -> list[str]:
    """The paper's figure; ours; the difference, where there is one."""
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
    """The table's rows, `between` standing between the lines of a cell."""
    return [
        [row.label, *(between.join(cell_lines(cell, row)) for cell in row.cells)] for row in comparison.rows
    ]


def footnotes(comparison: Comparison) -> list[str]:
    """The legend, the marks that occur, what is special about results, the notes."""
    cells = [(row, cell) for row in comparison.rows for cell in row.cells]
    marks = {_MARKS.get(cell.published.status, "") for _, cell in cells if cell.published}
    told = [_LEGEND, *(text for mark, text in _TOLD.items() if mark in marks)]
    for row, cell in cells:
        if cell.changes:
            changes = ", ".join(cell.changes)
            told.append(f"{CHANGED} {row.label}, {cell.task.name}: not the profile as it is: {changes}")
    for row in comparison.rows:
        told += _ours(row)
        if row.recipe is not None and row.recipe.why_cited:
            told.append(f"{row.label} is cited alone: {row.recipe.why_cited}.")
    return [*dict.fromkeys(told), *comparison.notes]


def _ours(row: RowComparison) -> list[str]:
    """Which checkpoints a row's figures are of, and how many examples."""
    counts: dict[str, dict[str, str]] = {}
    for cell in row.cells:
        if cell.ours and cell.result:
            origin, skipped = cell.result.checkpoint, sum(cell.result.skipped.values())
            place = f"{origin.get('path')} ({str(origin.get('fingerprint'))[:16]})"
            told = f"{cell.task.name} {cell.result.examples:,}" + (
                f" ({skipped:,} skipped)" if skipped else ""
            )
            counts.setdefault(place, {})[cell.task.name] = told
    return [
        f"{row.label}: ours is {place}; examples: {', '.join(told.values())}"
        for place, told in counts.items()
    ]


def missing_rows(comparison: Comparison) -> list[RowComparison]:
    """The rows with cells that did not run, and could."""
    return [row for row in comparison.rows if row.commands]


def missing_data(comparison: Comparison) -> list[str]:
    """The data files that the commands of all those rows read."""
    tasks = {task.name: task for row in missing_rows(comparison) for task in row.missing}
    return data_files(tasks.values())


def _not_run(row: RowComparison) -> str:
    return f"{row.label}, not run: {', '.join(task.name for task in row.missing)}"


def show(comparison: Comparison) -> None:
    """Prints a comparison to the terminal."""
    from a3_jax.console import print_table

    title = f"{comparison.table.title}\nprofile {comparison.profile}, results in {comparison.results}"
    print_table(title, rows_of_text(comparison, "\n"), headings(comparison), "\n".join(footnotes(comparison)))
    for row in missing_rows(comparison):
        needs = [f"  needs {text}" for text in row.needs]
        print("\n".join(["", _not_run(row), *needs, *(f"    {command}" for command in row.commands)]))
    if files := missing_data(comparison):
        print("\n".join(["", "Data files (a3 eval --list tells more):", *(f"  {text}" for text in files)]))


def markdown(comparison: Comparison) -> str:
    """A comparison as Markdown, commands included."""
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
    for row in missing_rows(comparison):
        needs = [f"- needs {_escaped(text)}" for text in row.needs]
        lines += ["", f"### {_escaped(_not_run(row))}", "", *needs, "", "```bash", *row.commands, "```"]
    if files := missing_data(comparison):
        lines += ["", "### Data files", "", *(f"- {_escaped(text)}" for text in files)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("|", r"\|").replace("~", r"\~")


def _line(cells) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"
