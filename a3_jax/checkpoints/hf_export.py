"""Parameters as a Hugging Face directory, which transformers opens.

Written leaf by leaf, in chunks: a stacked leaf becomes one tensor per layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints import families
from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.chunks import cast, chunks_of, cut, index_of
from a3_jax.checkpoints.families import QUERY_TENSOR, LeafPart
from a3_jax.checkpoints.hf_config import CONFIG_FILE, RELEASE_ARCHITECTURE, config_from_hf
from a3_jax.checkpoints.hf_format import CARD_FILE, SOURCE_CARD_FILE, kept_bytes
from a3_jax.checkpoints.model_card import Facts, model_card
from a3_jax.checkpoints.safetensors import MAX_SHARD_BYTES, TensorSpec, write_tensors
from a3_jax.checkpoints.special_tokens import generation_config, with_special_ids
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig, RopeScaling
from a3_jax.paths import as_path, write_json, write_text
from a3_jax.tokenizer import GENERATION_FILE, Tokenizer

Read = Callable[[tuple[str, ...], tuple], np.ndarray]  # (path of a leaf, NumPy index) -> that part


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """The contents of a Hugging Face directory to be written.

    Attributes:
      config: of `config.json`.
      tensors: dtype and shape by name in the file, those of one leaf one after the other.
      parts: what each consists of in the parameter tree.
    """

    config: dict[str, Any]
    tensors: Mapping[str, TensorSpec]
    parts: Mapping[str, tuple[LeafPart, ...]]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())


def plan_hf_export(meta: Meta, dtype=None, query_vector: bool = True) -> ExportPlan:
    """Plans the directory that the model came from: its names, dtypes, architecture; else Llama's in float32.

    Args:
      dtype: of all tensors instead.
      query_vector: False leaves it out: the plain left-to-right model.
    """
    if meta.source is None:
        return _plan_export(meta.model, config_to_hf(meta.model), {}, dtype, query_vector)
    hf_config = meta.source["config"]
    if meta.model.mask_token != hf_config.get("mask_token_id"):  # it was trained to fill masks here
        hf_config = {**hf_config, **_mask_fields(meta.model)}
    return _plan_export(meta.model, hf_config, meta.source["tensors"], dtype, query_vector)


def plan_release_export(meta: Meta, dtype=None) -> ExportPlan:
    """Plans a directory of the authors' PyTorch class: all of its state dict, a tied head too.

    Its block adds the MLP to the normed state, where the paper's and the pretrained model's adds it to the
    state before the norm. The same weights are two models under the two blocks, so only a model that was
    trained with `residual="release"` can go there. Fields of the source's `config.json` that don't describe
    the model's shape go along, such as ids of special tokens.

    Args:
      dtype: of all tensors; None: the source's, float32 where there is none.
    """
    model, source = meta.model, meta.source or {"config": {}, "tensors": {}}
    if model.residual != "release":
        raise InputError(
            f"{model.residual!r}: {RELEASE_ARCHITECTURE} adds the MLP to the normed state, so there these "
            "weights are another model; only those trained with residual='release' can be written for it",
            field="model.residual",
        )
    fields = config_to_hf(model)
    if model.num_heads * model.head_size != model.d_model:
        raise InputError(
            f"{model.head_size}: {RELEASE_ARCHITECTURE} has heads of d_model / num_heads = "
            f"{model.d_model / model.num_heads:g}", field="model.head_size",
        )  # fmt: skip
    had = families.table_names(source["tensors"], model)
    dtypes = {name: source["tensors"][in_file] for name, in_file in had.items()}
    usual = dtypes.get(families.embedding(model), "float32")
    names = [*families.tensor_table(model), families.tied_head(model)]
    tensors = {name: dtypes.get(name, usual) for name in names if name is not None}
    others = {  # transformers 5 has two fields by other names
        name: value for name, value in source["config"].items() if name not in ("dtype", "rope_parameters")
    }  # fmt: skip
    return _plan_export(model, {**others, **fields, "torch_dtype": usual}, tensors, dtype)


def _plan_export(
    model: ModelConfig, hf_config, tensors: Mapping[str, str], dtype, query_vector=True
) -> ExportPlan:
    """Plans a directory with the names and dtypes of `tensors` where they are known.

    Args:
      tensors: name in a file -> dtype. A tied head that is among them is written too.
      dtype: of all tensors instead; None: as said, the query vector as the embedding, float32 otherwise.
    """
    table = families.tensor_table(model)
    in_file = families.table_names(tensors, model)  # name in the table -> name that it had
    dtypes = {name: tensors[had] for name, had in in_file.items()}
    tied, embedding = families.tied_head(model), families.embedding(model)
    parts = {name: table[name] for name in table if query_vector or name != QUERY_TENSOR}
    if tied in in_file:
        parts[tied] = table[embedding]
    leaves: dict[tuple[str, ...], int] = {}
    for of_tensor in parts.values():
        leaves.setdefault(of_tensor[0].leaf, len(leaves))
    new = dtypes.get(embedding, "float32")
    specs, by_file = {}, {}
    for name in sorted(parts, key=lambda name: leaves[parts[name][0].leaf]):
        kind = np.dtype(dtype or jnp.dtype(dtypes.get(name, new)))
        specs[in_file.get(name, name)] = TensorSpec(kind, parts[name][0].shape)
        by_file[in_file.get(name, name)] = parts[name]
    return ExportPlan(_config_to_write(hf_config, dtype), specs, by_file)


def write_hf(
    directory,
    read: Read,
    plan: ExportPlan,
    meta: Meta,
    tokenizer: Tokenizer | None,
    max_shard_bytes=MAX_SHARD_BYTES,
    on_tensor: Callable[[str, int], None] = lambda name, nbytes: None,
    facts: Facts | None = None,
) -> None:
    """Fills a directory: safetensors, config, tokenizer, the source's other files, a model card.

    The source's own card is written beside ours, as `README.source.md`. Ids of BOS and EOS that config and
    `generation_config.json` lack are added: see `special_tokens`.

    Args:
      directory: is made; the caller makes the whole of it atomic.
      read: returns a part of a leaf; `TensorSource.read_leaf` or `tree_reader`.
      plan: of `plan_hf_export` or `plan_release_export`.
      on_tensor: called with name and bytes of each tensor that was written.
      facts: for the card, what is known beside `meta`.
    """
    directory = as_path(directory)
    directory.mkdir(parents=True)
    write_tensors(
        directory, plan.tensors, lambda name: _read_chunks(name, plan, read), max_shard_bytes, on_tensor
    )
    config = with_special_ids(plan.config, meta, tokenizer)
    write_json(directory / CONFIG_FILE, config)
    files = {} if meta.source is None else dict(meta.source["files"])
    source_card = files.pop(CARD_FILE, None)
    if source_card is not None:
        files[SOURCE_CARD_FILE] = source_card
    if tokenizer is not None:
        files |= tokenizer.files()
    files[GENERATION_FILE] = generation_config(config, meta, tokenizer)
    _write_kept_files(directory, {name: text for name, text in files.items() if text is not None})
    write_text(directory / CARD_FILE, model_card(meta, config, plan.tensors, tokenizer, facts))


def tree_reader(params) -> Read:
    """Returns a reader for `write_hf` of a parameter tree in memory."""

    def read(path, index=()):
        return np.asarray(functools.reduce(lambda tree, key: tree[key], path, params)[index])

    return read


def _join(parts: tuple[LeafPart, ...], leaves) -> np.ndarray:
    """Returns the stored tensor that consists of these leaves: the inverse of `LeafPart.to_leaf`."""
    arrays = [leaf.transpose(np.argsort(part.order)) for part, leaf in zip(parts, leaves, strict=True)]
    first = parts[0]
    return (arrays[0] if first.part is None else np.stack(arrays, axis=first.part[0])).reshape(first.shape)


def _read_chunks(name: str, plan: ExportPlan, read: Read) -> Iterator[np.ndarray]:
    """Reads a tensor, cut along the first of its axes."""
    parts, spec = plan.parts[name], plan.tensors[name]
    for chunk in chunks_of(name, parts[0], spec.nbytes):
        leaves = [read(part.leaf, index_of(part, chunk)) for part in parts]
        stored = _join(tuple(cut(part, chunk) for part in parts), leaves)
        yield cast(stored, spec.dtype, name)


def with_dtype(meta: Meta, dtype) -> Meta:
    """Returns a checkpoint's description once all its parameters have another dtype."""
    if meta.source is None:
        return meta
    tensors = dict.fromkeys(meta.source["tensors"], np.dtype(dtype).name)
    config = _config_to_write(meta.source["config"], dtype)
    return dataclasses.replace(meta, source={**meta.source, "tensors": tensors, "config": config})


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Returns Llama's `config.json` for a model that came from no Hugging Face directory.

    Rotary fields are those of transformers 4, which 5 reads too.
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
        **_mask_fields(config),
    }
    said = dataclasses.replace(config_from_hf(fields), query_init_scale=config.query_init_scale)
    for name, value in config.to_dict().items():
        if said.to_dict()[name] != value:
            raise InputError(
                f"{value!r}: a config.json is made for Llama's kind of model alone, unless one came along",
                field=f"model.{name}",
            )
    return fields


def _mask_fields(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a `config.json` that mark a model of masked diffusion; none if it isn't one."""
    if model.mask_token is None:
        return {}
    return {"mask_token_id": model.mask_token, "logit_shift": model.logit_shift}


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
        (directory / name).write_bytes(kept_bytes(content))
