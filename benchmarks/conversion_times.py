"""`a3 bench convert`: a random Llama in bfloat16 to A3 and back, against a copy on the same disk.

Each is timed in a fresh process until all is on disk. The default is the shape of Llama 3.2 1B: 2.5 GB, which
must fit into the temporary directory four times.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import shutil
import tempfile

import jax
import ml_dtypes
import numpy as np

from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.directories import check_space
from a3_jax.checkpoints.hf_export import plan_hf_export, write_hf
from a3_jax.model.two_stream import abstract_params
from benchmarks.fresh_process import fresh_process
from benchmarks.measurement import Row, note, ratio
from benchmarks.settings import MODEL, Settings

MAX_LENGTH, SCALE, SHARD_BYTES = 131_072, 0.02, 10**9
ALLOWED_BYTES = 10**9  # beside twice the largest leaf
TASKS = {"copy": ("hf", "copy"), "to_a3": ("hf", "a3"), "to_hf": ("a3", "back")}  # from where, to where


def measure(settings: Settings) -> list[Row]:
    """Measures a copy and both directions: seconds over the copy's, peak bytes over a limit."""
    model = dataclasses.replace(settings.model(MAX_LENGTH), tie_embeddings=True)
    sizes = [2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model))]
    setting = {name: getattr(settings, name) for name in MODEL} | {"bytes": sum(sizes)}
    setting["largest_leaf"] = max(sizes)
    seconds, peaks = ({name: [] for name in TASKS} for _ in range(2))
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        check_space(root, 4 * sum(sizes))
        note(f"convert: making a model of {sum(sizes):,} bytes")
        make_model(root / "hf", model, settings.seed)
        for number, (name, (source, target)) in itertools.product(range(settings.repeats), TASKS.items()):
            shutil.rmtree(root / target, ignore_errors=True)
            task = {"task": name, "source": str(root / source), "target": str(root / target)}
            with fresh_process(f"convert: {name}", disk_task, warm_ups=0, **task) as call:
                found = call()
            seconds[name].append(found["seconds"])
            peaks[name].append(found["process_peak"])
            note(f"convert: {number + 1} of {settings.repeats}: {name} {found['seconds']:.3g} s")
    limit, rows = [2 * max(sizes) + ALLOWED_BYTES] * settings.repeats, []
    for name in TASKS:
        rows.append(Row(f"{name}_time", "s", setting, seconds[name]))
        rows.append(Row(f"{name}_peak", "bytes", setting, peaks[name]))
        if name != "copy":
            rows.append(ratio(f"{name}_speed_over_copy", seconds["copy"], seconds[name], setting))
            rows.append(ratio(f"{name}_peak_over_limit", peaks[name], limit, setting))
    return rows


def make_model(directory, model, seed: int) -> None:
    """Writes a Hugging Face directory of random parameters in bfloat16, one shard after the other."""
    rng, meta, shapes = np.random.default_rng(seed), Meta(model), abstract_params(model)

    def read(path, index=()):
        leaf = functools.reduce(lambda tree, key: tree[key], path, shapes)
        shape = np.broadcast_to(np.int8(0), leaf.shape)[index].shape
        return (SCALE * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

    write_hf(directory, read, plan_hf_export(meta, "bfloat16"), meta, None, SHARD_BYTES)


def disk_task(task: str, source: str, target: str):
    """Returns the call of a task, which ends when every file is on disk."""

    def run():
        if task == "copy":
            shutil.copytree(source, target)
        else:
            convert(source, target, to=task.removeprefix("to_"))
        for path in filter(pathlib.Path.is_file, pathlib.Path(target).rglob("*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    return run
