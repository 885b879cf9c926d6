"""Checkpoints of either format, opened."""

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
)
from a3_jax.checkpoints.chunks import FLOATS, read_tree
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.checkpoints.hf_format import HFSource, open_hf
from a3_jax.checkpoints.safetensors import has_tensors
from a3_jax.checkpoints.special_tokens import source_eos_ids, with_all_eos
from a3_jax.checks import check_seed
from a3_jax.errors import InputError, nearest
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import param_shardings
from a3_jax.paths import as_path, snapshot_hint
from a3_jax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

CHECKPOINTS = "checkpoints"  # in a run's directory


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model ready to use.

    Attributes:
      params: the parameter tree (`model.two_stream`).
      config: its model.
      tokenizer: None: token input only.
      meta: what the checkpoint says of itself.
      eos_ids: those that end a text, the tokenizer's own first; () where none is known.
    """

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer | None
    meta: Meta

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return source_eos_ids(self.meta.source) if self.tokenizer is None else self.tokenizer.eos_ids


def open_checkpoint(path, dtype=None, seed: int = 0, mesh=None) -> Checkpoint:
    """Opens an A3 checkpoint, a Hugging Face directory, or the newest checkpoint of a run.

    Args:
      path: the directory.
      dtype: of the parameters, a name or NumPy dtype; None: as stored.
      seed: draws the query vector of a Hugging Face model that has none, 0 to 2^32 - 1.
      mesh: where the parameters go, by the model's sharding rules; None: the first device.
    """
    check_seed(seed)
    directory, is_hf = find_checkpoint(path)
    dtype = parse_dtype(dtype)
    if not is_hf:
        meta = load_meta(directory)
        params = load_params(directory, mesh, dtype)
        return Checkpoint(params, meta.model, a3_tokenizer(directory, meta), meta)
    model = open_hf(directory)
    model.warn()
    meta = Meta(model.config, source=model.source())
    tokenizer = hf_tokenizer(directory, meta)
    shardings = None if mesh is None else param_shardings(mesh, model.config)

    def put(path, leaf):
        if shardings is None:
            return jnp.asarray(leaf)
        sharding: Any = shardings
        for key in path:
            sharding = sharding[key]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    params = read_tree(HFSource(model, dtype, seed), put)
    return Checkpoint(params, model.config, tokenizer, meta)


def check_has_orders(checkpoint: Checkpoint, path) -> None:
    """Refuses a published model of masked diffusion where any-order or left-to-right streams are wanted.

    One that was trained here may have all of them.
    """
    if checkpoint.config.mask_token is not None and checkpoint.meta.step is None:
        why = "a model of masked diffusion, which has no any-order and no left-to-right stream"
        raise InputError(f"{why}: `a3 eval --model=masked_diffusion` runs it", file=path)


def find_checkpoint(path) -> tuple[Any, bool]:
    """Finds the directory that a checkpoint argument means, and whether it is a Hugging Face one."""
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
        message = "no checkpoint: neither A3, nor Hugging Face, nor a run's directory"
        raise InputError(message + snapshot_hint(path), file=path)
    return path, True


def parse_dtype(dtype) -> np.dtype | None:
    """Returns a dtype that parameters may have, by name."""
    if dtype is None:
        return None
    names = [known.name for known in FLOATS]
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in names:
        raise InputError(
            f"must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}", field="dtype"
        )
    return jnp.dtype(name)


def hf_tokenizer(directory, meta: Meta) -> Tokenizer | None:
    """Reads the tokenizer of a Hugging Face directory; None if it has none."""
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    return with_all_eos(tokenizer, meta, directory, is_a3=False)


def a3_tokenizer(directory, meta: Meta) -> Tokenizer | None:
    """Reads the tokenizer of an A3 checkpoint, with every id that ends a text; None if it has none."""
    return with_all_eos(load_checkpoint_tokenizer(directory), meta, directory, is_a3=True)
