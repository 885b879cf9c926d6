"""The decoder's shape and switches, for every family, and the published presets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from a3_jax.errors import InputError, nearest

RESIDUALS = ("standard", "release")
ROPE_KINDS = ("linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `linear` divides every frequency by `factor`; `llama3` divides the low ones, keeps the high ones
    and blends between (Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise InputError(
                f"unknown kind {self.kind!r}{nearest(self.kind, ROPE_KINDS)}", field="rope_scaling"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder with grouped key/value heads, gated MLP and rotary positions.

    `residual` is "standard", the pretrained model's own block, or "release", the authors' variant
    that adds the MLP to the normed state. `query_init_scale` is the standard deviation with which the
    learned query vector is drawn when a pretrained model has none; the release draws N(0, 1), some 50
    times a Llama embedding's scale.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    max_length: int
    family: str = "llama"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    residual: str = "standard"
    query_init_scale: float = 0.02

    def __post_init__(self):
        for field in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_size",
                      "mlp_size", "max_length"):  # fmt: skip
            size = getattr(self, field)
            if not isinstance(size, int) or size < 1:
                raise InputError(f"must be a positive whole number, got {size!r}", field=field)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_kv_heads} does not divide num_heads={self.num_heads}", field="num_kv_heads"
            )
        if self.head_size % 2:
            raise InputError(f"rotary positions need an even size, got {self.head_size}", field="head_size")
        if self.residual not in RESIDUALS:
            raise InputError(
                f"unknown: {self.residual!r}{nearest(self.residual, RESIDUALS)}", field="residual"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """The config of a JSON object.

        Raises:
          InputError: an unknown or missing field, or a value that makes no model.
        """
        fields = _checked(cls, fields, "model")
        if fields.get("rope_scaling") is not None and not isinstance(fields["rope_scaling"], RopeScaling):
            scaling = _checked(RopeScaling, fields["rope_scaling"], "rope_scaling")
            fields["rope_scaling"] = RopeScaling(**scaling)
        return cls(**fields)


def _checked(cls, fields, name):
    known = {field.name: field for field in dataclasses.fields(cls)}
    for field in fields:
        if field not in known:
            raise InputError(f"unknown field {field!r}{nearest(field, known)}", field=name)
    for field in known.values():
        if field.default is dataclasses.MISSING and field.name not in fields:
            raise InputError(f"field {field.name!r} is missing", field=name)
    return dict(fields)


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
