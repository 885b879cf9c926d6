"""Arrays of a checkpoint, each compared with what the manifest says of it."""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from a3_jax.checkpoints.fingerprint import fingerprints, tree_names
from a3_jax.checkpoints.manifest import (
    DamagedCheckpoint,
    Leaf,
    Manifest,
    raise_damage,
    read_manifest,
    step_of,
)
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.runtime.coordination import run_on_all


def read_items(directory, make_targets: Callable[[Manifest], Mapping[str, Any]], alone: bool = True):
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
      InputError: other trees or shapes.
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
        handler = ocp.StandardCheckpointHandler()
        try:
            return {
                item: handler.restore(directory / item, args=ocp.args.StandardRestore(tree))
                for item, tree in targets.items()
            }
        except Exception as error:  # ValueError, KeyError, FileNotFoundError, ...: they share no type
            reason = one_line(error)
        silence_reads_in_flight()
        raise_damage(directory, manifest, deep=True)
        raise RunError(EXIT_STORAGE, f"{directory}: can't be restored, its files being intact: {reason}")

    def prove():
        for item, tree in restored.items():
            if _as_stored(manifest.item(item), targets[item]):
                check_fingerprints(directory, manifest, item, tree_names(tree))

    manifest, targets = run_on_all("read", check, alone)
    restored = run_on_all("read", read, alone)
    run_on_all("read", prove, alone)
    return restored


def check_fingerprints(directory, manifest: Manifest, item: str, leaves: Mapping[str, Any]) -> None:
    """Compares arrays with the manifest.

    Raises:
      DamagedCheckpoint: of the first leaf that is another one.
    """
    for damage in damaged_leaves(directory, manifest, item, leaves):
        raise damage


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


@functools.cache
def silence_reads_in_flight() -> None:
    """After a failed read others go on in orbax's threads; each would print a traceback of its own."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # "exception was never retrieved"
    report = sys.unraisablehook

    def report_others(unraisable):
        late = isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(
            unraisable.exc_value
        )
        if not late and not inspect.iscoroutine(unraisable.object):
            report(unraisable)

    sys.unraisablehook = report_others
