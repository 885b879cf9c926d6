"""The arrays of an A3 checkpoint in orbax's layout: read by part, and proven.

An item, such as `params`, is a key-value store (OCDBT) in which each leaf is a zarr array of many chunks.
Every reader of A3 checkpoints comes here: a restart and `open_checkpoint` for each device's shards,
straight to where they live, a conversion for the parts that it needs.
"""

import concurrent.futures
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from a3_jax.checkpoints.fingerprint import fingerprints, tree_name, tree_names
from a3_jax.checkpoints.manifest import (
    DamagedCheckpoint,
    Leaf,
    Manifest,
    raise_damage,
    read_manifest,
    step_of,
)
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.paths import as_path
from a3_jax.runtime.coordination import run_on_all

_MAX_THREADS = 8
TREE_FILE = "_METADATA"


def open_array(directory, name: str, leaf: Leaf, context: ts.Context | None = None) -> Any:
    """Opens a leaf of an item, to be read by NumPy's basic indices: `array[index].read().result()`.

    Args:
      directory: the item's, such as `params`.
      name: the leaf's in the manifest, without the item.
      leaf: the manifest's entry, which the array must agree with.
      context: has the array's cache; None: it has no cache.
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
    tree = json.loads((as_path(directory) / TREE_FILE).read_bytes())["tree_metadata"]
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
      make_targets: returns, from the manifest, a tree of arrays or `ShapeDtypeStruct`s for each item.
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
        if isinstance(target, jax.ShapeDtypeStruct):
            return jax.device_put(whole.astype(target.dtype))
        return whole.astype(target.dtype) if hasattr(target, "dtype") else whole.item()
    indices = sharding.addressable_devices_indices_map(target.shape)
    reads = {str(index): array[index].read() for index in indices.values()}  # replicas are read once
    parts = {
        index: np.asarray(read.result()).astype(target.dtype, copy=False) for index, read in reads.items()
    }
    on_devices = [jax.device_put(parts[str(index)], device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(target.shape, sharding, on_devices)


def damaged_leaves(directory, manifest: Manifest, item: str, leaves: Mapping[str, Any]):
    """Returns a `DamagedCheckpoint` for each array whose fingerprint is not the manifest's."""
    stored, step = manifest.item(item), step_of(directory)
    message = "is damaged: its fingerprint is not that of what was written"
    return [
        DamagedCheckpoint(message, file=directory, leaf=f"{item}/{name}", step=step)
        for name, found in fingerprints(dict(leaves)).items()
        if found != stored[name].fingerprint
    ]


def shape_and_dtype(leaf) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of an array, a `ShapeDtypeStruct` or a number."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def check_same_tree(stored: Mapping[str, Leaf], tree, directory) -> None:
    """Checks that a tree has the stored leaves and shapes."""
    wanted = {name: shape_and_dtype(leaf)[0] for name, leaf in tree_names(tree).items()}
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError("is missing here", file=directory, field=name)
        if stored[name].shape != shape:
            raise InputError(f"shape {stored[name].shape}, expected {shape}", file=directory, field=name)
    for name in stored:
        if name not in wanted:
            raise InputError("is unknown to the model or optimiser", file=directory, field=name)


def check_same_dtypes(stored: Mapping[str, Leaf], tree, directory) -> None:
    """Checks that a tree has the stored dtypes, which a restore would change silently."""
    for name, leaf in tree_names(tree).items():
        dtype = shape_and_dtype(leaf)[1]
        if name in stored and stored[name].dtype != dtype:
            raise InputError(f"dtype {stored[name].dtype}, expected {dtype}", file=directory, field=name)


def one_line(error: BaseException) -> str:
    """Returns an exception of orbax or tensorstore as part of a line."""
    text = " ".join(str(error).split("See full TensorStore")[0].split())
    return text[:200] if isinstance(error, InputError) else f"{type(error).__name__}: {text[:300]}"


def _as_stored(stored, tree) -> bool:
    return all(stored[name].dtype == shape_and_dtype(leaf)[1] for name, leaf in tree_names(tree).items())
