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
from a3_jax.checkpoints.check import Checked, check_conversion
from a3_jax.checkpoints.directories import check_free, new_directory
from a3_jax.checkpoints.families import tensor_table
from a3_jax.checkpoints.fingerprint import tree_name
from a3_jax.checkpoints.hf_export import check_source, with_dtype, write_hf
from a3_jax.checkpoints.hf_format import cast, open_hf, read_params
from a3_jax.checkpoints.opening import Checkpoint, find_checkpoint, hf_tokenizer, parse_dtype
from a3_jax.checkpoints.orbax_items import META, META_FILE
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
    check: bool = False,
    allow_nonfinite: bool = False,
) -> Checked | None:
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
      check: compare what was written with `transformers`, where it is installed, before `dst` appears.
      allow_nonfinite: convert parameters that are NaN or infinite too.

    Returns:
      What the check found; None without.

    Raises:
      InputError: a source that can't be converted, or a `dst` that is in use.
      RunError: the check failed; there is no `dst`.
    """
    if to not in FORMATS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, got {to!r}{nearest(to, FORMATS)}", field="to")
    check_seed(seed)
    dtype = parse_dtype(dtype)
    check_free(dst)
    directory, is_hf = find_checkpoint(src)
    if is_hf:
        source = _read_hf(directory, dtype, seed, allow_nonfinite)
    else:
        source = _read_a3(directory, dtype, allow_nonfinite)
    with new_directory(dst) as temporary:
        if to == "a3":
            meta = source.meta if dtype is None else with_dtype(source.meta, dtype)
            save_checkpoint(temporary, source.params, meta, source.tokenizer)
        else:
            write_hf(
                temporary, source.params, source.meta, source.tokenizer, dtype, max_shard_bytes, query_vector
            )
        if not check:
            return None
        if to == "a3":
            hf_side, params = directory if is_hf else None, load_params(temporary)
        else:
            hf_side, params = temporary, source.params
        return check_conversion(params, source.config, hf_side, dtype, place=dst)


def _read_hf(directory, dtype, seed, allow_nonfinite) -> Checkpoint:
    """As `open_checkpoint`, with NumPy arrays of the wanted dtype: nothing of it needs an accelerator."""
    model = open_hf(directory)
    stored = {
        (part.leaf, part.layer): model.stored[name]
        for name, parts in tensor_table(model.config).items()
        for part in parts
        if name in model.stored  # a query vector may not be
    }

    def check(path, leaf):
        for layer in range(len(leaf)) if path[0] == "layers" else (None,):
            tensor = None if allow_nonfinite else stored.get((path, layer))
            if tensor is not None:
                _check_finite(leaf if layer is None else leaf[layer], tensor.name, tensor.file)
        return leaf

    params = read_params(model, dtype, seed, check)
    return Checkpoint(
        params, model.config, hf_tokenizer(directory), Meta(model.config, source=model.source())
    )


def _read_a3(directory, dtype, allow_nonfinite) -> Checkpoint:
    """The same of an A3 checkpoint."""
    meta = load_meta(directory)
    if meta.source is not None:
        check_source(meta.source, directory / META / META_FILE)

    def read(path, leaf):
        array, name = np.asarray(leaf), f"params/{tree_name(path)}"
        if not allow_nonfinite:
            _check_finite(array, name, directory)
        return cast(array, dtype, name, directory)

    params = jax.tree_util.tree_map_with_path(read, load_params(directory))
    return Checkpoint(params, meta.model, load_checkpoint_tokenizer(directory), meta)


def _check_finite(array, name, file) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        count = finite.size - np.count_nonzero(finite)
        raise InputError(
            f"{count} of its {finite.size} values are NaN or infinite; --allow_nonfinite converts them too",
            file=file,
            field=name,
        )
