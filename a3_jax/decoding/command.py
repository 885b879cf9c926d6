"""`a3 generate` and `a3 score`: flags, files and standard streams around `generation` and `scoring`."""

import dataclasses
import json
import math
import os
import sys
import time
from typing import Any

from a3_jax.decoding.options import (
    BOS,
    COMMITS,
    CONTEXTS,
    CRITERIA,
    DTYPES,
    MODELS,
    STRATEGIES,
    GenerateOptions,
    ScoreOptions,
)  # fmt: skip
from a3_jax.errors import EXIT_FAILED, EXIT_OK, InputError

_GENERATE_EPILOG = """\
input, one JSON object a line:
  {"text": "The [[3]] sat on [[8]]."}        [[n]] is a blank of n tokens; \\[[ (in JSON \\\\[[) is a typed [[
  {"tokens": [5, null, null, 2]}             null is a blank of one token
  optionally "ranks": one integer a token, read at the blanks (lower = earlier, equal = together);
  in groupwise and speculative decoding they take the place of --order and --group_size
output, in input order:
  {"text", "tokens", "logprob", "logprobs", "commit_rank", "forwards", "exact"}
  Where "exact" is true, `a3 score` of the tokens with ranks = commit_rank gives the same logprob.
  Speculative adds "acceptance", the share of its drafts that passed.

example:
  echo '{"text": "the [[2]] sat ."}' | a3 generate runs/tiny - - --temperature=0.8 --num_samples=3
"""

_SCORE_EPILOG = """\
input, one JSON object a line:
  {"tokens": [5, 7, 2], "ranks": [1, 0, 1]}                                  lower ranks come first
  {"text": "The cat sat.", "order": "random", "group_size": 4, "seed": 0}    or tokens with an order
  optionally, in either:
    "context": C          the first C tokens (after BOS) are given, not scored
    "scored": [0/1, ...]  which tokens to score; the others keep their place in the order
    "absent": [0/1, ...]  tokens neither given nor scored: gaps
    "positions": [...]    places in the document, for tokens with others absent between them
  Lists have one value a token; BOS counts, if the text gets one.
output, in input order:
  {"logprobs": [...], "logprob": sum}, natural logarithm, null where not scored; text also has "tokens"
  With --orders these are means over the orders, and there are "log_mean_exp", "order_gap", "orders".

examples:
  echo '{"text": "the cat sat .", "order": "random", "group_size": 1}' | a3 score runs/tiny - -
  echo '{"text": "the cat sat .", "group_size": 1}' | a3 score runs/tiny - - --orders=8
"""


