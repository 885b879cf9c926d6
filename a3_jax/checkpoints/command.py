"""`a3 convert`."""

from a3_jax.errors import EXIT_OK

EPILOG = """examples:
  a3 convert Llama-3.2-1B llama-a3                        Hugging Face to A3
  a3 convert runs/a3-1b llama-a3-hf --to=hf               a run's newest checkpoint to Hugging Face
  a3 convert Llama-3.2-1B llama-a3 --dtype=float32        in another dtype
"""


def add_convert(subparsers) -> None:
    import argparse

    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face checkpoint to A3, and back",
        description="Converts a checkpoint. DST must be absent or empty; it appears whole or not at all.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "src", metavar="SRC", help="Hugging Face directory, A3 checkpoint, or a run's directory"
    )
    parser.add_argument("dst", metavar="DST", help="directory to write")
    parser.add_argument(
        "--to", choices=("a3", "hf"), default="a3", help="format of DST (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all parameters (default: the source's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the query vector where SRC has none (default: %(default)s)"
    )
    parser.set_defaults(run=run_convert)


def run_convert(args) -> int:
    from a3_jax.checkpoints.conversion import convert

    convert(args.src, args.dst, to=args.to, dtype=args.dtype, seed=args.seed)
    print(f"wrote {args.dst}")
    return EXIT_OK
