"""`a3 data`: prepare text once, for as many runs as one likes."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from a3_jax.errors import EXIT_FAILED, EXIT_OK, InputError

_EPILOG = """examples:
  a3 data prepare 'fineweb/*.parquet' fineweb-2048 --tokenizer=Llama-3.2-1B --seq_len=2048 --holdout=2000
  a3 data prepare notes.txt notes --tokenizer=bytes --seq_len=512
  a3 data prepare fineweb-2048 --verify
"""

_SHOW_EPILOG = """\
examples:
  a3 data show fineweb-2048 --stage=random4 --n=3
  a3 data show stories --stage=random --config=configs/tiny.py --tokens=40

Each row of the picture is a token, in the order in which the stage predicts them; each column a key.
"""

_PREPARE_EPILOG = """\
sources, local or in a bucket, by path or glob:
  .parquet, .jsonl, .txt; .jsonl.gz, .jsonl.zst, .txt.gz, .txt.zst
  text: a column or field, or paragraphs between blank lines (without any: lines)
  dialogs: {"prompt", "response"} or {"messages": [{"role", "content"}]}; what the assistant says is
  predicted, the rest is given
The same command again goes on where it was stopped. Records that can't be used are passed over, and told;
exit status 1: a file gave no document at all. config.data = "DST" trains on the result.

examples:
  a3 data prepare 'fineweb/*.parquet' fineweb-2048 --tokenizer=Llama-3.2-1B --seq_len=2048 --holdout=2000
  a3 data prepare chats.jsonl.zst chats --tokenizer=Llama-3.2-1B-Instruct --seq_len=1024
  a3 data prepare fineweb-2048 --verify
"""


def add_data(subparsers, run_defaults: Callable[[], Mapping[str, Any]]) -> None:
    """Adds `a3 data`.

    Args:
      run_defaults: returns the fields of a run's config that have defaults, for `a3 data show`.
    """
    parser = subparsers.add_parser(
        "data",
        help="text to packed token rows",
        description="Prepares text for training, and shows it.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_show(commands, run_defaults)


def _add_show(commands, run_defaults) -> None:
    parser = commands.add_parser(
        "show",
        help="rows as the model sees them",
        description="Shows rows of prepared data as the model sees them: groups, and what each may see.",
        epilog=_SHOW_EPILOG,
    )
    parser.add_argument("directory", metavar="DST", help="made by `a3 data prepare`")
    parser.add_argument(
        "--stage", default="random4", metavar="NAME", help="a stage of the presets or of --config"
    )
    parser.add_argument("--config", metavar="FILE.py", help="take the stages of this run's config")
    parser.add_argument("--split", default="train", metavar="train|heldout")
    parser.add_argument("--n", type=int, default=3, metavar="N", help="how many examples; default 3")
    parser.add_argument(
        "--tokens", type=int, default=24, metavar="N", help="tokens of each example, at most; default 24"
    )
    parser.add_argument(
        "--step", type=int, default=0, metavar="N", help="step of the stream; default 0, its start"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of rows and orders")
    parser.add_argument("--json", action="store_true", help="one object per row, whole rows")
    parser.set_defaults(run=_show, run_defaults=run_defaults, takes_config_flags=True)


def _show(args) -> int:
    from a3_jax.data.show import run_show

    return run_show(args)


def _add_prepare(commands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tokenise and pack files into shards",
        description="Tokenises files and packs them into rows, in shards that are read at random.",
        usage="a3 data prepare SRC... DST --tokenizer=DIR|FILE|bytes [--seq_len=N] [options]",
        epilog=_PREPARE_EPILOG,
    )
    parser.add_argument(
        "paths", nargs="+", metavar="SRC... DST", help="files or globs; the directory to write"
    )

    def option(name, metavar, default, help_text, kind: Any = str):
        told = help_text if default is None else f"{help_text}; default {default}"
        parser.add_argument(f"--{name}", metavar=metavar, default=default, type=kind, help=told)

    option("tokenizer", "DIR|FILE|bytes", None, "a directory with tokenizer.json, that file, or plain bytes")
    option("seq_len", "N", 2048, "tokens in a row", int)
    option("text_column", "NAME", None, "column or field of the text; default text. Given, sources are text "
           "even where they have prompts or messages")  # fmt: skip
    option("bos", "auto|yes|no", "auto", "BOS before each document; auto: if tokenizer or template adds one")
    option("eos", "auto|yes|no", "auto", "EOS behind each document; auto: if the tokenizer has one")
    option("packing", "first_fit|concat|none", "first_fit", "first_fit: documents side by side, longest "
           "first, where they fit; concat: one after the other, cut where a row ends; none: a row each, cut "
           "at its end")  # fmt: skip
    option("holdout", "K", 0, "documents held out, a number or a share below 1; equal texts go the same way",
           float)  # fmt: skip
    option("shard_tokens", "N", 1 << 24, "tokens in a shard", int)
    option("filler", "N", 32, "of dialogs: EOS that are not scored fill a response up to a multiple of N; "
           "0: none", int)  # fmt: skip
    option("chat_template", "FILE", None, "Jinja, of messages, and of prompts if given; default: the "
           "tokenizer's, of messages alone")  # fmt: skip
    option("max_passed_over", "SHARE", 0.5, "exit status 1 if more of a source can't be used for one reason; "
           "1: never", float)  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="stop at the first record that can't be used")
    parser.add_argument(
        "--verify", action="store_true", help="then read every byte of DST; with DST alone only that"
    )
    parser.add_argument("--json", action="store_true", help="the manifest, for machines")
    parser.set_defaults(run=run_prepare)


def run_prepare(args) -> int:
    """`a3 data prepare`: the exit status."""
    *sources, directory = args.paths
    if not sources and not args.verify:
        raise InputError("give the files to read and the directory to write", file="a3 data prepare")
    try:
        status = _prepare(args, sources, directory) if sources else EXIT_OK
        return (_verify(directory) if args.verify else EXIT_OK) or status
    except OSError as error:
        told = " ".join(str(error).split())
        print(
            f"a3 data prepare: {told}: finished shards stay, the same command goes on there", file=sys.stderr
        )
        return EXIT_FAILED


def _prepare(args, sources, directory) -> int:
    if args.tokenizer is None:
        raise InputError(
            "is needed: a directory, a file, or 'bytes'", file="a3 data prepare", field="--tokenizer"
        )
    import dataclasses

    from a3_jax.data.prepare import Options, prepare
    from a3_jax.data.prepare_report import summary

    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    manifest, was_there = prepare(sources, directory, options)
    if args.json:
        print(json.dumps(manifest.to_dict(), indent=2))
    else:
        print(f"finished: {directory} was there already" if was_there else f"wrote {directory}")
        print("\n".join(summary(manifest)))
    useless = [source for source in manifest.sources if not source["documents"]]
    for source in useless:
        passed_over = sum(source.get("passed_over", {}).values())
        why = f"{passed_over:,} records were passed over" if passed_over else "it holds no text"
        print(f"a3 data prepare: {source['path']}: gave no document: {why}", file=sys.stderr)
    return EXIT_FAILED if useless else EXIT_OK


def _verify(directory) -> int:
    from a3_jax.data.prepare import damage

    found = damage(directory)
    for error in found:
        print(f"a3 data prepare: {error}", file=sys.stderr)
    if not found:
        print(f"verified {directory}: every byte is as it was written", file=sys.stderr)
    return EXIT_FAILED if found else EXIT_OK