def add_generate(subparsers) -> None:
    """Adds `a3 generate`."""
    parser = _add_parser(subparsers, "generate", "fill blanks in any order", _GENERATE_EPILOG)
    _add_shared(parser)
    defaults = {field.name: field.default for field in dataclasses.fields(GenerateOptions)}

    def option(name, metavar, help_text, kind: Any = str):
        told = f"{help_text}; default {defaults[name]}"
        parser.add_argument(f"--{name}", type=kind, default=defaults[name], metavar=metavar, help=told)

    option("strategy", "|".join(STRATEGIES), "fixed groups, or the best blanks of each step first")
    option("order", "l2r|random|spread|block", "of groupwise and speculative; block: of dynamic too")
    option("group_size", "N", "of groupwise: tokens a group", int)
    option("block_size", "N", "of order block: blanks a block", int)
    option("block_order", "l2r|random|spread", "of order block: inside a block")
    option("criterion", "|".join(CRITERIA), "of dynamic: which blanks are the best")
    option("step_size", "N", "of dynamic: tokens committed a step", int)
    option("entropy_bound", "NATS", "of dynamic: commit the best while sum H - max H stays below; bounds how "
           "far the joint is from the product of what is committed together, not how good what is drawn is; "
           "of speculative: the same for the drafts of a window, which are verified", float)  # fmt: skip
    option("threshold", "P", "of dynamic: commit the best whose likeliest token has this probability", float)
    option("factor", "F", "of dynamic: commit the n best, (n + 1)(1 - their least confidence) < F", float)
    option("max_commit", "N", "of dynamic with a bound: tokens committed a step, at most", int)
    option("min_gap", "N", "of dynamic: positions between two tokens of a step, at least", int)
    option("window", "N", "of speculative: tokens drafted a forward, at most", int)
    option("commit", "|".join(COMMITS), "chain: a token keeps the rank of its commit; flat: all tokens so "
           "far are one group, recomputed each step (the authors' release; no exact logprob)")  # fmt: skip
    option("temperature", "T", "0 takes the likeliest token", float)
    option("top_k", "K", "draw from the K likeliest tokens, 0 = all", int)
    option("top_p", "P", "draw from the smallest set that is more likely than P", float)
    option("seed", "N", "of orders and draws", int)
    option("num_samples", "K", 'output lines an input, with "sample": 0 to K-1', int)
    parser.add_argument(
        "--rerank", action="store_true",
        help='of --num_samples keep the likeliest: exact joint logprob left to right, "joint"',
    )  # fmt: skip
    parser.add_argument(
        "--stream", action="store_true",
        help="tell of each step, or with --order=block of each block, as it is committed: lines with "
             '"columns", "tokens", "logprobs", "commit_rank" before the result; of one input at a time',
    )  # fmt: skip
    parser.add_argument(
        "--stop_at_eos", action="store_true",
        help="end at an EOS (of the tokenizer, generation_config.json or config.json) that has every blank "
             "before it filled and no given token behind it; what was generated behind it is dropped",
    )  # fmt: skip
    parser.add_argument(
        "--no_blanks", action="store_true", help="[[ in a text is text like any other, never a blank"
    )
    parser.set_defaults(run=run_generate)


def add_score(subparsers) -> None:
    """Adds `a3 score`."""
    parser = _add_parser(
        subparsers, "score", "exact log-probabilities under any grouping and order", _SCORE_EPILOG
    )
    _add_shared(parser)
    parser.add_argument(
        "--orders", type=int, default=1, metavar="M",
        help='score each line under M orders drawn from its seed: "order" random, the default then, or '
             "block; default 1",
    )  # fmt: skip
    parser.set_defaults(run=run_score)


def run_generate(args) -> int:
    """Runs `a3 generate`; returns the exit status."""
    from a3_jax.decoding.generation import generate_lines, stream_line
    from a3_jax.decoding.requests import blank_requests

    if not args.stream:
        return _run(args, GenerateOptions, blank_requests, generate_lines)
    for name in ("num_samples", "rerank"):
        if getattr(args, name) > 1 or getattr(args, name) is True:
            raise InputError("a stream tells of one sample", file="a3 generate", field=f"--{name}")

    def stream(checkpoint, lines, options):
        for line in lines:
            for event in stream_line(checkpoint, line, options):
                if args.output == "-":
                    _write("-", json.dumps(event, ensure_ascii=False) + "\n")
                yield event

    return _run(args, GenerateOptions, blank_requests, stream)


def run_score(args) -> int:
    """Runs `a3 score`; returns the exit status."""
    from a3_jax.decoding.requests import score_requests
    from a3_jax.decoding.scoring import score_lines

    return _run(args, ScoreOptions, score_requests, score_lines)


def _add_parser(subparsers, name, help_text, epilog):
    parser = subparsers.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", epilog=epilog
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="A3 checkpoint or Hugging Face directory")
    parser.add_argument("input", metavar="INPUT.jsonl", help="- for standard input")
    parser.add_argument("output", metavar="OUTPUT.jsonl", help="- for standard output")
    return parser


def _add_shared(parser) -> None:
    def option(name, choices, default, help_text):
        parser.add_argument(f"--{name}", default=default, metavar="|".join(choices), help=help_text)

    option("model", MODELS, "a3", "ar: the content stream as the plain left-to-right model; default a3")
    option("context", CONTEXTS, None, "given tokens as one group, or in reading order; default: as the "
           "checkpoint was trained, else flat")  # fmt: skip
    option("dtype", DTYPES, None, "default float32 on CPU, bfloat16 on accelerators")
    option("bos", BOS, "auto", "BOS before text; default auto: if its tokenizer adds one")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="devices along data, fsdp and tensor, such as fsdp=2,tensor=4; "
        "default: one device",
    )  # fmt: skip
    parser.add_argument(
        "--skip_bad", action="store_true", help="pass over lines that can't be used, and count them"
    )


