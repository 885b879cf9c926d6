"""Safetensors files, written tensor by tensor: the format is told in `safetensors_io`.

The safetensors library writes a shard from memory as a whole; here one tensor at a time is in memory.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from a3_jax.checkpoints.safetensors_io import DTYPES, INDEX_FILE, SINGLE_FILE
from a3_jax.paths import as_path, write_json

MAX_SHARD_BYTES = 5_000_000_000
_CODES = {np.dtype(dtype).name: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its dtype (NumPy) and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
    directory,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    max_shard_bytes=MAX_SHARD_BYTES,
) -> None:
    """Writes a model's tensors into a directory: the same bytes for the same input.

    Args:
      directory: exists; the caller makes the whole of it atomic.
      specs: dtype and shape of every tensor by name, in the order in which they fill the shards.
      read: gives a tensor when its turn comes; one at a time is in memory.
      max_shard_bytes: a new file begins before this is exceeded; a tensor is never split.
    """
    directory = as_path(directory)
    shards = _plan_shards(specs, max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, specs, shards[0], read)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, specs, names, read)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)


def _plan_shards(specs, max_shard_bytes) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def _write_file(path, specs, names: Iterable[str], read) -> None:
    # Wide dtypes first, so that every tensor is aligned to its item size.
    names = sorted(names, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = specs[name]
        begin, end = end, end + spec.nbytes
        code = _CODES[np.dtype(spec.dtype).name]
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.asarray(read(name))
            if array.dtype != specs[name].dtype or array.shape != tuple(specs[name].shape):
                raise ValueError(f"{name}: promised {specs[name]}, got {array.dtype} {array.shape}")
            file.write(array.tobytes())
