"""`config.json` of Hugging Face models to `ModelConfig`; `hf_export` is the way back.

What differs from one architecture to the next is in `architectures.json`. Every field is read, refused, or
listed there as without effect on the numbers; the reader names those that are none of the three, which
transformers doesn't know either.
"""

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from a3_jax.errors import InputError, nearest
from a3_jax.model.config import MAX_LAYERS, MAX_SIZE, ModelConfig, RopeScaling, is_positive

CONFIG_FILE = "config.json"
RELEASE_ARCHITECTURE = "LlamaTwoStreamForCausalLM"
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The properties of a model class, selected by the `architectures` field of a config.

    Attributes:
      family: the tensor table.
      switches: fields of ModelConfig in which the family differs from Llama.
      defaults: of absent fields of `config.json`, where transformers has others than for Llama.
      names: the names of fields of `config.json` where they are not Llama's; "": it has no such field.
      local: which layers are local, a key of `_LOCAL`; None: no layer.
      refused: fields that have to be absent, null or false, and what they would mean.
      fixed: the one value that fields may have where they are present.
      types: what `model_type` may be; empty: the family, with or without `_text` after it.
    """

    family: str
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    local: str | None = None
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    types: Sequence[str] = ()

    @property
    def model_types(self) -> Sequence[str]:
        return self.types or (self.family, f"{self.family}_text")


_TABLE = json.loads(
    importlib.resources.files("a3_jax.checkpoints").joinpath("architectures.json").read_text("utf-8")
)
ARCHITECTURES = {name: Architecture(**fields) for name, fields in _TABLE["architectures"].items()}
_LOCAL: Mapping[str | None, Callable[[Any, int], bool]] = {  # where no `layer_types` say
    "all": lambda fields, layer: True,
    "even": lambda fields, layer: layer % 2 == 0,
    "late": lambda fields, layer: layer >= fields.count("max_window_layers", least=0),
    "pattern": lambda fields, layer: (layer + 1) % fields.count("sliding_window_pattern") > 0,
    "unrotated": lambda fields, layer: layer in _unrotated(fields),
}
_LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
# Spellings that transformers takes beside a family's own.
_ALIASES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# Have `attention_bias`, which others ignore.
_BIASES = ("llama", "qwen3", "smollm3", "olmo2", "gemma2", "gemma3")


def config_from_hf(config: Mapping[str, Any], file=None) -> ModelConfig:
    """Returns the model that a `config.json` describes: `read_config` without the unread fields."""
    return read_config(config, file)[0]


def read_config(config: Mapping[str, Any], file=None) -> tuple[ModelConfig, list[str]]:
    """Reads the model that a `config.json` of transformers 4 or 5 describes.

    Args:
      config: the JSON object. Absent fields have the defaults of transformers' own config class, but for
        the sizes, which have none.
      file: names it in errors.

    Returns:
      The model, and the fields that were ignored without being known to have no effect: transformers doesn't
      read them for this architecture. Null, false and empty ones don't count.
    """
    architecture = _architecture(config, file)
    fields = _Fields(config, file, {**_LLAMA_DEFAULTS, **architecture.defaults}, architecture.names)
    _check_switches(fields, architecture)
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    values = {
        "family": architecture.family,
        "vocab_size": fields.count("vocab_size"),
        "d_model": width,
        "num_layers": fields.count("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": fields.count("num_key_value_heads", heads),
        "head_size": fields.count("head_dim", max(width // heads, 1)),
        "mlp_size": fields.count("intermediate_size", 4 * width if architecture.family == "gpt2" else None),
        "norm_eps": fields.number("rms_norm_eps"),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "activation": fields.choice("hidden_act", _ACTIVATIONS),
        **architecture.switches,
        **_masking(fields, architecture),
        **_attention(fields, architecture),
        **_layers(fields, architecture),
    }
    if values.get("positions") != "learned":
        values |= _rope(fields, architecture.family)
    if values.get("scale_embedding"):  # a vector at the scale of what the content rows start from
        values["query_init_scale"] = 0.02 * math.sqrt(width)
    listed = _TABLE["without_effect"]
    try:
        return ModelConfig(**values), fields.unread({*listed["all"], *listed.get(architecture.family, [])})
    except InputError as error:  # sizes that don't go together
        raise InputError(error.message, file=file, field=error.field) from error


def _check_switches(fields, architecture) -> None:
    """Refuses what would change the numbers and isn't implemented."""
    for field, meaning in {**_TABLE["refused"], **architecture.refused}.items():
        if fields.get(field):
            fields.refuse(field, f"{meaning} are not supported, got {fields.get(field)!r}"[:200])
    causal = {} if fields.get("mask_token_id") is not None else {"is_causal": True}
    for field, value in {**causal, **architecture.fixed}.items():
        if fields.get(field) not in (None, value):
            fields.refuse(field, f"must be {value!r}, got {fields.get(field)!r}"[:200])
    for alias in set(_ALIASES) & architecture.names.keys() & fields.given.keys():
        name, value = architecture.names[alias], fields.given[alias]
        if fields.given.get(name, value) != value:
            fields.refuse(alias, f"{fields.given[name]!r} contradicts {alias}={value!r}"[:200])
        fields.values[name] = value
        fields.read.add(alias)


