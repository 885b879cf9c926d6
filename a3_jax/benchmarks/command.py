"""`a3 bench`: the table of benchmarks, and flags to settings."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

from a3_jax.errors import EXIT_FAILED, EXIT_OK, InputError, check_seed, nearest

EPILOG = """examples:
  a3 bench train                                        two-stream step against AR step, length 1024
  a3 bench attention --lengths 512 1024 2048 --json > attention.json
  a3 bench memory --lengths 1024 2048 4096 --remat=block
  a3 bench decode --release=Any-order-Any-subset-AR --lengths 256 --threads=2
  a3 bench launch --config=configs/tiny.py
  a3 bench release --release=Any-order-Any-subset-AR --lengths 512 2048 --threads=2

A ratio's name says which way is better: ..._speedup, or ours_over_theirs.
"""

_MODEL = {"d_model", "layers", "heads", "kv_heads", "mlp", "vocab"}
_ROWS = {"lengths", "batch", "dtype", "order", "group_size", "repeats", "seed", "threads"}
_STEP = _MODEL | _ROWS | {"remat", "attention"}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """An entry of the table; `a3_jax.benchmarks.MODULE.measure(settings)` gives its rows.

    Attributes:
      about: one line.
      flags: the fields of `Settings` that it reads.
      defaults: those that differ from `Settings`'.
      module: None: as the benchmark is called.
    """

    about: str
    flags: set[str]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: str | None = None


BENCHMARKS = {
    "attention": Benchmark(
        "attention implementations against each other, over lengths",
        _ROWS | {"d_model", "heads", "kv_heads"},
        {"lengths": (512, 1024, 2048), "batch": 1},
    ),
    "train": Benchmark(
        "two-stream step against the AR step, in JAX and in transformers", _STEP, {"batch": 1}
    ),
    "memory": Benchmark(
        "peak memory of a step over lengths, each in a fresh process",
        _STEP,
        {"lengths": (2048, 4096), "batch": 1, "repeats": 2},
    ),
    "scaling": Benchmark(
        "time and memory of a step over lengths: the exponents",
        _STEP,
        {"lengths": (512, 1024, 2048, 4096, 8192), "batch": 1, "repeats": 3, "d_model": 256, "layers": 2,
         "heads": 4, "kv_heads": 2, "mlp": 704, "vocab": 4000},
    ),
    "release": Benchmark(
        "a train step against the authors' PyTorch code: time and memory",
        (_STEP - {"dtype"}) | {"release"},
        {"lengths": (512, 2048), "threads": 2, "repeats": 3},
    ),
    "decode": Benchmark(
        "filling a whole length against recomputation, the authors' code, a cached AR model",
        (_MODEL | _ROWS) | {"release"},
        {"lengths": (256, 1024), "batch": 1, "repeats": 3},
    ),
    "score": Benchmark("exact scores against the forward pass of training", (_MODEL | _ROWS) | {"attention"}),
    "eval": Benchmark(
        "multiple choice under evaluation against the scoring engine on the same rows",
        (_MODEL | _ROWS) - {"order", "group_size"},
        {"lengths": (256,), "batch": 8, "repeats": 3},
        module="evaluate",
    ),
    "forwards": Benchmark(
        "forwards a text by strategy and order, on a chain whose conditionals are known",
        {"seed", "steps"},
    ),
    "data": Benchmark(
        "text to shards against the tokenizer alone, batches against what a step takes",
        {"lengths", "batch", "group_size", "repeats", "seed", "threads"},
        {"lengths": (2048,), "repeats": 3},
    ),
    "convert": Benchmark(
        "a model in bfloat16 to A3 and back against a copy on the same disk; peak memory",
        _MODEL | {"repeats", "seed", "threads"},
        {"repeats": 3, "d_model": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp": 8192,
         "vocab": 128256},
    ),
    "guards": Benchmark("what watching each step and fingerprinting each save cost", _STEP),
    "launch": Benchmark(
        "two processes under a3 launch local: to the first step, and from a kill to the next",
        {"config", "repeats"},
        {"repeats": 3},
    ),
}  # fmt: skip

_HELP = {
    "lengths": "tokens a sequence, one or more",
    "batch": "sequences a step",
    "dtype": "of activations: float32 or bfloat16",
    "remat": "what the backward pass computes again: none, dots, block, offload",
    "attention": "implementation: auto, splash, chunked, dense",
    "order": "of the groups: l2r, contiguous, random, spread",
    "group_size": "tokens a group",
    "seed": "of weights, tokens and ranks",
    "repeats": "measurements of each contender",
    "steps": "of training the model that is measured",
    "threads": "CPU cores to use",
    "config": "file of a run, such as configs/a3_llama32_1b.py; --config.FIELD=VALUE sets a field of it",
    "release": "clone of the authors' repository, with llama_xlnet.py",
}
_TEXTS = {"dtype", "remat", "attention", "order", "release", "config"}


def add_bench(subparsers) -> None:
    import argparse

    table = "\n".join(f"  {name:<12}{benchmark.about}" for name, benchmark in BENCHMARKS.items())
    parser = subparsers.add_parser(
        "bench",
        help="the project's own benchmarks, as ratios",
        description=f"Runs a benchmark:\n{table}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", choices=tuple(BENCHMARKS), help="one of the above")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    for field in sorted(set().union(*(benchmark.flags for benchmark in BENCHMARKS.values()))):
        names = ("--lengths", "--length") if field == "lengths" else (f"--{field}",)
        metavar = field.upper() if field in _TEXTS else "N"
        parser.add_argument(
            *names, dest=field, metavar=metavar, nargs="+" if field == "lengths" else None,
            type=str if field in _TEXTS else int, help=_HELP.get(field, "shape of the model"),
        )  # fmt: skip
    parser.set_defaults(run=run_bench, takes_config_flags=True)


def run_bench(args) -> int:
    import importlib

    settings = read_settings(args)
    from a3_jax.benchmarks.measurement import MeasurementError
    from a3_jax.benchmarks.report import show, to_json
    from a3_jax.benchmarks.settings import set_threads

    set_threads(settings.threads)  # before JAX is loaded
    if settings.release:
        os.environ["JAX_PLATFORMS"] = "cpu"  # where the authors' code runs, so that both have the same cores
    from a3_jax.benchmarks.steps import check_names

    check_names(settings)
    try:
        module = BENCHMARKS[args.name].module or args.name
        rows = importlib.import_module(f"a3_jax.benchmarks.{module}").measure(settings)
    except MeasurementError as error:
        print(f"a3: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(to_json(args.name, rows)) if args.json else show(args.name, rows)
    return EXIT_OK


def read_settings(args):
    """`Settings` of the parsed flags over the benchmark's defaults.

    Raises:
      InputError: a flag that this benchmark does not read, or a value that makes no run.
    """
    from a3_jax.benchmarks.settings import Settings

    benchmark = BENCHMARKS[args.name]
    given: dict[str, Any] = {"overrides": _overrides(args.config_flags, benchmark)}
    for field in dataclasses.fields(Settings):
        value = getattr(args, field.name, None)
        if value is None:
            continue
        if field.name not in benchmark.flags:
            raise InputError(f"a3 bench {args.name} does not read it", field=f"--{field.name}")
        for number in value if isinstance(value, list) else [value]:
            if field.name not in {*_TEXTS, "seed"} and number < 1:
                raise InputError(f"must be at least 1, got {number}", field=f"--{field.name}")
        given[field.name] = value
    check_seed(given.get("seed", 0))
    return Settings(**{**benchmark.defaults, **given})


def _overrides(arguments, benchmark):
    """What argparse did not know, where all of it sets fields of the config.

    Raises:
      InputError: an argument that does not.
    """
    reads = "config" in benchmark.flags
    for argument in arguments:
        if not (reads and argument.startswith("--config.")):
            flags = [f"--{field}" for field in benchmark.flags]
            near = nearest(argument.split("=")[0], flags)
            raise InputError(f"unknown argument {argument!r}{near}", file="bench")
    return tuple(arguments)
