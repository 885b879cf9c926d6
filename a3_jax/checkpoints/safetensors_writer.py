"""Safetensors files, written piece by piece: the format is told in `safetensors_io`.

The safetensors library writes a shard from memory as a whole; here a piece of one tensor is in memory.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from a3_jax.checkpoints.safetensors_io import DTYPES, INDEX_FILE, SINGLE_FILE
from a3_jax.paths import as_path, write_json

MAX_SHARD_BYTES = 5_000_000_000
_STRIP_BYTES = 32
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
    pieces: Callable[[str], Iterable[np.ndarray]],
    max_shard_bytes=MAX_SHARD_BYTES,
    on_tensor: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Writes a model's tensors into a directory: the same bytes for the same input.

    Args:
      directory: exists; the caller makes the whole of it atomic.
      specs: dtype and shape of every tensor by name, in the order in which they fill the shards; inside
        one wide dtypes go first, so that every tensor is aligned to its item size.
      pieces: gives a tensor when its turn comes, as arrays that lie behind each other in its bytes; one
        at a time is in memory.
      max_shard_bytes: a new file begins before this is exceeded; a tensor is never split.
      on_tensor: called with name and bytes of each tensor that was written.
    """
    directory = as_path(directory)
    shards = _plan_shards(specs, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, {name: specs[name] for name in names}, pieces, on_tensor)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
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


def _write_file(path, specs: Mapping[str, TensorSpec], pieces, on_tensor) -> None:
    names = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
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
            _write_tensor(file, name, specs[name], pieces(name))
            on_tensor(name, specs[name].nbytes)


def _write_tensor(file, name, spec: TensorSpec, pieces: Iterable[np.ndarray]) -> None:
    written = 0
    for piece in pieces:
        if piece.dtype != spec.dtype or piece.shape[1:] != tuple(spec.shape[1:]):
            raise ValueError(f"{name}: promised {spec}, got {piece.dtype} {piece.shape}")
        file.write(_contiguous(piece).tobytes())
        written += piece.nbytes
    if written != spec.nbytes:
        raise ValueError(f"{name}: promised {spec.nbytes} bytes, got {written}")


def _contiguous(array: np.ndarray) -> np.ndarray:
    """The same numbers in order; a transposed matrix goes in strips, four times faster than in one."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    width = max(1, _STRIP_BYTES // array.dtype.itemsize)
    for begin in range(0, array.shape[1], width):
        result[:, begin : begin + width] = array[:, begin : begin + width]
    return result
