"""`a3 COMMAND`: a short root. Each command's body lives in its room and imports what it needs late."""

import argparse
import glob
import importlib.util
import logging
import os
import re
import signal
import sys

from a3_jax import __version__
from a3_jax.bench_command import add_bench
from a3_jax.checkpoints.command import add_convert, add_info, add_verify
from a3_jax.data.command import add_data
from a3_jax.decoding.command import add_generate, add_score
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, InputError, RunError, nearest
from a3_jax.evaluation.command import add_eval, add_reproduce
from a3_jax.pods.command import add_goodput, add_launch, add_preflight, add_status
from a3_jax.quickstart.command import add_quickstart
from a3_jax.training.command import add_train, default_fields

EXAMPLES = """examples:
  a3 quickstart                                     the whole path in minutes on a laptop
  a3 convert Llama-3.2-1B llama-a3                  a Hugging Face directory to an A3 checkpoint
  a3 data prepare 'text/*.jsonl' rows --tokenizer=llama-a3/tokenizer --seq_len=2048
  a3 train --config=configs/tiny.py --workdir=runs/tiny
  a3 status runs/tiny
  echo '{"text": "Long ago [[1]] lost a kite. The kite made Anna famous."}' | a3 generate runs/tiny - -
  a3 COMMAND --help                                 options and examples of one command
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one `InputError`, with the nearest flag or command."""

    def __init__(self, *arguments, **options):
        help_format = argparse.RawDescriptionHelpFormatter
        super().__init__(*arguments, formatter_class=help_format, allow_abbrev=False, **options)

    def error(self, message):
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            message += nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise InputError(message, file=self.prog.removeprefix("a3").strip() or None)


def _parser():
    parser = _Parser(
        prog="a3",
        description="Any-order, any-subset autoregressive language models in JAX (A3, arXiv 2601.13228).",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"a3_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_quickstart(commands)
    for add in (add_convert, add_info, add_verify):
        add(commands)
    add_data(commands, default_fields)
    for add in (add_train, add_preflight, add_launch, add_status, add_goodput, add_generate, add_score):
        add(commands)
    for add in (add_eval, add_reproduce, add_bench):
        add(commands)
    return parser, commands


def _parse(arguments):
    parser, commands = _parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown and not getattr(known, "takes_config_flags", False):
        flags = _flags(commands.choices[known.command])
        raise InputError(
            f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}", file=known.command
        )
    known.config_flags = unknown
    for name, value in vars(known).items():
        setattr(known, name, _at_home(value))
    return known


def _at_home(value):
    """Expands a leading `~` or `~USER` in an argument: after a `=`, shells do not."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _flags(parser) -> list[str]:
    """Returns the flags of a command and of the commands below it."""
    below = [action.choices.values() for action in parser._actions if action.nargs == argparse.PARSER]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return flags + [flag for parsers in below for other in parsers for flag in _flags(other)]


def main(arguments=None) -> int:
    """Runs one command; the exit status (`a3_jax.errors`)."""
    try:
        parsed = _parse(sys.argv[1:] if arguments is None else arguments)
        return _run_together(parsed) if getattr(parsed, "together", False) else parsed.run(parsed)
    except InputError as error:
        print(f"a3: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except RunError as error:
        print(f"a3: {error}", file=sys.stderr, flush=True)
        return error.status
    except KeyboardInterrupt:
        print("a3: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`a3 score ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run_together(parsed) -> int:
    """Runs a command together with the processes that the environment names, if it names any."""
    from a3_jax.runtime.distributed import ADDRESS, join, shutdown

    if not os.environ.get(ADDRESS):
        return parsed.run(parsed)
    join()
    try:
        status = parsed.run(parsed)
    except InputError:  # which all of them have
        shutdown()
        raise
    shutdown()
    return status


def console() -> int:
    """`main` in a process of its own: warnings as plain lines, and quiet where libtpu finds no TPU."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("a3: %(levelname)s: %(message)s"))
    logger = logging.getLogger("a3_jax")
    logger.addHandler(handler)
    logger.propagate = False
    if importlib.util.find_spec("libtpu") and not _accelerators():
        # libtpu is there for its compiler; asked for devices it fills the terminal with complaints.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    signal.signal(signal.SIGTERM, _leave)
    return main()


def _leave(*_):
    """SIGTERM ends a command as an exception would: nothing half-written stays. `a3 train` saves first."""
    sys.exit(EXIT_PREEMPTED)


def _accelerators() -> list[str]:
    """Device files of TPUs and GPUs."""
    return [
        path
        for pattern in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
        for path in glob.glob(f"/dev/{pattern}")
    ]


if __name__ == "__main__":
    sys.exit(console())