class _Fields:
    """Fields of a JSON object, checked as they are read; absent ones have defaults, null ones stay null."""

    def __init__(self, values, file, defaults, names, within=None):
        self.values, self.names = {**defaults, **values}, names
        self.file, self.within = file, within
        self.given, self.read, self.inside = values, {*defaults, ""}, {}

    def get(self, field):
        self.read.add(self.names.get(field, field))
        return self.values.get(self.names.get(field, field))

    def unread(self, without_effect: Set[str] = frozenset()) -> list[str]:
        """Returns the fields that hold something and were not read, including those of objects inside."""
        known = self.read | without_effect
        mine = [name for name, value in self.given.items() if value and name not in known]
        inner = [f"{name}.{field}" for name, fields in self.inside.items() for field in fields.unread()]
        return mine + inner

    def refuse(self, field, why):
        name = self.names.get(field, field)
        raise InputError(why, file=self.file, field=f"{self.within}.{name}" if self.within else name)

    def _refuse_value(self, field, wanted, value):
        self.refuse(field, "is missing" if value is None else f"{wanted}, got {value!r}"[:200])

    def object(self, field) -> "_Fields":
        """Returns the fields of an object inside this one; none if it is absent."""
        value = self.get(field) or {}
        if not isinstance(value, dict):
            self.refuse(field, f"expected an object, got {value!r}"[:200])
        if field not in self.inside:
            within = f"{self.within}.{field}" if self.within else field
            self.inside[field] = _Fields(value, self.file, {}, {}, within)
        return self.inside[field]

    def count(self, field, default=None, most=MAX_SIZE, least=1) -> int:
        value = default if self.get(field) is None else self.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            kind = "a positive" if least else "an"
            self._refuse_value(field, f"must be {kind} integer up to {most}", value)
        return value

    def number(self, field, default=None) -> float:
        value = default if self.get(field) is None else self.get(field)
        if isinstance(value, bool) or not is_positive(value):
            self._refuse_value(field, "must be a positive number", value)
        return float(value)

    def optional(self, field) -> float | None:
        return None if self.get(field) is None else self.number(field)

    def flag(self, field) -> bool:
        """Returns true or false (also for null); a text such as "false" would be taken for true."""
        value = self.get(field)
        if not isinstance(value, bool | None):
            self._refuse_value(field, "must be true or false", value)
        return bool(value)

    def choice(self, field, choices):
        value = self.get(field)
        if not isinstance(value, str) or value not in choices:
            supported = f"{', '.join(choices)}{nearest(value, choices)}"
            self.refuse(field, f"{value!r} is not supported; supported: {supported}")
        return choices[value]

    def items(self, field, kind, length) -> list | None:
        """Returns a list with an item of this type for each layer, or None."""
        values = self.get(field)
        if values is not None and not (
            isinstance(values, list) and len(values) == length and all(isinstance(v, kind) for v in values)
        ):
            self.refuse(field, f"expected a list of {length} {kind.__name__}, got {values!r}"[:200])
        return values


