"""The arrays of an A3 checkpoint in orbax's layout: read by part, proven, and written by chunk.

An item, such as `params`, is a key-value store (OCDBT) in which each leaf is a zarr array of many chunks.
Whoever reads an A3 checkpoint reads it here: a restart and `open_checkpoint` each device's shards straight
to where they live, a conversion the parts that it needs. A conversion also writes here, never a whole leaf
at a time: each process writes whole chunks into a store of its own, `params/ocdbt.process_N`; at last
process 0 makes `params` the sum of them, which copies no array. (Steps of a run are written by orbax, from
the devices.)
"""

import concurrent.futures
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
from a3_jax.checkpoints.fingerprint import fingerprints, hexadecimal, tree_name, tree_names
from a3_jax.checkpoints.host_checksum import sums_of_part
from a3_jax.checkpoints.manifest import (
    PARAMS,
    DamagedCheckpoint,
    File,
    Leaf,
    Manifest,
    list_files,
    raise_damage,
    read_checksums,
    read_manifest,
    step_of,
)
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.paths import as_path
from a3_jax.runtime.coordination import gather_and_decide, run_on_all, run_on_process_zero

_MAX_THREADS = 8
_TREE_FILE = "_METADATA"
_ROWS_AT_ONCE = 16  # of a transposition: as many cache lines as one core holds easily


def open_array(directory, name: str, leaf: Leaf, context: ts.Context | None = None) -> Any:
    """Opens a leaf of an item, to be read by NumPy's basic indices: `array[index].read().result()`.

    Args:
      directory: the item's, such as `params`.
      name: the leaf's in the manifest, without the item.
      leaf: the manifest's entry, which the array must agree with.
      context: gives the array a cache; None: it has none.

    Raises:
      InputError: no such array, or another shape or dtype.
    """
    store = {"driver": "ocdbt", "base": kvstore(directory), "path": f"{name.replace('/', '.')}/"}
    spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": "open"}
    try:
        array = ts.open(spec, read=True, open=True, context=context or ts.Context()).result()
    except Exception as error:  # tensorstore's errors share no type
        raise unreadable(directory, name, error) from error
    found = array.shape, np.dtype(array.dtype.numpy_dtype).name
    if found != (leaf.shape, leaf.dtype):
        why = f"holds {found[1]} {found[0]}, the manifest says {leaf.dtype} {leaf.shape}"
        raise InputError(why, file=directory, field=name)
    return array


def unreadable(directory, name: str, error: Exception) -> InputError:
    return InputError(f"can't be read: {one_line(error)}", file=directory, field=name)


def list_arrays(directory) -> list[str]:
    """Returns the names of the leaves in an item, from the tree that orbax keeps beside the arrays.

    Raises:
      Exception: it can't be read; these errors share no type.
    """
    tree = json.loads((as_path(directory) / _TREE_FILE).read_bytes())["tree_metadata"]
    return ["/".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in tree.values()]


def kvstore(directory) -> Any:
    """Names a directory as tensorstore does: a bucket by its URL."""
    path = str(directory)
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}


def restore_items(directory, make_targets: Callable[[Manifest], Mapping[str, Any]], alone: bool = True):
    """Reads items of a checkpoint straight to where they will live, and proves them.

    Checked in this order: the manifest, sizes and small files, the trees, and what was read by its
    fingerprints; or, where the target's dtype is not the stored one, the item's files before it is read.

    Args:
      directory: an absolute path.
      make_targets: gives, from the manifest, a tree of arrays or `ShapeDtypeStruct`s for each item.
      alone: the arrays are this process's own; otherwise all processes read them, and agree.

    Returns:
      The trees by item.

    Raises:
      DamagedCheckpoint: bytes that are not what was written, naming the file or leaf.
      RunError: files that are intact can't be read all the same; another attempt may succeed.
    """

    def check():
        manifest = read_manifest(directory)
        raise_damage(directory, manifest)
        targets = make_targets(manifest)
        for item, tree in targets.items():
            check_same_tree(manifest.item(item), tree, directory / item)
            if not _as_stored(manifest.item(item), tree):
                raise_damage(directory, manifest, deep=True, only=f"{item}/")
        return manifest, targets

    def read():
        try:
            return {
                item: _read_tree(directory / item, manifest.item(item), tree)
                for item, tree in targets.items()
            }
        except Exception as error:  # tensorstore's and the file system's: they share no type
            reason = one_line(error)
        raise_damage(directory, manifest, deep=True)
        raise RunError(EXIT_STORAGE, f"{directory}: can't be restored, its files being intact: {reason}")

    def prove():
        for item, tree in restored.items():
            if _as_stored(manifest.item(item), targets[item]):
                for damage in damaged_leaves(directory, manifest, item, tree_names(tree)):
                    raise damage

    manifest, targets = run_on_all("read", check, alone)
    restored = run_on_all("read", read, alone)
    run_on_all("read", prove, alone)
    return restored


