"""`a3 quickstart`."""

from a3_jax.errors import EXIT_OK

EPILOG = """examples:
  a3 quickstart                                 embedded stories, a few minutes on two CPU cores
  a3 quickstart --workdir=runs/mine --text=my_novel.txt
  a3 quickstart --smoke --workdir=/tmp/smoke    the same path in a few steps
"""


def add_quickstart(subparsers) -> None:

    parser = subparsers.add_parser(
        "quickstart",
        help="the whole path on an embedded corpus, in minutes",
        description="Trains a small AR model, writes it as a Hugging Face directory, converts it, adapts it "
        "to any order and fills blanks with it. Writes quickstart.json, curves.png and report.html.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--workdir", default="runs/quickstart", metavar="DIR",
        help="where everything goes; run again there, it goes on (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, no claim on figures")
    parser.add_argument("--text", metavar="FILE", help="your own text in place of the stories, byte by byte")
    parser.set_defaults(run=run_quickstart)


def run_quickstart(args) -> int:
    import json

    from a3_jax.quickstart.report import show
    from a3_jax.quickstart.run import quickstart

    outcome = quickstart(args.workdir, smoke=args.smoke, text=args.text)
    print(show(outcome.infillings))
    print(json.dumps(outcome.figures, indent=2))
    return EXIT_OK
