"""A model's parameters in chunks that can be read, checked and written one by one.

A chunk is some rows of a tensor as Hugging Face stores it, and with them whole zarr chunks of the leaves that
the tensor is part of: threads and processes that write chunks never share a zarr chunk. Both formats are read
as a `TensorSource`, by chunk; a conversion passes chunks on, `read_tree` assembles leaves.
"""

import abc
import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from a3_jax.checkpoints.families import LeafPart, tensor_table
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig

CHUNK_BYTES = 1 << 24  # that a thread holds, unless a row is longer
ZARR_CHUNK_BYTES = 1 << 22  # that a reader of an A3 checkpoint must decode at least
FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
_MAX_THREADS = 8
# Bits of the exponent: all of them are set in NaN and infinity, and nowhere else.
_EXPONENTS = dict(zip(FLOATS, (0x7F800000, 0x7C00, 0x7F80), strict=True))

Path = tuple[str, ...]  # of a leaf in the parameter tree
Parts = Iterable[
    tuple[Path, tuple[int, ...], np.ndarray]
]  # of leaves: path, index of the first element, values


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """A leaf as it will be stored.

    Attributes:
      shape, dtype: of the whole.
      zarr_chunks: the shape of what is encoded, and read, as one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    zarr_chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorChunk:
    """Rows of a stored tensor.

    Attributes:
      name: of the tensor, in the family's table.
      begin, end: of the first axis of its `LeafPart.split`.
      nbytes: of what is written.
    """

    name: str
    begin: int
    end: int
    nbytes: int


class TensorSource(abc.ABC):
    """A checkpoint of either format that was checked, to be read by chunk, in several threads.

    Attributes:
      directory: where it is.
      config: the model's.
      leaves: a `LeafPlan` for each leaf, by its path.
      chunks: all of them, in an order in which reading is fast.
      files: those that are read, of a Hugging Face directory; () of an A3 checkpoint.
    """

    files: Sequence[Any] = ()

    def __init__(
        self, directory, config: ModelConfig, dtypes: Mapping[Path, np.dtype], allow_nonfinite: bool
    ):
        self.directory, self.config = directory, config
        self.leaves, self.chunks = plan(config, dtypes)
        self._table, self._allow_nonfinite = tensor_table(config), allow_nonfinite

    @abc.abstractmethod
    def read(self, chunk: TensorChunk) -> Parts:
        """Reads the parts of leaves that a chunk consists of, in the dtypes of `leaves`."""

    @abc.abstractmethod
    def read_leaf(self, path: Path, index=()) -> np.ndarray:
        """Reads a part of a leaf by NumPy's basic index, as stored: what `hf_export.write_hf` reads with."""

    @abc.abstractmethod
    def params(self) -> Any:
        """Returns the whole parameter tree."""

    def _check_finite(self, array: np.ndarray, path: Path, layer: int | None) -> np.ndarray:
        if not self._allow_nonfinite and not is_finite(array):
            name, file, whole = self._whole_tensor(path, layer)
            count = whole.size - np.count_nonzero(np.isfinite(whole))
            why = (
                f"{count} of its {whole.size} values are NaN or infinite; --allow_nonfinite converts them too"
            )
            raise InputError(why, file=file, field=name)
        return array

    @abc.abstractmethod
    def _whole_tensor(self, path: Path, layer: int | None) -> tuple[str, Any, np.ndarray]:
        """Returns the name, the file and all values of the tensor that a part of a leaf belongs to."""


def read_tree(source: TensorSource, put: Callable[[Path, np.ndarray], Any]) -> Any:
    """Reads a parameter tree, hardly more than a leaf at a time in the host's memory.

    Args:
      source: a checkpoint whose chunks come tensor by tensor.
      put: called with path and values of each leaf, returns what the tree will hold.
    """
    by_leaf: dict[Path, list[TensorChunk]] = {}
    for chunk in source.chunks:
        by_leaf.setdefault(tensor_table(source.config)[chunk.name][0].leaf, []).append(chunk)
    tree: dict[str, Any] = {}
    for chunks in by_leaf.values():
        paths = [part.leaf for part in tensor_table(source.config)[chunks[0].name]]
        arrays = {path: np.empty(source.leaves[path].shape, source.leaves[path].dtype) for path in paths}

        def fill(chunk: TensorChunk, arrays=arrays) -> None:
            for path, begin, array in source.read(chunk):
                arrays[path][index_at(begin, array.shape)] = array

        run_in_threads(fill, chunks)
        while arrays:
            path, array = arrays.popitem()
            parent = tree
            for key in path[:-1]:
                parent = parent.setdefault(key, {})
            parent[path[-1]] = put(path, array)
    return tree


