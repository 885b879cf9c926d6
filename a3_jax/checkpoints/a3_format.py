"""The A3 checkpoint directory, alike for `a3 convert` and for each step of a training run.

    meta/a3.json   format version, model config, where it came from, step, stage, run config, versions
    tokenizer/     tokenizer.json and its companions; absent: token input only
    params/        the parameter tree (orbax)
    train/         optimiser state and counters (orbax); training only
    manifest.json  written last: sizes and checksums of the files, fingerprints of the arrays

A directory without a manifest is not a checkpoint. Arrays are read straight to where they will live, each
process its own part, and compared with their fingerprints there.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from a3_jax.checkpoints.directories import new_directory
from a3_jax.checkpoints.fingerprint import hexadecimal, start_fingerprints, tree_name, tree_names
from a3_jax.checkpoints.manifest import (
    FORMAT_VERSION,
    ITEMS,
    MANIFEST_FILE,
    PARAMS,
    TRAIN,
    Leaf,
    Manifest,
    list_files,
    raise_damage,
    read_checksums,
    read_manifest,
    step_of,
    write_manifest,
)
from a3_jax.checkpoints.stored_arrays import (
    check_same_tree,
    restore_items,
    shape_and_dtype,
)
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import abstract_params, param_shardings
from a3_jax.paths import absolute, as_path, read_json
from a3_jax.runtime.versions import software_versions
from a3_jax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

META_FILE = "a3.json"
META, TOKENIZER = "meta", "tokenizer"
FORMAT = "a3"


@dataclasses.dataclass(frozen=True)
class Meta:
    """A checkpoint's description of itself, `meta/a3.json`.

    Attributes:
      model: the config of the parameter tree.
      source: of a model that came from Hugging Face: its `config` (verbatim), `tensors` (name to
        dtype) and `files` (the other files, by name; see `hf_files`). None otherwise.
      step, stage: optimiser steps done and the stage's name; None outside of training.
      context: how given tokens were ranked in training, "flat" or "l2r"; None: it was trained without any.
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
    """Returns whether a directory is an A3 checkpoint, even a damaged one."""
    return (as_path(directory) / META / META_FILE).exists()


def load_meta(directory) -> Meta:
    """Reads the description of the checkpoint in a directory."""
    file = as_path(directory) / META / META_FILE
    if is_a3(directory) or (as_path(directory) / MANIFEST_FILE).exists():
        raise_damage(directory, read_manifest(directory), deep=True, only=f"{META}/")
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
    """Reads the tokenizer of an A3 checkpoint; None if it has none."""
    folder, manifest = as_path(directory) / TOKENIZER, read_manifest(directory)
    raise_damage(directory, manifest, deep=True, only=f"{TOKENIZER}/")
    written = any(name.startswith(f"{TOKENIZER}/") for name in manifest.files)
    return load_tokenizer(folder) if written and has_tokenizer(folder) else None


def load_params(directory, mesh=None, dtype=None):
    """Reads the parameter tree of an A3 checkpoint onto its devices.

    Args:
      directory: the checkpoint.
      mesh: where the parameters go, by the model's sharding rules; None: the first device.
      dtype: of the result; None: as stored.

    Raises:
      DamagedCheckpoint: a file or leaf that is not what was written.
      InputError: tree, shapes or files that don't fit the model config.
    """
    directory = absolute(directory)
    config = load_meta(directory).model
    wanted = abstract_params(config)
    if mesh is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), wanted)
    else:
        shardings = param_shardings(mesh, config)

    def targets(manifest):
        stored = manifest.item(PARAMS)
        check_same_tree(stored, wanted, directory / PARAMS)
        dtypes = {name: dtype or leaf.dtype for name, leaf in stored.items()}
        target = jax.tree_util.tree_map_with_path(
            lambda path, leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, dtypes[tree_name(path)], sharding=sharding
            ),
            wanted,
            shardings,
        )
        return {PARAMS: target}

    alone = all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings))
    return restore_items(directory, targets, alone)[PARAMS]


def save_checkpoint(directory, params, meta: Meta, tokenizer: Tokenizer | None = None) -> None:
    """Writes a checkpoint that is no step of a run, whole or not at all.

    Args:
      directory: absent or empty.
      params: the parameter tree, NumPy or jax arrays of any dtype and sharding.
    """
    handler = ocp.CompositeCheckpointHandler(handler_registry=handlers())
    with new_directory(directory) as temporary, ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(absolute(temporary), args=save_items(params, meta, tokenizer))
        leaves = named_leaves(params)
        described = {name: shape_and_dtype(leaf) for name, leaf in leaves.items()}
        files = read_checksums(temporary, list_files(temporary))
        write_manifest(temporary, make_manifest(files, described, start_fingerprints(leaves)))


