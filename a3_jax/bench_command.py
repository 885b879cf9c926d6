"""`a3 bench`: runs the benchmarks beside the package, in a source tree; they are not part of the wheel."""

import os
import sys

from a3_jax.errors import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def add_bench(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="the project's own benchmarks, as ratios", add_help=False)
    # The benchmarks make the arguments: here all of them are unknown, and handed on as they are.
    parser.set_defaults(run=lambda parsed: run_bench(parser, parsed.config_flags), takes_config_flags=True)


def run_bench(parser, arguments: list[str]) -> int:
    """Runs `a3 bench` with the arguments after it; returns the exit status."""
    if not os.path.isfile(os.path.join(ROOT, "benchmarks", "command.py")):
        message = (
            "the benchmarks are in the source tree, not in the installed package: run `a3 bench` in a clone "
            "of the repository, where `make setup` installs it"
        )
        raise InputError(message, file="bench")
    if sys.path[0] != ROOT:
        sys.path.insert(0, ROOT)
    from benchmarks.command import run

    return run(parser, arguments)
