"""The decoder's shape and switches, for every family, and the published presets."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from a3_jax.checks import from_mapping, number, one_of, whole_number
from a3_jax.errors import InputError

MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000  # what a config from outside may ask for
RESIDUALS = ("standard", "release")
ROPE_KINDS = ("linear", "llama3", "yarn")
CHOICES = {
    "family": ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2", "gemma3", "gpt2", "llada"),
    "residual": RESIDUALS,
    "norm": ("rms", "rms_offset", "layer"),
    "norm_place": ("pre", "post", "both"),
    "qk_norm": ("none", "head", "full"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "positions": ("rotary", "learned"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides every frequency by `factor`; `llama3` divides the low ones, keeps the high ones
    and blends between (Llama 3.1); so does `yarn` (arXiv 2309.00071), with a ramp over the pairs of a
    head that is rounded to whole pairs if `truncate`, and cosines and sines times `attention_factor`.
    Low and high are told by `low_freq_factor` and `high_freq_factor`: turns in the original context.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        one_of("kind", self.kind, ROPE_KINDS)
        for name, value in dataclasses.asdict(self).items():
            if name not in ("kind", "truncate"):
                number(name, value, 0, above=True)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder with grouped key/value heads, and the switches in which families differ.

    Attributes:
      max_length: tokens of a document, in any order.
      left_length: tokens that the left-to-right model reads, where a sliding window makes that more
        than `max_length`; None: as many.
      family: which table of tensors (`checkpoints.families`).
      rope_theta, rope_scaling: rotary base, and its stretching.
      norm: "rms", "rms_offset" (times 1 + scale, Gemma) or "layer" (LayerNorm with bias, GPT-2).
      norm_place: "pre" (before attention and mlp), "post" (on what they add, OLMo-2) or "both" (Gemma).
      qk_norm: of queries and keys, over each "head" (Qwen3, Gemma 3) or all heads together, "full" (OLMo-2).
      qkv_bias, out_bias, mlp_bias: which projections have biases.
      activation, gated_mlp: down(act(gate(x)) * up(x)), or down(act(up(x))) without gate.
      positions: "rotary", or "learned": a vector for each position, added to both streams' rows.
      unrotated_layers: indices of layers without rotary positions (SmolLM3).
      local_layers: indices of layers with the rotary base `local_rope_theta` (None: `rope_theta`,
        stretched; Gemma 3) that see `window` tokens back, the own included (None: all). A window means
        something from left to right alone, so `max_length` is not above it.
      scale_embedding: embeddings times sqrt(D), rounded to the model's dtype (Gemma).
      attention_scale: of scores; None: 1 / sqrt(H).
      attention_softcap, final_softcap: scores and logits become cap * tanh(. / cap); None: they don't.
      residual: "standard", the pretrained model's own block, or "release", the authors' variant that
        adds the MLP to the normed state.
      query_init_scale: standard deviation with which the learned query vector is drawn when a pretrained
        model has none; the release draws N(0, 1), some 50 times a Llama embedding's scale.
      mask_token: id that stands for a masked token; None: no model of masked diffusion.
      logit_shift: the row before a masked token predicts it, not its own (masked diffusion that was
        adapted from a left-to-right model).
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    max_length: int
    left_length: int | None = None
    family: str = "llama"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    norm: str = "rms"
    norm_place: str = "pre"
    qk_norm: str = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    positions: str = "rotary"
    unrotated_layers: tuple[int, ...] = ()
    local_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    window: int | None = None
    scale_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    residual: str = "standard"
    query_init_scale: float = 0.02
    mask_token: int | None = None
    logit_shift: bool = False

    def __post_init__(self):
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_size",
                      "mlp_size", "max_length"):  # fmt: skip
            whole_number(field, getattr(self, field), 1, MAX_LAYERS if field == "num_layers" else MAX_SIZE)
        for field in ("left_length", "window"):
            if getattr(self, field) is not None:
                whole_number(field, getattr(self, field), 1, MAX_SIZE)
        if self.mask_token is not None:
            whole_number("mask_token", self.mask_token, 0, self.vocab_size - 1)
        for field in ("local_rope_theta", "attention_scale", "attention_softcap", "final_softcap"):
            if getattr(self, field) is not None:
                number(field, getattr(self, field), 0, above=True)
        for field in ("rope_theta", "norm_eps", "query_init_scale"):
            number(field, getattr(self, field), 0, above=True)
        for field in ("unrotated_layers", "local_layers"):
            layers = getattr(self, field)
            if not isinstance(layers, tuple) or any(layer not in range(self.num_layers) for layer in layers):
                wanted = f"must be indices of the {self.num_layers} layers, got {layers!r}"
                raise InputError(wanted[:200], field=field)
        if self.num_heads % self.num_kv_heads:
            why = f"{self.num_kv_heads} does not divide num_heads={self.num_heads}"
            raise InputError(why, field="num_kv_heads")
        if self.positions == "rotary" and self.head_size % 2:
            raise InputError(f"rotary positions need an even size, got {self.head_size}", field="head_size")
        for field, choices in CHOICES.items():
            one_of(field, getattr(self, field), choices)
        if self.residual == "release" and self.norm_place != "pre":
            raise InputError("'release' adds to the normed state, which is not 'pre' here", field="residual")
        if self.local_layers and self.window is not None and self.max_length > self.window:
            raise InputError(f"{self.max_length} is longer than window={self.window}", field="max_length")

    def context_length(self, left_to_right: bool = False) -> int:
        """Returns how many tokens of a document the model reads exactly, in any order or left to right."""
        return (self.left_length or self.max_length) if left_to_right else self.max_length

    def check_length(self, length: int, field: str, left_to_right: bool = False) -> None:
        """Refuses a document of more than `context_length` tokens."""
        context = self.context_length(left_to_right)
        if length <= context:
            return
        if length <= (self.left_length or 0):
            why = f"more than the sliding window of {context}, which has no meaning but from left to right"
        else:
            why = f"the model's context is {context}"
        raise InputError(f"{length} tokens, {why}", field=field)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Returns the config of a JSON object."""

        def convert(name, value, _):
            if name == "rope_scaling" and value is not None and not isinstance(value, RopeScaling):
                return from_mapping(RopeScaling, value, "rope_scaling")
            return tuple(value) if isinstance(value, list) else value  # JSON has lists alone

        return from_mapping(cls, fields, convert=convert)


def is_positive(value) -> TypeGuard[float]:
    """Returns whether a value is a number above 0 that a float can hold."""
    return isinstance(value, int | float) and 0 < value <= sys.float_info.max  # an integer may be larger


_LLAMA3_SCALING = RopeScaling(kind="llama3", factor=32.0, original_max_length=8192)

PRESETS = {
    "llama-3.2-1b": ModelConfig(
        vocab_size=128256, d_model=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_size=64,
        mlp_size=8192, max_length=131072, rope_theta=500000.0, rope_scaling=_LLAMA3_SCALING,
        tie_embeddings=True,
    ),
    "llama-3.2-3b": ModelConfig(
        vocab_size=128256, d_model=3072, num_layers=28, num_heads=24, num_kv_heads=8, head_size=128,
        mlp_size=8192, max_length=131072, rope_theta=500000.0, rope_scaling=_LLAMA3_SCALING,
        tie_embeddings=True,
    ),
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_size=128,
        mlp_size=14336, max_length=131072, rope_theta=500000.0,
        rope_scaling=dataclasses.replace(_LLAMA3_SCALING, factor=8.0),
    ),
}  # fmt: skip
