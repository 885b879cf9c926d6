"""`config.json` of Hugging Face models to `ModelConfig` and back."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from a3_jax.errors import InputError, nearest
from a3_jax.model.config import ModelConfig, RopeScaling

CONFIG_FILE = "config.json"
RELEASE_ARCHITECTURE = "LlamaTwoStreamForCausalLM"
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the `architectures` field of a config selects: a tensor table and the residual."""

    family: str
    residual: str


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", "standard"),
    RELEASE_ARCHITECTURE: Architecture("llama", "release"),
}

_COUNTS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_size": "intermediate_size",
}
_REFUSED = types.MappingProxyType({
    # field: the value that makes it absent, and what any other value would mean
    "attention_bias": (False, "biases in attention"),
    "mlp_bias": (False, "biases in the mlp"),
    "quantization_config": (None, "quantised weights"),
    "partial_rotary_factor": (1.0, "partly rotated heads"),
})  # fmt: skip


def config_from_hf(config: Mapping[str, Any], file=None) -> ModelConfig:
    """The model that a `config.json` describes, as transformers 4 and 5 write it.

    Args:
      config: the JSON object. Absent fields have the defaults of transformers' LlamaConfig.
      file: names it in errors.

    Raises:
      InputError: an unknown architecture, a feature that can't be kept exactly, or a field that is
        missing or makes no model.
    """
    architecture = _architecture(config, file)
    for field, (plain, meaning) in _REFUSED.items():
        value = config.get(field)
        if value is not None and value != plain:
            raise InputError(f"{meaning} are not supported, got {value!r}"[:200], file=file, field=field)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(
            f"only 'silu' is supported, got {config['hidden_act']!r}", file=file, field="hidden_act"
        )
    sizes = {ours: _count(config, theirs, file) for ours, theirs in _COUNTS.items()}
    theta, scaling = _rope(config, file)
    try:
        return ModelConfig(
            **sizes,
            family=architecture.family,
            residual=architecture.residual,
            num_kv_heads=_count(config, "num_key_value_heads", file, default=sizes["num_heads"]),
            head_size=_count(config, "head_dim", file, default=sizes["d_model"] // sizes["num_heads"]),
            max_length=_count(config, "max_position_embeddings", file, default=2048),
            norm_eps=_number(config, "rms_norm_eps", file, default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except InputError as error:  # sizes that don't go together; errors of ours name the file already
        raise InputError(error.message, file=error.file or file, field=error.field) from error


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """A `config.json` for a model that came from no Hugging Face directory.

    Rotary fields are those of transformers 4, which 5 reads too.
    """
    return {
        "architectures": [architecture_of(config)],
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
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }


def architecture_of(config: ModelConfig) -> str:
    wanted = Architecture(config.family, config.residual)
    return next(name for name, architecture in ARCHITECTURES.items() if architecture == wanted)


def _architecture(config, file) -> Architecture:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"expected a list of names, got {names!r}"[:200], file=file, field="architectures")
    if not names and config.get("model_type") == "llama":
        names = ["LlamaForCausalLM"]
    if not names:
        raise InputError("no architecture is named", file=file, field="architectures")
    if names[0] not in ARCHITECTURES:
        raise InputError(
            f"unknown architecture {names[0]!r}; supported: {', '.join(ARCHITECTURES)}"
            f"{nearest(names[0], ARCHITECTURES)}",
            file=file,
            field="architectures",
        )
    return ARCHITECTURES[names[0]]


def _rope(config, file) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (4)."""
    # Where both are present transformers 5 takes rope_scaling.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise InputError(f"expected an object, got {rope!r}"[:200], file=file, field=field)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(
            f"rotary type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            f"{nearest(kind, ROPE_TYPES)}",
            file=file,
            field=f"{field}.rope_type",
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            "partly rotated heads are not supported", file=file, field=f"{field}.partial_rotary_factor"
        )
    theta = _number(config, "rope_theta", file, default=10000.0)
    theta = _number(rope, "rope_theta", file, default=theta, place=field)
    return theta, _scaling(kind, rope, config, file, field)


def _scaling(kind, rope, config, file, field) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = _number(rope, "factor", file, place=field)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    low = _number(rope, "low_freq_factor", file, place=field)
    high = _number(rope, "high_freq_factor", file, place=field)
    if high <= low:
        raise InputError(
            f"must be above low_freq_factor={low}, got {high}", file=file, field=f"{field}.high_freq_factor"
        )
    context = _count(config, "max_position_embeddings", file, default=2048)
    original = _count(rope, "original_max_position_embeddings", file, default=context, place=field)
    return RopeScaling("llama3", factor, low, high, original)


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


def _count(values, field, file, default=None, place=None) -> int:
    value = values.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = "is missing" if value is None else f"must be a positive integer, got {value!r}"
        raise InputError(what, file=file, field=f"{place}.{field}" if place else field)
    return value


def _number(values, field, file, default=None, place=None) -> float:
    value = values.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        what = "is missing" if value is None else f"must be a positive number, got {value!r}"
        raise InputError(what, file=file, field=f"{place}.{field}" if place else field)
    return float(value)
