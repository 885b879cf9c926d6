"""Parameters as a Hugging Face directory, which transformers opens."""

import base64
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints import families
from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.families import QUERY_TENSOR, Tensor
from a3_jax.checkpoints.hf_config import CONFIG_FILE, RELEASE_ARCHITECTURE, config_from_hf
from a3_jax.checkpoints.hf_format import FLOATS, cast, is_kept
from a3_jax.checkpoints.safetensors_writer import MAX_SHARD_BYTES, TensorSpec, write_tensors
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig, RopeScaling
from a3_jax.paths import as_path, write_json
from a3_jax.tokenizer import Tokenizer


def write_hf(
    directory,
    params,
    meta: Meta,
    tokenizer: Tokenizer | None,
    dtype=None,
    max_shard_bytes=MAX_SHARD_BYTES,
    query_vector=True,
) -> None:
    """Fills a directory that transformers opens: safetensors, config, tokenizer, the source's other files.

    Args:
      directory: is made; the caller makes the whole of it atomic.
      params: the parameter tree.
      meta: with a `source`, its names, dtypes and architecture are kept; else Llama's in float32.
      dtype: of all tensors instead.
      query_vector: False leaves it out: the plain left-to-right model.
    """
    directory = as_path(directory)
    directory.mkdir(parents=True)
    source = meta.source or {"config": config_to_hf(meta.model), "tensors": {}, "files": {}}
    config, table = meta.model, families.tensor_table(meta.model)
    written = families.table_names(source["tensors"], config)  # name in the table -> name that it had
    dtypes = {name: source["tensors"][in_file] for name, in_file in written.items()}
    names = [name for name in table if query_vector or name != QUERY_TENSOR]
    tied = families.tied_head(config)
    names += [tied] if tied in written else []
    # A query vector that the source lacked is written as the embedding.
    new = dtypes.get(families.embedding(config), "float32")
    in_table = {written.get(name, name): name for name in names}
    specs = {
        in_file: TensorSpec(
            np.dtype(dtype or jnp.dtype(dtypes.get(name, new))), families.shape_of(name, config)
        )
        for in_file, name in in_table.items()
    }

    def read(in_file):
        name = in_table[in_file]
        parts = table[families.embedding(config) if name == tied else name]
        stored = families.join(parts, [_leaf_of(part, params) for part in parts])
        return cast(stored, specs[in_file].dtype, in_file)

    write_tensors(directory, specs, read, max_shard_bytes)
    write_json(directory / CONFIG_FILE, _config_to_write(source["config"], dtype))
    _write_kept_files(directory, source["files"])
    if tokenizer is not None:
        _write_kept_files(directory, tokenizer.files())


def check_source(source: dict[str, Any], file) -> None:
    """What a checkpoint, perhaps one from outside, keeps of a source is what `HFModel.source` gives.

    Raises:
      InputError: naming the part that is not.
    """
    for part in ("config", "tensors", "files"):
        if not isinstance(source.get(part), dict):
            raise InputError("expected an object", file=file, field=f"source.{part}")
    dtypes = [dtype.name for dtype in FLOATS]
    for name, dtype in source["tensors"].items():
        if dtype not in dtypes:
            why = f"{str(dtype)[:60]!r} is no parameter dtype; known: {', '.join(dtypes)}"
            raise InputError(why, file=file, field=f"source.tensors: {name[:200]}")
    for name, content in source["files"].items():
        if not is_kept(name):  # it might be code, or stand in for the weights
            raise InputError(f"{name[:60]!r} is no name for a file to keep", file=file, field="source.files")
        try:
            _bytes_of(content)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError("neither text nor base64", file=file, field=f"source.files: {name}") from error


def with_dtype(meta: Meta, dtype) -> Meta:
    """What a checkpoint says of itself once all its parameters have another dtype."""
    if meta.source is None:
        return meta
    tensors = dict.fromkeys(meta.source["tensors"], np.dtype(dtype).name)
    config = _config_to_write(meta.source["config"], dtype)
    return dataclasses.replace(meta, source={**meta.source, "tensors": tensors, "config": config})


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """A `config.json` for a model that came from no Hugging Face directory: Llama's.

    Rotary fields are those of transformers 4, which 5 reads too.

    Raises:
      InputError: the model has switches that Llama has not.
    """
    fields = {
        "architectures": [RELEASE_ARCHITECTURE if config.residual == "release" else "LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": dtype,
    }
    said = dataclasses.replace(config_from_hf(fields), query_init_scale=config.query_init_scale)
    for name, value in config.to_dict().items():
        if said.to_dict()[name] != value:
            raise InputError(
                f"{value!r}: a config.json is made for Llama's kind of model alone, unless one came along",
                field=f"model.{name}",
            )
    return fields


def _leaf_of(tensor: Tensor, params) -> np.ndarray:
    leaf = params
    for key in tensor.leaf:
        leaf = leaf[key]
    return np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])


def _config_to_write(hf_config, dtype) -> dict[str, Any]:
    if dtype is None:
        return hf_config
    field = "dtype" if "dtype" in hf_config else "torch_dtype"  # transformers 5, 4
    return {**hf_config, field: np.dtype(dtype).name}


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    low, high, more = "low_freq_factor", "high_freq_factor", {}
    if scaling.kind == "yarn":
        low, high = "beta_slow", "beta_fast"
        more = {"attention_factor": scaling.attention_factor, "truncate": scaling.truncate}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        low: scaling.low_freq_factor,
        high: scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
        **more,
    }


def _write_kept_files(directory, files) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(_bytes_of(content))


def _bytes_of(content) -> bytes:
    return content.encode("utf-8") if isinstance(content, str) else base64.b64decode(content["base64"])