def finish_checkpoint(directory, manifest: Manifest, meta, tokenizer) -> None:
    """Makes a directory that holds `params` a checkpoint; one process does."""
    write_description(directory, meta, tokenizer)
    files = dict(manifest.files)
    files |= read_checksums(directory, set(list_files(directory)) - files.keys())
    write_manifest(directory, dataclasses.replace(manifest, files=files))


def named_leaves(params, train_state=None) -> dict[str, Any]:
    """Returns the leaves by their names in a manifest."""
    items = {PARAMS: params} if train_state is None else {PARAMS: params, TRAIN: train_state}
    return {f"{item}/{name}": leaf for item, tree in items.items() for name, leaf in tree_names(tree).items()}


def make_manifest(files, described, sums) -> Manifest:
    return Manifest(
        files,
        {
            name: Leaf(*described[name], fingerprint=fingerprint)
            for name, fingerprint in hexadecimal(sums).items()
        },
    )


def list_steps(checkpoints_dir) -> list[int]:
    """Returns the finished steps in a run's `checkpoints` directory, ascending.

    Empty directories, those of interrupted writers, and those with a damaged manifest don't count.
    """
    return [
        step
        for step in step_directories(checkpoints_dir)
        if is_finished_step(as_path(checkpoints_dir) / str(step))
    ]


def step_directories(checkpoints_dir) -> list[int]:
    """Returns the numbers of all directories that are named like a step, ascending."""
    folder = as_path(checkpoints_dir)
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(step for path in paths if (step := step_of(path)) is not None and path.is_dir())


def is_finished_step(directory) -> bool:
    try:
        read_manifest(directory)
    except InputError:
        return False
    return is_a3(directory)


def latest_step(checkpoints_dir) -> int | None:
    """Returns the newest finished step, or None."""
    return max(list_steps(checkpoints_dir), default=None)


def with_manifest(directory) -> list[int]:
    """Returns the steps that were finished once, even if they are damaged now; the newest first."""
    steps = step_directories(directory)
    return [step for step in reversed(steps) if (as_path(directory) / str(step) / MANIFEST_FILE).exists()]


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


def handlers():
    """Returns orbax's handlers of all items."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in (META, TOKENIZER):
        text_files = _TextFiles()
        registry.add(item, _TextFilesSave, text_files)
        registry.add(item, _TextFilesRestore, text_files)
    for item in ITEMS:
        arrays = ocp.StandardCheckpointHandler()
        registry.add(item, ocp.args.StandardSave, arrays)
        registry.add(item, ocp.args.StandardRestore, arrays)
    return registry


def save_items(params, meta, tokenizer, train_state=None) -> ocp.args.Composite:
    contents: dict[str, ocp.args.CheckpointArgs] = {**_texts(meta, tokenizer)}
    contents[PARAMS] = ocp.args.StandardSave(params)
    if train_state is not None:
        contents[TRAIN] = ocp.args.StandardSave(train_state)
    return ocp.args.Composite(**contents)


def write_description(directory, meta, tokenizer) -> None:
    """Writes what orbax writes of `save_items` beside the arrays: `meta` and `tokenizer`."""
    for item, texts in _texts(meta, tokenizer).items():
        (directory / item).mkdir(parents=True, exist_ok=True)
        _TextFiles().save(directory / item, texts)


def _texts(meta, tokenizer) -> "dict[str, _TextFilesSave]":
    description = json.dumps(meta.to_dict(), indent=2, ensure_ascii=False) + "\n"
    texts = {META: _TextFilesSave({META_FILE: description})}
    if tokenizer is not None:
        texts[TOKENIZER] = _TextFilesSave(tokenizer.files())
    return texts


def portable(tree):
    """Turns scalars on one device into NumPy arrays: with several processes orbax refuses them."""

    def convert(leaf):
        scalar = isinstance(leaf, jax.Array) and leaf.ndim == 0 and leaf.is_fully_addressable
        return np.asarray(leaf) if scalar else leaf

    return without_numpy_scalars(jax.tree.map(convert, tree))


def without_numpy_scalars(tree):
    """Turns NumPy scalars, such as `np.int64(1)`, into arrays of rank 0, which can be read back."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)
