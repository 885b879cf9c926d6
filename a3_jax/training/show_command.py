"""`a3 data show`: its flags. It takes the stages of a run, so it stands in this room."""

import argparse

SHOW_EPILOG = """\
examples:
  a3 data show fineweb-2048 --stage=random4 --n=3
  a3 data show stories --stage=random --config=configs/tiny.py --tokens=40

Each row of the picture is a token, in the order in which the stage predicts them; each column a key.
"""


def add_show(subparsers) -> None:
    """Adds `show` to the subcommands of `a3 data`: it takes stages of a run's config."""
    parser = subparsers.add_parser(
        "show",
        help="rows as the model sees them",
        description="Shows rows of prepared data as the model sees them: groups, and what each may see.",
        epilog=SHOW_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DST", help="made by `a3 data prepare`")
    parser.add_argument("--stage", default="random4", metavar="NAME", help="of the presets or of --config")
    parser.add_argument("--config", metavar="FILE.py", help="file of a run, whose stages to take")
    parser.add_argument("--split", default="train", metavar="train|heldout")
    parser.add_argument("--n", type=int, default=3, metavar="N", help="examples; default 3")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="of each, at most; default 24")
    parser.add_argument(
        "--step", type=int, default=0, metavar="N", help="of the stream; default 0, its begin"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of rows and orders")
    parser.add_argument("--json", action="store_true", help="an object a row, whole rows")
    parser.set_defaults(run=show, takes_config_flags=True)


def show(args) -> int:
    """Runs `a3 data show`."""
    from a3_jax.training.show import run_show

    return run_show(args)
