"""`a3 convert`, `a3 info` and `a3 verify`."""

from a3_jax.errors import EXIT_FAILED, EXIT_OK

EPILOG = """examples:
  a3 convert Llama-3.2-1B llama-a3                        Hugging Face to A3
  a3 convert runs/a3-1b llama-a3-hf --to=hf               a run's newest checkpoint to Hugging Face
  a3 convert runs/a3-1b plain --to=hf --no_query_vector   its left-to-right model alone
  a3 convert runs/a3 release --to=release                 for the authors' PyTorch class
  a3 convert Llama-3.2-1B llama-a3 --dtype=float32        in another dtype
  a3 convert Llama-3.2-1B llama-a3 --check                insists on a check (needs torch, transformers)
  a3 convert Llama-3.2-1B llama-a3 --sha256=sums.txt      where sha256sum * > sums.txt was run at the origin
"""

INFO_EPILOG = """examples:
  a3 info llama-a3                        a checkpoint
  a3 info runs/a3-1b                      the newest step of a run
  a3 info Llama-3.2-1B                    a Hugging Face directory
  a3 info llama-a3 --json | jq -r .fingerprint
"""

VERIFY_EPILOG = """examples:
  a3 verify llama-a3                      one checkpoint
  a3 verify runs/a3-1b                    every step of a run
  a3 verify runs/a3-1b/checkpoints/800 --json
"""


def add_convert(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face checkpoint to A3, and back",
        description="Converts a checkpoint, a piece at a time: the model is never in memory as a whole. DST "
        "must be absent or empty; it appears whole or not at all.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "src", metavar="SRC", help="Hugging Face directory, A3 checkpoint, or a run's directory"
    )
    parser.add_argument("dst", metavar="DST", help="directory to write")
    parser.add_argument(
        "--to",
        choices=("a3", "hf", "release"),
        default="a3",
        help="format of DST; release: the authors' LlamaTwoStreamForCausalLM, of models trained with its "
        "residual alone (default: %(default)s)",
    )
    parser.add_argument(
        "--no_query_vector",
        action="store_true",
        help="with --to=hf: leave it out, for the plain left-to-right model",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all parameters (default: the source's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the query vector where SRC has none (default: %(default)s)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        default=None,
        help="before DST appears, compare its logits in float32 with those of transformers on the Hugging "
        "Face side; a difference names the first layer, exit status 1. It needs torch, transformers, and "
        "memory for the model twice in float32. Where half of the free memory is enough this is done "
        "without being asked; with this flag it is an error if it can't be done",
    )
    parser.add_argument(
        "--no-check",
        "--no_check",
        dest="check",
        action="store_false",
        default=None,
        help="convert without comparing",
    )
    parser.add_argument(
        "--allow_nonfinite", action="store_true", help="convert parameters that are NaN or infinite too"
    )
    parser.add_argument(
        "--sha256",
        metavar="FILE",
        help="list as sha256sum prints it; before anything is written every file of a Hugging Face SRC is "
        "compared with it. The sums are recorded in DST in any case (a3 info shows them)",
    )
    parser.set_defaults(run=run_convert, together=True)


def run_convert(args) -> int:
    from a3_jax.checkpoints.conversion import convert
    from a3_jax.errors import InputError

    if args.no_query_vector and args.to != "hf":
        raise InputError(f"goes with --to=hf alone, not with --to={args.to}", field="--no_query_vector")
    checked = convert(
        args.src, args.dst, to=args.to, dtype=args.dtype, seed=args.seed, check=args.check,
        allow_nonfinite=args.allow_nonfinite, query_vector=not args.no_query_vector, sha256=args.sha256,
    )  # fmt: skip
    if checked is not None:
        print(checked)
    print(f"wrote {args.dst}")
    return EXIT_OK


def add_info(subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="what a checkpoint is: sizes, parameters, curriculum, origin",
        description="Says what a checkpoint is, without reading its parameters. Equal fingerprints: equal "
        "parameters.",
        epilog=INFO_EPILOG,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="A3 checkpoint, a run's directory, or a Hugging Face one"
    )
    parser.add_argument("--json", action="store_true", help="as JSON; docs/formats.md lists the fields")
    parser.set_defaults(run=run_info)


def run_info(args) -> int:
    import json

    from a3_jax.checkpoints.inspect import describe, show

    report = describe(args.checkpoint)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return EXIT_OK


def add_verify(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="whether every byte of a checkpoint is what was written",
        description="Compares every file of a checkpoint with its checksum and every array with its "
        "fingerprint. Each damaged or missing file and leaf is a line of its own. Exit status: 0 intact, "
        "1 damaged, 2 no checkpoint.",
        epilog=VERIFY_EPILOG,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="A3 checkpoint, a run's directory, or a Hugging Face directory (headers and lengths only)",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.set_defaults(run=run_verify)


def run_verify(args) -> int:
    import json

    from a3_jax.checkpoints.inspect import verify

    verdicts = verify(args.checkpoint)
    intact = not any(verdict.problems for verdict in verdicts)
    if args.json:
        rows = [
            {
                "path": str(verdict.path),
                "format": verdict.kind,
                "intact": not verdict.problems,
                "files": verdict.files,
                "leaves": verdict.leaves,
                "bytes": verdict.bytes,
                "note": verdict.note,
                "problems": [
                    {"file": str(problem.file), "leaf": problem.field, "problem": problem.message}
                    for problem in verdict.problems
                ],
            }
            for verdict in verdicts
        ]
        print(json.dumps({"intact": intact, "checkpoints": rows}, indent=2))
    else:
        for verdict in verdicts:
            _print_verdict(verdict)
    return EXIT_OK if intact else EXIT_FAILED


def _print_verdict(verdict) -> None:
    for problem in verdict.problems:
        print(problem)
    looked_at = f"{verdict.files} files, {verdict.bytes:,} bytes, {verdict.leaves} arrays"
    if verdict.problems:
        print(f"{verdict.path}: DAMAGED: {len(verdict.problems)} problems")
    elif verdict.files:
        print(f"{verdict.path}: intact: {looked_at}")
    if verdict.note:
        print(f"{verdict.path}: {verdict.note}")
