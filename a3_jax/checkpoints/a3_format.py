"""The A3 checkpoint directory, alike for `a3 convert` and for each step of a training run.

    meta/a3.json   format version, model config, where it came from, step, stage, run config, versions
    tokenizer/     tokenizer.json and its companions; absent: token input only
    params/        the parameter tree (orbax)
    train/         optimiser state and counters (orbax); training only

Directories appear by a rename, so one with `meta/a3.json` in it is complete. Arrays are read straight
to where they will live: each process reads its own part.
"""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import json
import platform
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from a3_jax.checkpoints.directories import new_directory
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import abstract_params, param_shardings
from a3_jax.paths import absolute, as_path, read_json
from a3_jax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

FORMAT = "a3"
FORMAT_VERSION = 1
META_FILE = "a3.json"
_META, _TOKENIZER, _PARAMS, _TRAIN = "meta", "tokenizer", "params", "train"
_VERSIONED = ("a3_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def software_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a checkpoint holds."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself, `meta/a3.json`.

    Attributes:
      model: the config of the parameter tree.
      source: of a model that came from Hugging Face: its `config` (verbatim), `tensors` (name to
        dtype) and `files` (the other files, by name; see `hf_files`). None otherwise.
      step, stage: optimiser steps done and the stage's name; None outside of training.
      context: how given tokens were ranked in training, "flat" or "l2r"; None: not trained with any.
      run_config: the resolved run.
      versions: of the software that wrote it.
    """

    model: ModelConfig
    source: dict[str, Any] | None = None
    step: int | None = None
    stage: str | None = None
    context: str | None = None
    run_config: dict[str, Any] | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=software_versions)

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "model": self.model.to_dict()}


def is_a3(directory) -> bool:
    return (as_path(directory) / _META / META_FILE).exists()


def load_meta(directory) -> Meta:
    """What the checkpoint in a directory says of itself.

    Raises:
      InputError: it is none, is damaged, or was written by a newer format.
    """
    file = as_path(directory) / _META / META_FILE
    fields = read_json(file)
    version = fields.get("format_version")
    if fields.get("format") != FORMAT or type(version) is not int:
        raise InputError("not the description of an A3 checkpoint", file=file, field="format")
    if version > FORMAT_VERSION:
        raise InputError(
            f"written by a newer format: version {version}, this a3_jax reads up to {FORMAT_VERSION}",
            file=file, field="format_version",
        )  # fmt: skip
    for field, kinds in (
        ("model", dict),
        ("source", dict | None),
        ("run_config", dict | None),
        ("step", int | None),
    ):
        if not isinstance(fields.get(field), kinds):
            raise InputError(f"damaged: {type(fields.get(field)).__name__}", file=file, field=field)
    try:
        model = ModelConfig.from_dict(fields["model"])
    except InputError as error:
        raise InputError(error.message, file=file, field=error.field) from error
    known = {field.name for field in dataclasses.fields(Meta)} - {"model"}
    return Meta(model=model, **{name: value for name, value in fields.items() if name in known})


def load_checkpoint_tokenizer(directory) -> Tokenizer | None:
    """The tokenizer of an A3 checkpoint, None where it has none."""
    place = as_path(directory) / _TOKENIZER
    return load_tokenizer(place) if has_tokenizer(place) else None


def load_params(directory, mesh=None, dtype=None):
    """The parameter tree of an A3 checkpoint, on its devices.

    Args:
      directory: the checkpoint.
      mesh: where the parameters go, by the model's sharding rules; None: the first device.
      dtype: of the result; None: as stored.

    Raises:
      InputError: tree, shapes or files that don't fit the model config.
    """
    directory = absolute(directory)
    config = load_meta(directory).model
    wanted = abstract_params(config)
    if mesh is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), wanted)
    else:
        shardings = param_shardings(mesh, config)
    handler = ocp.StandardCheckpointHandler()

    def restore():
        stored = handler.metadata(directory / _PARAMS).tree
        _check_same_tree(stored, wanted, directory / _PARAMS)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
            stored,
            shardings,
        )
        return handler.restore(directory / _PARAMS, args=ocp.args.StandardRestore(target))

    return _damage_is_bad_input(directory / _PARAMS, restore)


def save_checkpoint(directory, params, meta: Meta, tokenizer: Tokenizer | None = None) -> None:
    """Writes a checkpoint that is no step of a run, whole or not at all.

    Args:
      directory: absent or empty.
      params: the parameter tree, NumPy or jax arrays of any dtype and sharding.

    Raises:
      InputError: `directory` is a file or has something in it.
    """
    handler = ocp.CompositeCheckpointHandler(handler_registry=_handlers())
    with new_directory(directory) as temporary, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(absolute(temporary), args=_items(params, meta, tokenizer))


def list_steps(checkpoints_dir) -> list[int]:
    """The complete steps in a run's `checkpoints` directory, ascending.

    Empty directories and those of writers that were interrupted don't count.
    """
    place = as_path(checkpoints_dir)
    if not place.is_dir():
        return []
    return sorted(int(path.name) for path in place.iterdir() if path.name.isdigit() and _is_complete(path))


def _is_complete(directory) -> bool:
    # In buckets, which have no rename, orbax writes in place and marks the end by a file.
    return is_a3(directory) and ocp.utils.is_checkpoint_finalized(directory)


def latest_step(checkpoints_dir) -> int | None:
    """The newest complete step, or None."""
    return max(list_steps(checkpoints_dir), default=None)


class StepWriter:
    """The checkpoints of a training run: `directory/STEP/`, written in the background, kept by a limit.

    Every process of the run makes the same calls. A context manager that waits at its end.
    """

    def __init__(self, directory, keep: int | None = None):
        """Opens (and makes) a run's `checkpoints` directory.

        Args:
          directory: what was left there by an interrupted writer is cleared away.
          keep: how many steps stay; None: all.
        """
        self.directory = absolute(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError("exists and is a file, checkpoints are to be written there", file=self.directory)
        if jax.process_index() == 0:
            _set_aside_incomplete(self.directory)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("a3_jax: incomplete checkpoints set aside")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=_handlers())

    def save(self, step: int, params, train_state, meta: Meta, tokenizer: Tokenizer | None = None) -> bool:
        """Begins to write a step; returns when the arrays may be reused, not when they are on disk.

        Args:
          step: newer than the steps that are there.
          params: the parameter tree.
          train_state: any tree of arrays and numbers: optimiser state, counters.
          meta: its `step` is set to `step`.

        Returns:
          False where that step is there already: nothing is written.

        Raises:
          Exception: whatever made the *previous* save fail.
        """
        self.wait()  # one save at a time, and its failure must not be lost
        if step in self._manager.all_steps():
            return False
        meta = dataclasses.replace(meta, step=step)
        args = _items(_portable(params), meta, tokenizer, _portable(train_state))
        return self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          Exception: whatever made the last save fail; that step does not exist then.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def latest_step(self) -> int | None:
        """The newest complete step, or None. A step that is still being written doesn't count."""
        return latest_step(self.directory)

    def restore(self, step: int, params, train_state):
        """The parameters and training state of a step.

        Args:
          step: one that exists.
          params, train_state: the trees that `save` was given, of arrays or `ShapeDtypeStruct`s;
            shapes, dtypes and shardings of the result are theirs.

        Returns:
          (params, train_state)

        Raises:
          InputError: the step is absent, or its tree or shapes are others.
        """
        place = self.directory / str(step)
        if not is_a3(place):
            raise InputError("no checkpoint", file=place)
        wanted = {_PARAMS: _without_numpy_scalars(params), _TRAIN: _without_numpy_scalars(train_state)}

        def restore():
            for item, tree in wanted.items():
                stored = ocp.StandardCheckpointHandler().metadata(place / item).tree
                _check_same_tree(stored, tree, place / item)
            args = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
            return self._manager.restore(step, args=ocp.args.Composite(**args))

        restored = _damage_is_bad_input(place, restore)
        return restored[_PARAMS], restored[_TRAIN]

    def close(self) -> None:
        """Waits, then ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _TextFiles(ocp.CheckpointHandler):
    """Orbax item: a few text files in a directory."""

    def save(self, directory, args: "_TextFilesSave"):
        if jax.process_index() == 0:
            for name, text in args.files.items():
                (directory / name).write_bytes(text.encode("utf-8"))

    def restore(self, directory, args=None):
        return {
            path.name: path.read_bytes().decode("utf-8") for path in directory.iterdir() if path.is_file()
        }


@dataclasses.dataclass
class _TextFilesSave(ocp.args.CheckpointArgs):
    files: dict[str, str]


@dataclasses.dataclass
class _TextFilesRestore(ocp.args.CheckpointArgs):
    pass


def _handlers():
    """Which orbax handler writes and reads which item."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in (_META, _TOKENIZER):
        text_files = _TextFiles()
        registry.add(item, _TextFilesSave, text_files)
        registry.add(item, _TextFilesRestore, text_files)
    for item in (_PARAMS, _TRAIN):
        arrays = ocp.StandardCheckpointHandler()
        registry.add(item, ocp.args.StandardSave, arrays)
        registry.add(item, ocp.args.StandardRestore, arrays)
    return registry


def _items(params, meta: Meta, tokenizer, train_state=None) -> ocp.args.Composite:
    description = json.dumps(meta.to_dict(), indent=2, ensure_ascii=False) + "\n"
    items: dict[str, ocp.args.CheckpointArgs] = {
        _META: _TextFilesSave({META_FILE: description}),
        _PARAMS: ocp.args.StandardSave(params),
    }
    if tokenizer is not None:
        items[_TOKENIZER] = _TextFilesSave(tokenizer.files())
    if train_state is not None:
        items[_TRAIN] = ocp.args.StandardSave(train_state)
    return ocp.args.Composite(**items)


def _portable(tree):
    """Scalars of one device as NumPy: orbax refuses them where there are several processes."""

    def convert(leaf):
        scalar = isinstance(leaf, jax.Array) and leaf.ndim == 0 and leaf.is_fully_addressable
        return np.asarray(leaf) if scalar else leaf

    return _without_numpy_scalars(jax.tree.map(convert, tree))


def _without_numpy_scalars(tree):
    """`np.int64(1)` as an array of rank 0, which orbax can read back."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)


def _set_aside_incomplete(directory) -> None:
    """Renames what has a step's name but is no checkpoint, which orbax would take for the latest step."""
    if not directory.is_dir():
        return
    for path in list(directory.iterdir()):
        if path.name.isdigit() and not _is_complete(path):
            aside = path.parent / f"{path.name}.incomplete"
            if aside.exists():
                aside.rmtree()
            path.rename(aside)


def _check_same_tree(stored, wanted, place) -> None:
    """The stored tree has the leaves and shapes of the wanted one; the first difference is named."""
    stored, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): _shape(leaf) for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(tree) for tree in (stored, wanted))
    )
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError("is missing here", file=place, field=name)
        if stored[name] != shape:
            raise InputError(f"shape {stored[name]}, expected {shape}", file=place, field=name)
    for name in stored:
        if name not in wanted:
            raise InputError("is unknown to the model or optimiser", file=place, field=name)


def _shape(leaf) -> tuple[int, ...]:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def _damage_is_bad_input(place, restore):
    """`restore()`; what orbax raises on damaged or contradicting files becomes one line with the place."""
    try:
        return restore()
    except InputError:
        raise
    except Exception as error:  # ValueError, KeyError, FileNotFoundError, ...: they share no type
        text = str(error).split("See full TensorStore")[0]
        reason = f"{type(error).__name__}: {' '.join(text.split())[:200]}"
    _silence_reads_in_flight()
    raise InputError(f"can't be restored: {reason}", file=place)


def _silence_reads_in_flight() -> None:
    """Reads of other arrays fail in orbax's own threads; each would print a traceback when collected."""
    report = sys.unraisablehook

    def report_others(unraisable):
        if not inspect.iscoroutine(unraisable.object):
            report(unraisable)

    sys.unraisablehook = report_others