def run_in_threads(
    function: Callable[[TensorChunk], None],
    chunks: Sequence[TensorChunk],
    on_bytes: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Works on chunks, several at a time; after a failure no further one is begun.

    Args:
      on_bytes: called with the bytes of each chunk that is done, in their order.
    """
    threads = min(_MAX_THREADS, 1 + (os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(threads, "a3_chunks") as pool:
        waiting = [pool.submit(function, chunk) for chunk in chunks]
        try:
            for chunk, future in zip(chunks, waiting, strict=True):
                future.result()
                on_bytes(chunk.nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def plan(
    config: ModelConfig, dtypes: Mapping[Path, np.dtype]
) -> tuple[dict[Path, LeafPlan], list[TensorChunk]]:
    """Plans the leaves of a model and the chunks that make them.

    Args:
      config: the model's.
      dtypes: of each leaf, as it will be stored.
    """
    leaves: dict[Path, LeafPlan] = {}
    chunks: list[TensorChunk] = []
    for name, parts in tensor_table(config).items():
        itemsize = max(dtypes[part.leaf].itemsize for part in parts)
        of_tensor = chunks_of(name, parts[0], math.prod(parts[0].shape) * itemsize)
        chunks += of_tensor
        for part in parts:
            stack = () if part.layer is None else (config.num_layers - 1,)
            encoded = _zarr_chunks(part, of_tensor[0].end, itemsize)
            shape, one = (*stack, *part.leaf_shape), (1,) * len(stack)
            leaves[part.leaf] = LeafPlan(shape, dtypes[part.leaf], (*one, *encoded))
    return leaves, chunks


def chunks_of(name: str, part: LeafPart, nbytes: int) -> list[TensorChunk]:
    """Cuts a stored tensor, of which `part` is all or a part, into chunks of about `CHUNK_BYTES`."""
    rows = part.split[0]
    number = min(rows, math.ceil(nbytes / CHUNK_BYTES)) if _has_rows(part) else 1
    step = math.ceil(rows / max(number, 1))
    return [
        TensorChunk(name, begin, min(begin + step, rows), nbytes * min(step, rows - begin) // rows)
        for begin in range(0, rows, step)
    ]


def stored_rows(part: LeafPart, chunk: TensorChunk) -> tuple[int, int] | None:
    """Returns the rows of the stored tensor that a chunk is; None: all of it."""
    if (chunk.begin, chunk.end) == (0, part.split[0]):
        return None
    merged = part.shape[0] // part.split[0]
    return chunk.begin * merged, chunk.end * merged


def cut(part: LeafPart, chunk: TensorChunk) -> LeafPart:
    """Returns the table's entry of a tensor that consists of these rows alone."""
    rows = stored_rows(part, chunk)
    if rows is None:
        return part
    shape = (rows[1] - rows[0], *part.shape[1:])
    return dataclasses.replace(part, shape=shape, split=(chunk.end - chunk.begin, *part.split[1:]))


def index_of(part: LeafPart, chunk: TensorChunk) -> tuple[int | slice, ...]:
    """Returns where a chunk lies in the leaf of `part`: NumPy's index, the layer an integer."""
    layer = () if part.layer is None else (part.layer,)
    if stored_rows(part, chunk) is None:
        return (*layer, *(slice(0, size) for size in part.leaf_shape))
    rows = slice(chunk.begin, chunk.end)
    sizes = zip(part.order, part.leaf_shape, strict=True)
    return (*layer, *(rows if axis == 0 else slice(0, size) for axis, size in sizes))


def placed(part: LeafPart, chunk: TensorChunk, array: np.ndarray) -> tuple[Path, tuple[int, ...], np.ndarray]:
    """Returns path, first index, and array of a part of a leaf; a part of one layer gets the layer's axis."""
    begin = tuple(at if isinstance(at, int) else at.start for at in index_of(part, chunk))
    return part.leaf, begin, array if part.layer is None else array[None]


def index_at(begin: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Returns NumPy's index of a part of this shape."""
    return tuple(slice(first, first + size) for first, size in zip(begin, shape, strict=True))


def cast(array: np.ndarray, dtype, name: str, file=None) -> np.ndarray:
    """Converts an array to another float type; None: as it is."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    # Only float16 has a smaller range than the others.
    if dtype == np.float16 and np.any(np.isinf(result) & np.isfinite(array)):
        raise InputError("a value is too large for float16", file=file, field=name)
    return result


def is_finite(array: np.ndarray) -> bool:
    """Returns whether no element of a float array is NaN or infinite."""
    mask = array.dtype.type(0).view(f"u{array.dtype.itemsize}").dtype.type(_EXPONENTS[array.dtype])
    return not array.size or bool((array.view(mask.dtype) & mask).max() != mask)


def _has_rows(part: LeafPart) -> bool:
    """Returns whether the first axis of `split` is one of the leaf's, and the stored tensor's first."""
    of_leaf = part.part is None or part.part[0] != 0
    return of_leaf and part.shape[0] % part.split[0] == 0


def _zarr_chunks(part: LeafPart, step: int, itemsize: int) -> tuple[int, ...]:
    """Halves the axes of a leaf without its layers until it is small; it has as many rows as a chunk."""
    encoded = list(part.leaf_shape)
    rows = part.order.index(0) if _has_rows(part) else None
    if rows is not None:
        encoded[rows] = step
    others = [axis for axis in range(len(encoded)) if axis != rows]
    while others and math.prod(encoded) * itemsize > ZARR_CHUNK_BYTES:
        longest = max(others, key=lambda axis: encoded[axis])
        if encoded[longest] == 1:
            break
        encoded[longest] = math.ceil(encoded[longest] / 2)
    return tuple(encoded)
