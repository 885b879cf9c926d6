"""The table of benchmarks, flags to settings, and the run."""

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from a3_jax.checks import one_of
from a3_jax.errors import EXIT_FAILED, EXIT_OK, InputError, nearest
from benchmarks.settings import MODEL, Settings, set_threads

EPILOG = """examples:
  a3 bench train --length=1024 --json > train.json
  a3 bench memory --lengths 1024 2048 4096
  a3 bench release --release=Any-order-Any-subset-AR --lengths 512 2048 --threads=2

A ratio's name says which way is better: ..._speedup, or ours_over_theirs.
"""
ROWS = {"lengths", "batch", "dtype", "order", "group_size", "repeats", "seed", "threads"}
FILL, HEADS = {*MODEL, *ROWS}, {"d_model", "heads", "kv_heads"}
STEP = {*FILL, "remat", "attention"}
SMALL = {"d_model": 256, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 704, "vocab": 4000}
LLAMA_1B = {"d_model": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "mlp": 8192, "vocab": 128256}


class Benchmark(NamedTuple):
    """What `a3 bench NAME` runs: `measure` of a module, which reads these flags, with these defaults."""

    about: str
    flags: set[str]
    defaults: Mapping[str, Any] = {}
    module: str = "step_costs"


BENCHMARKS = {
    "attention": Benchmark("attention implementations against each other, over lengths",
                           {*ROWS, *HEADS}, {"lengths": (512, 1024, 2048), "batch": 1}),
    "train": Benchmark("two-stream step against the AR step, in JAX and in transformers", STEP, {"batch": 1}),
    "memory": Benchmark("peak memory of a step over lengths, each in a fresh process", STEP,
                        {"lengths": (2048, 4096), "batch": 1, "repeats": 2}),
    "scaling": Benchmark("time and memory of a step over lengths: the exponents", STEP,
                         {"lengths": (512, 1024, 2048, 4096, 8192), "batch": 1, "repeats": 3, **SMALL}),
    "release": Benchmark("a train step against the authors' PyTorch code: time and memory",
                         {*STEP, "release"} - {"dtype"},
                         {"lengths": (512, 2048), "threads": 2, "repeats": 3}),
    "decode": Benchmark("filling a whole length against recomputation, the authors' code, a cached AR model",
                        {*FILL, "release"}, {"lengths": (256, 1024), "batch": 1, "repeats": 3}, "fill_times"),
    "score": Benchmark("exact scores against the forward pass of training", {*FILL, "attention"}),
    "eval": Benchmark("multiple choice under evaluation against the scoring engine on the same rows",
                      FILL - {"order", "group_size"}, {"lengths": (256,), "batch": 8, "repeats": 3}),
    "forwards": Benchmark("forwards per text by strategy and order, on a chain whose conditionals are known",
                          {"seed", "steps"}, module="forward_counts"),
    "data": Benchmark("text to shards against the tokenizer alone, batches against what a step takes",
                      ROWS - {"dtype", "order"}, {"lengths": (2048,), "repeats": 3}, "data_rates"),
    "convert": Benchmark("a model in bfloat16 to A3 and back against a copy on the same disk; peak memory",
                         {*MODEL, "repeats", "seed", "threads"}, {"repeats": 3, **LLAMA_1B},
                         "conversion_times"),
    "guards": Benchmark("the cost of watching each step and fingerprinting each save", STEP),
    "launch": Benchmark("two processes under a3 launch local: to the first step, and from a kill to the next",
                        {"config", "repeats"}, {"repeats": 3}, "launch_times"),
}  # fmt: skip


def run(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Runs `a3 bench` with the arguments after it, by a parser that has none yet; returns the exit status."""
    settings, as_json = read_settings(parser, arguments)
    set_threads(settings.threads)
    if settings.release:
        os.environ["JAX_PLATFORMS"] = "cpu"  # where the authors' code runs, so that both have the same cores
    from a3_jax.model.attention import IMPLEMENTATIONS
    from a3_jax.model.two_stream import REMAT_POLICIES
    from benchmarks.measurement import MeasurementError, show, to_json

    one_of("remat", settings.remat, REMAT_POLICIES)
    one_of("attention", settings.attention, IMPLEMENTATIONS)
    module = importlib.import_module(f"benchmarks.{BENCHMARKS[settings.name].module}")
    try:
        rows = module.measure(settings)
    except MeasurementError as error:
        print(f"a3: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(to_json(settings.name, rows)) if as_json else show(settings.name, rows)
    return EXIT_OK


def read_settings(parser, arguments: list[str]) -> tuple[Settings, bool]:
    """Returns the flags over the benchmark's defaults, and whether JSON is wanted."""
    table = "\n".join(f"  {name:<12}{benchmark.about}" for name, benchmark in BENCHMARKS.items())
    parser.description, parser.epilog = f"Runs a benchmark:\n{table}", EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-h", "--help", action="help", help="show this message and exit")
    parser.add_argument("name", metavar="NAME", choices=tuple(BENCHMARKS), help="one of the above")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    flags = {field.name: field.metadata for field in dataclasses.fields(Settings) if field.metadata}
    for name, flag in flags.items():
        names = [f"--{name}", *["--length"] * (name == "lengths")]
        metavar, count = "N" if flag["kind"] is int else name.upper(), "+" if name == "lengths" else None
        parser.add_argument(*names, type=flag["kind"], nargs=count, metavar=metavar, help=flag["about"])
    parsed, overrides = parser.parse_known_args(arguments)
    reads, defaults = BENCHMARKS[parsed.name].flags, BENCHMARKS[parsed.name].defaults
    for argument in overrides:
        if "config" not in reads or not argument.startswith("--config."):
            near = nearest(argument.split("=")[0], [f"--{flag}" for flag in reads])
            raise InputError(f"unknown argument {argument!r}{near}", file="bench")
    given = {name: value for name in flags if (value := getattr(parsed, name)) is not None}
    for name, value in given.items():
        if name not in reads:
            raise InputError(f"a3 bench {parsed.name} does not read it", field=f"--{name}")
        if flags[name]["kind"] is int and name != "seed" and np.min(value) < 1:
            raise InputError(f"must be at least 1, got {np.min(value)}", field=f"--{name}")
    return Settings(**{**defaults, **given}, name=parsed.name, overrides=tuple(overrides)), parsed.json