def _architecture(config, file) -> Architecture:
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"expected a list of names, got {names!r}"[:200], file=file, field="architectures")
    kind = config.get("model_type")
    if not names and kind:
        names = [name for name, known in ARCHITECTURES.items() if kind in known.model_types]
    if not names:
        raise InputError("no supported architecture is named", file=file, field="architectures")
    if names[0] not in ARCHITECTURES:
        raise InputError(
            f"unknown architecture {names[0]!r}; supported: {', '.join(ARCHITECTURES)}"
            f"{nearest(names[0], ARCHITECTURES)}",
            file=file,
            field="architectures",
        )
    types = ARCHITECTURES[names[0]].model_types
    if kind is not None and kind not in types:
        why = f"{names[0]!r} and model_type {kind!r} are not one family: correct the wrong one; with this "
        why += f"architecture model_type is {types[0]!r}, and transformers follows model_type"
        raise InputError(why, file=file, field="architectures")
    if names[0] == "DiscreteDiffusionModel" and kind == "gpt2":
        base, mask = ARCHITECTURES["GPT2LMHeadModel"], 10541 if config.get("vocab_size") == 50257 else 50257
        return dataclasses.replace(base, defaults={**base.defaults, "mask_token_id": mask})
    return ARCHITECTURES[names[0]]


def _masking(fields, architecture) -> dict[str, Any]:
    """Returns the fields of a model of masked diffusion; only LLaDA predicts a token from its own row."""
    values = {}
    if architecture.family == "llada" and fields.get("embedding_size"):  # at least vocab_size
        values["vocab_size"] = fields.count("embedding_size")
    if fields.get("mask_token_id") is None:
        return values
    shift = fields.get("logit_shift")
    shift = architecture.family != "llada" if shift is None else fields.flag("logit_shift")
    return values | {"mask_token": fields.get("mask_token_id"), "logit_shift": shift}


def _attention(fields, architecture) -> dict[str, Any]:
    """Returns biases, the scale of scores, and softcaps."""
    family = architecture.family
    values: dict[str, Any] = {}
    if family in _BIASES and fields.flag("attention_bias"):
        values = {"qkv_bias": True, "out_bias": True}
    if family in ("llama", "smollm3") and fields.flag("mlp_bias"):
        values["mlp_bias"] = True
    if family in ("gemma2", "gemma3"):
        values["attention_scale"] = fields.number("query_pre_attn_scalar") ** -0.5
        values["attention_softcap"] = fields.optional("attn_logit_softcapping")
        values["final_softcap"] = fields.optional("final_logit_softcapping")
    if family == "gpt2" and fields.get("scale_attn_weights") is False:
        values["attention_scale"] = 1.0
    return values


def _layers(fields, architecture) -> dict[str, Any]:
    """Returns the layers that are local or not rotated, and the lengths that a sliding window allows."""
    layers, context = fields.count("num_hidden_layers"), fields.count("max_position_embeddings")
    values: dict[str, Any] = {"max_length": context}
    if architecture.family == "smollm3":
        values["unrotated_layers"] = _unrotated(fields)
    if architecture.local is None:
        return values
    kinds = fields.items("layer_types", str, layers)
    window, switch = None, "use_sliding_window"  # which other families than these don't read
    is_on = switch not in architecture.defaults or fields.flag(switch)
    if architecture.family == "smollm3" and kinds is not None:  # the list alone decides
        is_on = True
    if is_on and fields.get("sliding_window") is not None:
        window = fields.count("sliding_window")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            fields.refuse("layer_types", f"layers of type {kind!r} are not supported")
    if window is None and "sliding_attention" in (kinds or ()):
        why = "has layers of type 'sliding_attention', but "
        fields.refuse("layer_types", why + ("sliding_window is null" if is_on else f"{switch} is false"))
    # Gemma 3's local layers have a rotary base of their own, with a window or without.
    if window is None and architecture.family != "gemma3":
        return values
    is_local = (
        [_LOCAL[architecture.local](fields, layer) for layer in range(layers)]
        if kinds is None
        else [kind == "sliding_attention" for kind in kinds]
    )
    values["local_layers"] = tuple(layer for layer in range(layers) if is_local[layer])
    if values["local_layers"] and window is not None:
        values["window"] = window
        if window < context:
            values |= {"max_length": window, "left_length": context}
    return values


