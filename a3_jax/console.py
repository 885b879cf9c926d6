"""Tables of `a3 info`, `a3 status` and `a3 goodput`."""

import datetime

_WIDTH = 120  # of a table that goes to a file


def print_table(title: str, rows, headings=None, caption: str | None = None) -> None:
    """Prints rows of texts between two lines; without headings, two columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=headings is not None)
    for heading in headings or ("", ""):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)  # names of directories are no markup
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_WIDTH)
    print(title)
    console.print(table)
    if caption:
        print(caption)


def duration(seconds: float) -> str:
    """1.2 s, or 0:12:34."""
    return f"{seconds:.1f} s" if seconds < 60 else str(datetime.timedelta(seconds=round(seconds)))