def _run(args, options_class, check, compute) -> int:
    """Checks everything that can be checked, computes, and writes all lines or none.

    Args:
      check: (lines, checkpoint, options) raises `InputError` for a bad line.
      compute: (checkpoint, lines, options) -> result objects.
    """
    options = _options(args, options_class)
    _check_output(args.output)
    from a3_jax.checkpoints.loading import check_has_orders, open_checkpoint
    from a3_jax.decoding.requests import read_lines

    bad: list[InputError] = []
    lines = []
    candidates = read_lines(args.input, bad)
    checkpoint = open_checkpoint(args.checkpoint, mesh=mesh_of(args))
    check_has_orders(checkpoint, args.checkpoint)
    for line in candidates:
        try:
            check([line], checkpoint, options)
            lines.append(line)
        except InputError as error:
            bad.append(error)
    bad.sort(key=lambda error: error.line or 0)
    if bad and not args.skip_bad:
        raise bad[0]
    for error in bad:
        print(f"a3 {args.command}: skipped: {error}", file=sys.stderr)
    return _compute(args, lines, lambda: list(compute(checkpoint, lines, options)), len(bad))


def mesh_of(args):
    """Makes the mesh of `--mesh`; None: one device."""
    if args.mesh is None:
        return None
    from a3_jax.model.sharding import make_mesh

    sizes = {}
    for part in args.mesh.split(","):
        axis, _, size = part.partition("=")
        if not size.removeprefix("-").isdecimal():
            raise InputError(f"expected AXIS=N, got {part!r}", file=f"a3 {args.command}", field="--mesh")
        sizes[axis] = int(size)
    return make_mesh(sizes)


def _compute(args, lines, compute, skipped) -> int:
    started = time.monotonic()
    results = compute()
    finals = [result for result in results if "logprob" in result]
    failed = next((i for i, result in enumerate(finals) if not math.isfinite(result["logprob"])), None)
    if failed is not None:
        line = lines[failed * len(lines) // len(finals)]
        print(f"a3 {args.command}: {line.file}:{line.number}: the model gives no finite log-probability",
              file=sys.stderr)  # fmt: skip
        return EXIT_FAILED
    if not (getattr(args, "stream", False) and args.output == "-"):
        _write(args.output, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))
    told = f", {skipped} bad lines skipped" if skipped else ""
    seconds = time.monotonic() - started
    print(f"a3 {args.command}: {len(results)} lines{told}, {seconds:.1f} s", file=sys.stderr)
    return EXIT_OK


def _options(args, options_class):
    try:
        return options_class(
            **{field.name: getattr(args, field.name) for field in dataclasses.fields(options_class)}
        )
    except InputError as error:
        raise InputError(error.message, file=f"a3 {args.command}", field=f"--{error.field}") from error


def _check_output(path) -> None:
    """Refuses, before any work, a path that can't become a file."""
    if path != "-" and os.path.isdir(path):
        raise InputError("is a directory, a file is to be written there", file=path)
    from a3_jax.paths import check_parents

    if path != "-":
        check_parents(path)


def _write(path, text) -> None:
    """Writes to standard output, to a pipe or device, or to a file that appears whole."""
    if path == "-":
        sys.stdout.buffer.write(text.encode("utf-8"))  # UTF-8, whatever the locale says
        sys.stdout.flush()
    elif path.startswith(("/dev/", "/proc/")) or (os.path.exists(path) and not os.path.isfile(path)):
        with open(path, "w", encoding="utf-8") as stream:  # a rename would take the device's place
            stream.write(text)
    else:
        from a3_jax.paths import followed, write_text

        write_text(followed(path), text)
