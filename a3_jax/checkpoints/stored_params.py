"""Parameters of an A3 checkpoint, read piece by piece: never the whole model, hardly more than a leaf.

A leaf lies in chunks as large as what one device held when it was written: often all of it. Whoever wants
a layer decodes whole chunks, so the chunks of a leaf are kept until other leaves are read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from a3_jax.checkpoints.a3_format import Meta, load_meta
from a3_jax.checkpoints.manifest import Leaf, raise_damage, read_manifest
from a3_jax.checkpoints.orbax_items import PARAMS, kvstore
from a3_jax.checkpoints.verified_restore import check_same_tree, one_line
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import abstract_params
from a3_jax.paths import absolute


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """The parameters of a checkpoint whose files are those that were written.

    Attributes:
      directory: the checkpoint.
      meta: what it says of itself.
      leaves: shape, dtype and fingerprint by name, such as `layers/q`.
    """

    directory: Any
    meta: Meta
    leaves: Mapping[str, Leaf]
    _opened: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        return self.meta.model

    def read(self, path: tuple[str, ...], index=()) -> np.ndarray:
        """A part of a leaf, as stored. Fast where calls for the same leaf follow each other.

        Args:
          path: of the leaf in the parameter tree.
          index: NumPy's basic one, of integers and slices; (): the whole leaf.

        Raises:
          InputError: it can't be read.
        """
        name = "/".join(path)
        if name not in self._opened:
            self._make_room(name)
            self._opened[name] = self._open(name)
        try:
            return self._opened[name][index].read().result()
        except Exception as error:  # tensorstore's errors share no type
            raise self._unreadable(name, error) from error

    def _make_room(self, name: str) -> None:
        """Leaves in memory together are no larger than the largest one: the longest unused go."""
        most = max(_nbytes(leaf) for leaf in self.leaves.values())
        wanted = {**self._opened, name: None}
        while len(wanted) > 1 and sum(_nbytes(self.leaves[it]) for it in wanted) > most:
            oldest = next(iter(wanted))
            del wanted[oldest], self._opened[oldest]

    def _open(self, name: str):
        """The array on disk, with a cache of its own that goes with it."""
        leaf = self.leaves[name]
        context = ts.Context({"cache_pool": {"total_bytes_limit": 2 * _nbytes(leaf) + (1 << 20)}})
        base = {"driver": "ocdbt", "base": kvstore(self.directory / PARAMS)}
        array = {**base, "path": f"{name.replace('/', '.')}/"}  # as orbax calls it
        spec = {"driver": "zarr", "kvstore": array, "recheck_cached_data": "open"}
        try:
            store = ts.open(spec, read=True, open=True, context=context).result()
        except Exception as error:
            raise self._unreadable(name, error) from error
        found = store.shape, np.dtype(store.dtype.numpy_dtype).name
        if found != (leaf.shape, leaf.dtype):
            why = f"holds {found[1]} {found[0]}, the manifest says {leaf.dtype} {leaf.shape}"
            raise InputError(why, file=self.directory / PARAMS, field=name)
        return store

    def _unreadable(self, name, error) -> InputError:
        return InputError(f"can't be read: {one_line(error)}", file=self.directory / PARAMS, field=name)


def open_params(directory) -> StoredParams:
    """Checks an A3 checkpoint before anything of it is used.

    Every file is compared with its checksum. A fingerprint says nothing more of arrays that are decoded from
    these files, and to compute one takes longer than to read.

    Raises:
      DamagedCheckpoint: a file that is not what was written.
      InputError: a tree that doesn't fit the model config.
    """
    directory = absolute(directory)
    meta, manifest = load_meta(directory), read_manifest(directory)
    raise_damage(directory, manifest)
    raise_damage(directory, manifest, deep=True, only=f"{PARAMS}/")
    leaves = manifest.item(PARAMS)
    check_same_tree(leaves, abstract_params(meta.model), directory / PARAMS)
    return StoredParams(directory, meta, leaves)


def _nbytes(leaf: Leaf) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
