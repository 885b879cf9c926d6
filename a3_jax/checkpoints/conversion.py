"""Checkpoints of either format, opened, and converted into each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints.a3_format import (
    Meta,
    is_a3,
    latest_step,
    load_checkpoint_tokenizer,
    load_meta,
    load_params,
    save_checkpoint,
)
from a3_jax.checkpoints.directories import check_free, new_directory
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.checkpoints.hf_format import FLOATS, cast, open_hf, read_params, with_dtype, write_hf
from a3_jax.checkpoints.safetensors_io import MAX_SHARD_BYTES, has_tensors
from a3_jax.errors import InputError, check_seed, nearest
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import param_shardings
from a3_jax.paths import as_path
from a3_jax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

FORMATS = ("a3", "hf")
CHECKPOINTS = "checkpoints"  # in a run's directory


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model ready to use.

    Attributes:
      params: the parameter tree (`model.two_stream`).
      config: its model.
      tokenizer: None: token input only.
      meta: what the checkpoint says of itself.
    """

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer | None
    meta: Meta


def open_checkpoint(path, dtype=None, seed: int = 0, mesh=None) -> Checkpoint:
    """Opens an A3 checkpoint, a Hugging Face directory, or the newest checkpoint of a run.

    Args:
      path: the directory.
      dtype: of the parameters, a name or NumPy dtype; None: as stored.
      seed: draws the query vector of a Hugging Face model that has none, 0 to 2^32 - 1.
      mesh: where the parameters go, by the model's sharding rules; None: the first device.

    Raises:
      InputError: no checkpoint, or one that is damaged or not supported.
    """
    check_seed(seed)
    directory, is_hf = find_checkpoint(path)
    dtype = parse_dtype(dtype)
    if not is_hf:
        meta = load_meta(directory)
        params = load_params(directory, mesh, dtype)
        return Checkpoint(params, meta.model, load_checkpoint_tokenizer(directory), meta)
    model = open_hf(directory)
    shardings = None if mesh is None else param_shardings(mesh, model.config)
    params = read_params(model, dtype, seed, lambda path, leaf: _place(path, leaf, shardings))
    return Checkpoint(
        params, model.config, _hf_tokenizer(directory), Meta(model.config, source=model.source())
    )


def convert(
    src,
    dst,
    to: str = "a3",
    dtype=None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    query_vector: bool = True,
) -> None:
    """Writes a checkpoint in the other format, or the same one in another dtype.

    A Hugging Face model without query vector gets one drawn from `seed`. The way back keeps the
    source's tensor names, dtypes, architecture and other files, and adds the vector.

    Args:
      src: anything that `open_checkpoint` opens.
      dst: a directory that is absent or empty; it appears whole or not at all.
      to: "a3" or "hf".
      dtype: "float32", "bfloat16" or "float16", kept on the way back; None: the source's.
      max_shard_bytes: of the safetensors files.
      query_vector: False writes a Hugging Face directory without it: the plain left-to-right model.

    Raises:
      InputError: a source that can't be converted, or a `dst` that is in use.
    """
    if to not in FORMATS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, got {to!r}{nearest(to, FORMATS)}", field="to")
    check_seed(seed)
    dtype = parse_dtype(dtype)
    check_free(dst)
    source = _read_on_host(src, dtype, seed)
    if to == "a3":
        meta = source.meta if dtype is None else with_dtype(source.meta, dtype)
        save_checkpoint(dst, source.params, meta, source.tokenizer)
        return
    with new_directory(dst) as temporary:
        write_hf(
            temporary, source.params, source.meta, source.tokenizer, dtype, max_shard_bytes, query_vector
        )


def find_checkpoint(path) -> tuple[Any, bool]:
    """The directory that a checkpoint argument means, and whether it is a Hugging Face one.

    Raises:
      InputError: it means none.
    """
    path = as_path(path)
    if not path.exists():
        raise InputError("no such checkpoint directory", file=path)
    if not path.is_dir():
        raise InputError("is a file, expected a checkpoint directory", file=path)
    if is_a3(path):
        return path, False
    for steps in (path / CHECKPOINTS, path):  # before Hugging Face: a run has a config.json too
        step = latest_step(steps)
        if step is not None:
            return steps / str(step), False
    if has_tensors(path) and not (path / CONFIG_FILE).exists():
        raise InputError(f"there are tensors here, but no {CONFIG_FILE}", file=path)
    if (path / CHECKPOINTS).is_dir():
        raise InputError("a run that has no finished checkpoint yet", file=path)
    if not (path / CONFIG_FILE).exists():
        raise InputError("no checkpoint: neither A3, nor Hugging Face, nor a run's directory", file=path)
    return path, True


def parse_dtype(dtype) -> np.dtype | None:
    """A dtype that parameters may have, by name.

    Raises:
      InputError: any other.
    """
    if dtype is None:
        return None
    names = [known.name for known in FLOATS]
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in names:
        raise InputError(
            f"must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}", field="dtype"
        )
    return jnp.dtype(name)


def _read_on_host(src, dtype, seed) -> Checkpoint:
    """As `open_checkpoint`, with NumPy arrays of the wanted dtype: nothing of it needs an accelerator."""
    directory, is_hf = find_checkpoint(src)
    if is_hf:
        model = open_hf(directory)
        meta = Meta(model.config, source=model.source())
        return Checkpoint(read_params(model, dtype, seed), model.config, _hf_tokenizer(directory), meta)
    meta = load_meta(directory)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: cast(np.asarray(leaf), dtype, jax.tree_util.keystr(path), directory),
        load_params(directory),
    )
    return Checkpoint(params, meta.model, load_checkpoint_tokenizer(directory), meta)


def _place(path, leaf: np.ndarray, shardings):
    if shardings is None:
        return jnp.asarray(leaf)
    for key in path:
        shardings = shardings[key]
    return jax.make_array_from_callback(leaf.shape, shardings, lambda index: leaf[index])


def _hf_tokenizer(directory) -> Tokenizer | None:
    return load_tokenizer(directory) if has_tokenizer(directory) else None
