"""Comparisons with the paper's tables as text: for a terminal, and as Markdown."""

from a3_jax.evaluation.published import COPIED, SUSPECT
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
    lines = [f"{known.value:g}{_MARKS.get(known.status, '')}" if known else "-"]
    if ours is None:
        is_cited = row.recipe is not None and row.recipe.model is None
        return [*lines, CITED if is_cited else NOT_RUN]
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
    """The legend, what the marks mean that occur, the notes, and where a result is not its profile as it is."""
    cells = [(row, cell) for row in comparison.rows for cell in row.cells]
    marks = {_MARKS.get(cell.published.status, "") for _, cell in cells if cell.published}
    told = [_LEGEND, *(text for mark, text in _TOLD.items() if mark in marks)]
    for row, cell in cells:
        if cell.changes:
            text = f"{CHANGED} {row.label}, {cell.task.name}: not the profile as it is: {', '.join(cell.changes)}"
            told += [text] if text not in told else []
    cited = {f"{row.label} is cited alone: {row.recipe.why_cited}" for row in comparison.rows if _is_cited(row)}
    return [*told, *sorted(cited), *comparison.notes]


def _is_cited(row: RowComparison) -> bool:
    return row.recipe is not None and row.recipe.model is None


def missing_lines(row: RowComparison) -> list[str]:
    """What a row's missing cells need, then the commands; [] if all ran or none can."""
    if not row.commands:
        return []
    tasks = dict.fromkeys(cell.task.name for cell in row.cells if cell.ours is None)
    return [f"{row.label}, not run: {', '.join(tasks)}", *(f"  needs {text}" for text in row.needs)]


def show(comparison: Comparison) -> None:
    """Prints a comparison to the terminal."""
    from a3_jax.tables import print_table

    title = f"{comparison.table.title}\nprofile {comparison.profile}, results in {comparison.results}"
    print_table(title, rows_of_text(comparison, "\n"), headings(comparison), "\n".join(footnotes(comparison)))
    for row in comparison.rows:
        if lines := missing_lines(row):
            print("\n".join(["", *lines, *(f"    {command}" for command in row.commands)]))


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
    for row in comparison.rows:
        if told := missing_lines(row):
            needs = [f"- {_escaped(line.strip())}" for line in told[1:]]
            lines += ["", f"### {_escaped(told[0])}", "", *needs, "", "```bash", *row.commands, "```"]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("|", r"\|").replace("~", r"\~")


def _line(cells) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"