def _read_tree(directory, stored: Mapping[str, Leaf], tree):
    """Reads an item as a tree of targets, several leaves at a time."""
    context = ts.Context()

    def read(path, target):
        name = tree_name(path)
        return _read_onto(open_array(directory, name, stored[name], context), target)

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    with concurrent.futures.ThreadPoolExecutor(_MAX_THREADS, "a3_read") as pool:
        return structure.unflatten(list(pool.map(lambda leaf: read(*leaf), leaves)))


def _read_onto(array, target):
    """Reads an array as its target is: on devices by its shards, or as NumPy's, or as a plain number."""
    sharding = getattr(target, "sharding", None)
    if sharding is None:
        whole = np.asarray(array.read().result())
        return whole.astype(target.dtype) if hasattr(target, "dtype") else whole.item()
    places = sharding.addressable_devices_indices_map(target.shape)
    reads = {str(index): array[index].read() for index in places.values()}  # replicas are read once
    parts = {
        index: np.asarray(read.result()).astype(target.dtype, copy=False) for index, read in reads.items()
    }
    on_devices = [jax.device_put(parts[str(index)], device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(target.shape, sharding, on_devices)


def damaged_leaves(directory, manifest: Manifest, item: str, leaves: Mapping[str, Any]):
    """A `DamagedCheckpoint` for each array whose fingerprint is not the manifest's."""
    stored, step = manifest.item(item), step_of(directory)
    message = "is damaged: its fingerprint is not that of what was written"
    return [
        DamagedCheckpoint(message, file=directory, leaf=f"{item}/{name}", step=step)
        for name, found in fingerprints(dict(leaves)).items()
        if found != stored[name].fingerprint
    ]


def describe(leaf) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array, a `ShapeDtypeStruct` or a number."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def check_same_tree(stored: Mapping[str, Leaf], tree, place) -> None:
    """The tree has the stored leaves and shapes.

    Raises:
      InputError: the first difference, by its name.
    """
    wanted = {name: describe(leaf)[0] for name, leaf in tree_names(tree).items()}
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError("is missing here", file=place, field=name)
        if stored[name].shape != shape:
            raise InputError(f"shape {stored[name].shape}, expected {shape}", file=place, field=name)
    for name in stored:
        if name not in wanted:
            raise InputError("is unknown to the model or optimiser", file=place, field=name)


def check_same_dtypes(stored: Mapping[str, Leaf], tree, place) -> None:
    """The tree has the stored dtypes, which orbax would change without a word.

    Raises:
      InputError: the first difference, by its name.
    """
    for name, leaf in tree_names(tree).items():
        dtype = describe(leaf)[1]
        if name in stored and stored[name].dtype != dtype:
            raise InputError(f"dtype {stored[name].dtype}, expected {dtype}", file=place, field=name)


def one_line(error: BaseException) -> str:
    """What an exception of orbax or tensorstore says, as part of a line."""
    text = " ".join(str(error).split("See full TensorStore")[0].split())
    return text[:200] if isinstance(error, InputError) else f"{type(error).__name__}: {text[:300]}"


def _as_stored(stored, tree) -> bool:
    return all(stored[name].dtype == describe(leaf)[1] for name, leaf in tree_names(tree).items())


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
      read: gives the parts of leaves that a chunk consists of; called in several threads.
      on_bytes: called with the bytes of each chunk that is written.

    Returns:
      The files and leaves so far, in every process; `finish_checkpoint` writes the manifest.
    """
    share = chunks[jax.process_index() :: jax.process_count()]
    own = f"{PARAMS}/{_own_store(jax.process_index())}"

    def work():
        writer = _Writer(as_path(directory) / PARAMS, leaves)
        run_in_threads(lambda chunk: writer.write(read(chunk)), share, on_bytes)
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
    (directory / _TREE_FILE).write_text(json.dumps(tree))


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
