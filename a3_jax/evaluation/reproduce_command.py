"""`a3 reproduce`."""

from a3_jax.errors import EXIT_OK

EPILOG = """examples:
  a3 reproduce table1 --results=results              the paper's figures beside those in results/ROW/
  a3 reproduce all --results=results --markdown > tables.md
  a3 reproduce table1 --results=results --json | jq '.tables[0].rows[] | {row, commands}'

results: a directory a row, which a3 eval writes into:
  a3 eval Llama-3.1-8B --model=ar --tasks=hellaswag --data_dir=data --results=results/llama-3.1-8b
rows: llama-3.1-8b dream-7b diffullama-7b a3-1b a3-3b a3-8b a3-three-stages a3-last-stage
Any other directory is a row of your own below the paper's.
"""


def add_reproduce(subparsers) -> None:
    """Adds `a3 reproduce`."""
    import argparse

    parser = subparsers.add_parser(
        "reproduce",
        help="the paper's tables beside your results, and what would run the rest",
        description="Prints a table of the paper: in each cell the published figure, ours with its standard "
        "error, and their difference in standard errors; or that it was not run, with the commands that "
        "would run it and what they need. Runs nothing itself.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", metavar="TABLE", help="table1, table2, table3 or all")
    parser.add_argument("--results", required=True, metavar="DIR", help="directory with a directory a row")
    parser.add_argument(
        "--profile",
        default="a3_best_guess",
        metavar="P",
        help="of the results that count (default: %(default)s)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as Markdown")
    form.add_argument("--json", action="store_true", help="as JSON; docs/evaluation.md lists the fields")
    parser.set_defaults(run=run_reproduce)


def run_reproduce(args) -> int:
    """Reads, compares, prints; returns the exit status."""
    import json

    from a3_jax.evaluation.recipes import tables_named
    from a3_jax.evaluation.reproduce import compare
    from a3_jax.evaluation.reproduce_text import markdown, show

    comparisons = [compare(table, args.results, args.profile) for table in tables_named(args.table)]
    if args.json:
        print(json.dumps({"console": [comparison.to_dict() for comparison in comparisons]}, indent=2))
    elif args.markdown:
        print("\n".join(markdown(comparison) for comparison in comparisons), end="")
    else:
        for number, comparison in enumerate(comparisons):
            print("\n" if number else "", end="")
            show(comparison)
    return EXIT_OK
