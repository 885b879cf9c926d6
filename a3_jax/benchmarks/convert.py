"""`a3 bench convert`: a random Llama in bfloat16 to A3 and back, against a copy on the same disk.

Each is a call in a fresh process, timed until all is on disk, with the process's peak memory. By default
the shape is that of Llama 3.2 1B: 2.5 GB, which must fit into the temporary directory four times.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np

from a3_jax.benchmarks.measurement import MeasurementError, Row, note, ratio
from a3_jax.benchmarks.settings import Settings
from a3_jax.benchmarks.worker import resident_peak
from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.destination import check_space
from a3_jax.checkpoints.hf_export import hf_target, write_hf
from a3_jax.model.two_stream import abstract_params

MAX_LENGTH, SCALE = 131_072, 0.02
SHARD_BYTES, READ_AT_ONCE = 10**9, 1 << 24
ALLOWED_BYTES = 10**9  # beside twice the largest leaf


def measure(settings: Settings) -> list[Row]:
    """Seconds and peak bytes of a copy and of both directions; speeds over the copy's, peaks over the limit.

    Raises:
      InputError: the temporary directory's disk is too small.
      MeasurementError: a process failed.
    """
    model = dataclasses.replace(settings.model(MAX_LENGTH), tie_embeddings=True)
    sizes = [2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model))]
    largest, total = max(sizes), sum(sizes)
    setting = {name: getattr(settings, name) for name in ("d_model", "layers", "heads", "kv_heads", "mlp")}
    setting |= {"vocab": settings.vocab, "bytes": total, "largest_leaf": largest}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in _TASKS}
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        check_space(root, 4 * total)
        note(f"convert: making a model of {total:,} bytes")
        make_model(root / "hf", model, settings.seed)
        for number in range(settings.repeats):
            for name, (_, source, target) in _TASKS.items():
                found[name].append(_apart(name, root / source, root / target))
                seconds, peak = found[name][-1]
                told = f"{name} {seconds:.3g} s, {peak / 1e6:,.0f} MB"
                note(f"convert: {number + 1} of {settings.repeats}: {told}")
            for place in ("copy", "a3", "back"):
                shutil.rmtree(root / place)
    return _rows(found, 2 * largest + ALLOWED_BYTES, setting)


def make_model(directory, model, seed: int) -> None:
    """Writes a Hugging Face directory of random parameters in bfloat16, a shard after the other."""
    rng, meta = np.random.default_rng(seed), Meta(model)
    shapes = abstract_params(model)

    def read(path, index=()):
        leaf = functools.reduce(lambda tree, key: tree[key], path, shapes)
        shape = np.broadcast_to(np.int8(0), leaf.shape)[index].shape
        return (SCALE * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)

    write_hf(directory, read, hf_target(meta, "bfloat16"), meta, None, SHARD_BYTES)


def _copy(source, target) -> None:
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            while piece := read.read(READ_AT_ONCE):
                write.write(piece)


def _to_a3(source, target) -> None:
    convert(source, target)


def _to_hf(source, target) -> None:
    convert(source, target, to="hf")


_TASKS = {  # from where, to where
    "copy": (_copy, "hf", "copy"),
    "to_a3": (_to_a3, "hf", "a3"),
    "to_hf": (_to_hf, "a3", "back"),
}


def _apart(name: str, source, target) -> tuple[float, float]:
    """Seconds and peak bytes of a task in a process of its own."""
    command = [sys.executable, "-m", __name__, name, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        raise MeasurementError(f"{name}: exit status {done.returncode} {last[0]}".strip())
    told = json.loads(done.stdout.splitlines()[-1])
    return told["seconds"], told["peak"]


def _rows(found, limit: float, setting) -> list[Row]:
    rows = []
    for name, measured in found.items():
        rows.append(Row(f"{name}_time", "s", setting, [seconds for seconds, _ in measured]))
        rows.append(Row(f"{name}_peak", "bytes", setting, [peak for _, peak in measured]))
    copied = rows[0].repeats
    for name in ("to_a3", "to_hf"):
        seconds, peaks = zip(*found[name])
        rows.append(ratio(f"{name}_speed_over_copy", copied, seconds, setting))
        rows.append(ratio(f"{name}_peak_over_limit", peaks, [limit] * len(peaks), setting))
    return rows


def main() -> int:
    name, source, target = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    began = time.perf_counter()
    _TASKS[name][0](source, target)
    for path in target.rglob("*"):
        if path.is_file():
            opened = os.open(path, os.O_RDONLY)
            os.fsync(opened)
            os.close(opened)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": resident_peak()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
