"""What orbax writes and reads in an A3 directory, item by item."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

META_FILE = "a3.json"
META, TOKENIZER = "meta", "tokenizer"
ITEMS = PARAMS, TRAIN = "params", "train"  # of arrays


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


def kvstore(directory) -> Any:
    """A directory as tensorstore names it: a bucket by its URL."""
    path = str(directory)
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}


def handlers():
    """Which orbax handler writes and reads which item."""
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
    """Writes what `save_items` tells orbax to write beside the arrays: `meta` and `tokenizer`."""
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
    """Scalars of one device as NumPy: orbax refuses them where there are several processes."""

    def convert(leaf):
        scalar = isinstance(leaf, jax.Array) and leaf.ndim == 0 and leaf.is_fully_addressable
        return np.asarray(leaf) if scalar else leaf

    return without_numpy_scalars(jax.tree.map(convert, tree))


def without_numpy_scalars(tree):
    """`np.int64(1)` as an array of rank 0, which orbax can read back."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf, tree)
