"""The parameters of a checkpoint, written piece by piece in orbax's layout: never a whole leaf in memory.

A leaf is a zarr array of many chunks. Each process writes whole chunks into a key-value store (OCDBT) of
its own, `params/ocdbt.process_N`; at last process 0 makes `params` the sum of them, which copies no array.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from a3_jax.checkpoints.chunks import LeafPlan, Piece
from a3_jax.checkpoints.fingerprint import hexadecimal
from a3_jax.checkpoints.host_checksum import sums_of_part
from a3_jax.checkpoints.manifest import (
    File,
    Leaf,
    Manifest,
    list_files,
    read_checksums,
    write_manifest,
)
from a3_jax.checkpoints.orbax_items import PARAMS, kvstore, write_description
from a3_jax.checkpoints.verified_restore import one_line
from a3_jax.errors import InputError
from a3_jax.paths import as_path
from a3_jax.runtime.coordination import gather_and_decide, run_on_all, run_on_process_zero

_MAX_THREADS = 8
_ROWS_AT_ONCE = 16  # of a transposition: as many cache lines as one core holds easily

# (path of the leaf, index of the first element, that part of the leaf)
Parts = Iterable[tuple[tuple[str, ...], tuple[int, ...], np.ndarray]]


def write_params(
    directory,
    leaves: Mapping[tuple[str, ...], LeafPlan],
    pieces: Sequence[Piece],
    read: Callable[[Piece], Parts],
    on_bytes: Callable[[int], Any] = lambda nbytes: None,
) -> Manifest:
    """Writes `directory/params`. Every process of the run calls it, reads its share and writes that.

    Args:
      directory: of the checkpoint, absolute, the same for every process; what is missing of it is made.
      leaves: all leaves.
      pieces: all pieces; together they cover the leaves, none shares a chunk with another.
      read: gives the parts of leaves that a piece consists of; called in several threads.
      on_bytes: called with the bytes of each piece that is written.

    Returns:
      The files and leaves so far, in every process; `finish_checkpoint` writes the manifest.
    """
    share = pieces[jax.process_index() :: jax.process_count()]
    own = f"{PARAMS}/{_own_store(jax.process_index())}"

    def work():
        writer = _Writer(as_path(directory) / PARAMS, leaves)
        _in_threads(lambda piece: writer.write(read(piece)), share, on_bytes)
        files = read_checksums(as_path(directory) / own, list_files(as_path(directory) / own))
        return {
            "sums": {name: [int(word) for word in pair] for name, pair in writer.sums.items()},
            "files": {f"{own}/{name}": dataclasses.astuple(file) for name, file in files.items()},
        }

    told = gather_and_decide("convert", run_on_all("convert", work), list)
    run_on_process_zero("convert", lambda: _merge(as_path(directory) / PARAMS, leaves))
    sums = {name: sum(np.array(one["sums"][name], np.uint32) for one in told) for name in told[0]["sums"]}
    described = {
        f"{PARAMS}/{'/'.join(path)}": Leaf(leaf.shape, leaf.dtype.name, fingerprint)
        for (path, leaf), fingerprint in zip(leaves.items(), hexadecimal(sums).values(), strict=True)
    }
    files = {name: File(*file) for one in told for name, file in one["files"].items()}
    return Manifest(files, described)


def finish_checkpoint(directory, manifest: Manifest, meta, tokenizer) -> None:
    """Makes a directory that holds `params` a checkpoint; one process does."""
    write_description(directory, meta, tokenizer)
    files = dict(manifest.files)
    files |= read_checksums(directory, set(list_files(directory)) - files.keys())
    write_manifest(directory, dataclasses.replace(manifest, files=files))


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
            place = tuple(slice(first, first + size) for first, size in zip(begin, array.shape, strict=True))
            ordered = in_order(array)
            with _writing(self._store):
                self._arrays[path][place].write(ordered).result()
            with self._lock:
                self.sums[".".join(path)] += sums


@contextlib.contextmanager
def _writing(directory) -> Iterator[None]:
    """Around calls of tensorstore, whose errors share no type: a full disk is one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"can't be written: {one_line(error)}", file=directory) from error


def in_order(array: np.ndarray) -> np.ndarray:
    """The array with its elements one behind the other: a copy where it is transposed.

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


def _in_threads(write: Callable[[Piece], None], share: Sequence[Piece], on_bytes) -> None:
    """All pieces, several at a time; after a failure no further one is begun."""
    threads = min(_MAX_THREADS, 1 + (os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(threads, "a3_convert") as pool:
        waiting = [pool.submit(write, piece) for piece in share]
        try:
            for piece, future in zip(share, waiting, strict=True):
                future.result()
                on_bytes(piece.nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _own_store(process: int) -> str:
    return f"ocdbt.process_{process}"


def _array_spec(store, name: str, leaf: LeafPlan) -> dict[str, Any]:
    """An array as orbax stores it. All processes know its description, one writes it."""
    dtype = "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.newbyteorder("<").str
    spec = {
        "driver": "zarr",
        "kvstore": {**_ocdbt(store), "path": f"{name}/"},
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "zarr_format": 2,
            "shape": leaf.shape,
            "chunks": leaf.chunks,
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
    (directory / "_METADATA").write_text(json.dumps(tree))


def _ocdbt(directory) -> dict[str, Any]:
    """A key-value store to be written in a directory, set up as orbax does it."""
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
