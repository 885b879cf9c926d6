"""Checkpoints of either format, converted into each other."""

import jax
import numpy as np

from a3_jax.checkpoints.a3_format import (
    Meta,
    load_checkpoint_tokenizer,
    load_meta,
    load_params,
    save_checkpoint,
)
from a3_jax.checkpoints.directories import check_free, new_directory
from a3_jax.checkpoints.hf_export import with_dtype, write_hf
from a3_jax.checkpoints.hf_format import cast, open_hf, read_params
from a3_jax.checkpoints.opening import Checkpoint, find_checkpoint, hf_tokenizer, parse_dtype
from a3_jax.checkpoints.safetensors_writer import MAX_SHARD_BYTES
from a3_jax.errors import InputError, check_seed, nearest

FORMATS = ("a3", "hf")


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


def _read_on_host(src, dtype, seed) -> Checkpoint:
    """As `open_checkpoint`, with NumPy arrays of the wanted dtype: nothing of it needs an accelerator."""
    directory, is_hf = find_checkpoint(src)
    if is_hf:
        model = open_hf(directory)
        meta = Meta(model.config, source=model.source())
        return Checkpoint(read_params(model, dtype, seed), model.config, hf_tokenizer(directory), meta)
    meta = load_meta(directory)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: cast(np.asarray(leaf), dtype, jax.tree_util.keystr(path), directory),
        load_params(directory),
    )
    return Checkpoint(params, meta.model, load_checkpoint_tokenizer(directory), meta)