def _unrotated(fields) -> tuple[int, ...]:
    """Returns SmolLM3's unrotated layers: those whose flag is 0; without flags, every fourth."""
    layers = fields.count("num_hidden_layers")
    flags = fields.items("no_rope_layers", int, layers)
    if flags is None:
        flags = [(layer + 1) % fields.count("no_rope_layer_interval") for layer in range(layers)]
    return tuple(layer for layer in range(layers) if not flags[layer])


def _rope(fields, family) -> dict[str, Any]:
    """Returns rotary bases and scaling, as transformers 5 (`rope_parameters`) or 4 writes them."""
    # Where both are present transformers 5 takes rope_scaling.
    field = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given, local_theta, owners = fields.object(field), None, [fields]
    if family == "gemma3":
        by_layer = fields.object("rope_parameters")
        local = by_layer.object("sliding_attention")
        if local.get("rope_type") not in (None, "default"):
            local.refuse("rope_type", f"{local.get('rope_type')!r} is not supported in local layers")
        local_theta = local.number("rope_theta", fields.get("rope_local_base_freq"))
        owners, full = [*owners, local], by_layer.object("full_attention")
        if field == "rope_scaling":  # transformers merges the two
            given.values, full.read = full.values | given.values, set(full.given)
        else:
            given = full
    for name, value in given.values.items():
        if isinstance(value, dict):
            fields.refuse(field, f"rotary positions that differ by layer ({name!r}) are not supported")
    for owner in (*owners, given):
        if owner.get("partial_rotary_factor") not in (None, 1.0):
            owner.refuse("partial_rotary_factor", "partly rotated heads are not supported")
    return {
        "rope_theta": given.number("rope_theta", fields.get("rope_theta")),
        "rope_scaling": _scaling(given, fields),
        "local_rope_theta": local_theta,
    }


def _scaling(rope, fields) -> RopeScaling | None:
    name = "type" if rope.get("type") and rope.get("rope_type") is None else "rope_type"
    kind = "default" if rope.get(name) is None else rope.get(name)
    if kind not in ROPE_TYPES:
        supported = f"{', '.join(ROPE_TYPES)}{nearest(kind, ROPE_TYPES)}"
        rope.refuse(name, f"rotary type {kind!r} is not supported; supported: {supported}")
    if kind in ("default", "dynamic"):  # dynamic scaling begins after the context, where nothing is read
        rope.read |= {"factor"} if kind == "dynamic" else set()
        return None
    context, name = fields.count("max_position_embeddings"), "original_max_position_embeddings"
    original = fields.count(name) if fields.get(name) else rope.count(name, context)
    factor = rope.number("factor", context / original if kind == "yarn" else None)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "yarn":
        return RopeScaling(
            "yarn", factor, rope.number("beta_slow", 1.0), rope.number("beta_fast", 32.0), original,
            rope.number("attention_factor", _yarn_attention(rope, factor)), rope.get("truncate") is not False,
        )  # fmt: skip
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"must be above low_freq_factor={low}, got {high}")
    return RopeScaling("llama3", factor, low, high, original)


def _yarn_attention(rope, factor) -> float:
    """Returns the factor of cosines and sines that a config without `attention_factor` implies."""

    def scale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim")) if all(both) else scale(1.0)
