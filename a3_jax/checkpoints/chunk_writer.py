"""The parameters of an A3 checkpoint, written by chunk in orbax's layout: never a whole leaf in memory.

Each process writes whole zarr chunks into a key-value store (OCDBT) of its own, `params/ocdbt.process_N`; at
last process 0 makes `params` the sum of them, which copies no array. Steps of a run are written by orbax,
from the devices: see `step_writer`.
"""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from a3_jax.checkpoints.chunks import LeafPlan, Parts, TensorChunk, index_at, run_in_threads
from a3_jax.checkpoints.fingerprint import hexadecimal, sums_of_part
from a3_jax.checkpoints.manifest import PARAMS, File, Leaf, Manifest, list_files, read_checksums
from a3_jax.checkpoints.stored_arrays import TREE_FILE, kvstore, one_line
from a3_jax.errors import InputError
from a3_jax.paths import as_path
from a3_jax.runtime.coordination import gather_and_decide, run_on_all, run_on_process_zero

_ROWS_AT_ONCE = 16  # of a transposition: as many cache lines as one core holds easily


def write_params(
    directory,
    leaves: Mapping[tuple[str, ...], LeafPlan],
    chunks: Sequence[TensorChunk],
    read: Callable[[TensorChunk], Parts],
    on_bytes: Callable[[int], Any] = lambda nbytes: None,
) -> Manifest:
    """Writes `directory/params`. Every process of the run calls it, reads its share and writes that.

    Args:
      directory: of the checkpoint, absolute, the same for every process; what is missing of it is made.
      leaves: all leaves.
      chunks: all of them; together they cover the leaves, none shares a zarr chunk with another.
      read: yields the parts of leaves that a chunk consists of; called in several threads.
      on_bytes: called with the bytes of each chunk that is written.

    Returns:
      The files and leaves so far, in every process; `finish_checkpoint` writes the manifest.
    """
    share = chunks[jax.process_index() :: jax.process_count()]
    own = f"{PARAMS}/{_own_store(jax.process_index())}"

    def write_all():
        writer = _Writer(as_path(directory) / PARAMS, leaves)
        run_in_threads(lambda chunk: writer.write(read(chunk)), share, on_bytes)
        files = read_checksums(as_path(directory) / own, list_files(as_path(directory) / own))
        return {
            "sums": {name: [int(word) for word in pair] for name, pair in writer.sums.items()},
            "files": {f"{own}/{name}": dataclasses.astuple(file) for name, file in files.items()},
        }

    reports = gather_and_decide("convert", run_on_all("convert", write_all), list)
    run_on_process_zero("convert", lambda: _merge(as_path(directory) / PARAMS, leaves))
    sums = {
        name: sum(np.array(one["sums"][name], np.uint32) for one in reports) for name in reports[0]["sums"]
    }
    described = {
        f"{PARAMS}/{'/'.join(path)}": Leaf(leaf.shape, leaf.dtype.name, fingerprint)
        for (path, leaf), fingerprint in zip(leaves.items(), hexadecimal(sums).values(), strict=True)
    }
    files = {name: File(*file) for one in reports for name, file in one["files"].items()}
    return Manifest(files, described)


class _Writer:
    """The arrays of this process's store, open, and the sums of what was written into them."""

    def __init__(self, directory, leaves: Mapping[tuple[str, ...], LeafPlan]):
        self.sums = {".".join(path): np.zeros(2, np.uint32) for path in leaves}
        self._lock = threading.Lock()
        context = ts.Context()  # one, so that all arrays write to one store
        self._store = store = directory / _own_store(jax.process_index())
        store.mkdir(parents=True, exist_ok=True)
        opening = {
            path: ts.open(_array_spec(store, ".".join(path), leaf), context=context)
            for path, leaf in leaves.items()
        }
        with _writing(store):
            self._arrays = {path: future.result() for path, future in opening.items()}

    def write(self, parts: Parts) -> None:
        """Writes parts of leaves; returns when they are on disk."""
        for path, begin, array in parts:
            sums = sums_of_part(array, begin)
            ordered = in_order(array)
            with _writing(self._store):
                self._arrays[path][index_at(begin, array.shape)].write(ordered).result()
            with self._lock:
                self.sums[".".join(path)] += sums


@contextlib.contextmanager
def _writing(directory) -> Iterator[None]:
    """Turns errors of tensorstore, which share no type, into one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"can't be written: {one_line(error)}", file=directory) from error


def in_order(array: np.ndarray) -> np.ndarray:
    """Returns the array with its elements in C order: a copy if it is transposed.

    NumPy's own copy goes along the result's rows and meets a new cache line with every element; this one
    takes a few of the source's rows at a time.
    """
    if array.flags.c_contiguous:
        return array
    bits = array.view(f"u{array.dtype.itemsize}")
    result = np.empty(bits.shape, bits.dtype)
    bits, copy = bits.squeeze(), result.squeeze()
    axes = sorted(range(bits.ndim), key=lambda axis: -bits.strides[axis])  # as it lies in memory
    source, target = bits.transpose(axes), copy.transpose(axes)
    for outer in np.ndindex(source.shape[:-2]):
        for row in range(0, source.shape[-2], _ROWS_AT_ONCE):
            here = (*outer, slice(row, row + _ROWS_AT_ONCE))
            target[here] = source[here]
    return result.view(array.dtype)


def _own_store(process: int) -> str:
    return f"ocdbt.process_{process}"


def _array_spec(store, name: str, leaf: LeafPlan) -> dict[str, Any]:
    """Describes an array as orbax stores it. All processes know the description, one writes it."""
    dtype = "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.newbyteorder("<").str
    spec = {
        "driver": "zarr",
        "kvstore": {**_ocdbt(store), "path": f"{name}/"},
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "zarr_format": 2,
            "shape": leaf.shape,
            "chunks": leaf.zarr_chunks,
            "dtype": dtype,
            "compressor": {"id": "zstd", "level": 1},
            "fill_value": None,
            "filters": None,
            "order": "C",
            "dimension_separator": ".",
        },
    }
    first = jax.process_index() == 0
    return spec | ({"create": True} if first else {"open": True, "assume_metadata": True})


def _merge(directory, leaves) -> None:
    """Makes `directory` a store of all that the processes wrote, and a tree for orbax."""
    context = ts.Context()
    whole = ts.KvStore.open(_ocdbt(directory), context=context).result()
    with _writing(directory), ts.Transaction(atomic=True) as transaction:
        for process in range(jax.process_count()):
            base = kvstore(directory / _own_store(process))
            part = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
            part.experimental_copy_range_to(whole.with_transaction(transaction)).result()
    _write_tree_metadata(directory, leaves)


def _write_tree_metadata(directory, paths) -> None:
    """Writes what orbax asks of an item's directory before it opens the arrays in it.

    Args:
      directory: of the item.
      paths: of the leaves, from the tree's root.
    """
    leaves = {
        str(tuple(path)): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],  # of a dictionary
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for path in sorted(paths)
    }
    tree = {
        "tree_metadata": leaves,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / TREE_FILE).write_text(json.dumps(tree))


def _ocdbt(directory) -> dict[str, Any]:
    """Describes a key-value store to be written in a directory, set up as orbax does it."""
    return {
        "driver": "ocdbt",
        "base": kvstore(directory),
        # descriptions beside the keys, chunks not; few nodes, so that much is found with one read
        "config": {
            "max_inline_value_bytes": 1024,
            "max_decoded_node_bytes": 100_000_000,
            "manifest_kind": "single",
        },
        "assume_config": True,  # nobody else writes there
    }
