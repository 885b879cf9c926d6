"""The tensors of each model family as a table: name in the file, leaf of the parameter tree, axes.

A rule such as

    "self_attn.q_proj.weight"  ->  leaf "q",  "NH,D -> D,N,H"

says that the stored matrix has the merged axes N and H (output features) before D, and that the leaf
is the same numbers with axes D, N, H. A digit is an axis that several leaves share: of "D,3NH" each of
three rules takes its part. Rotary halves are those of Hugging Face checkpoints in the model too, so no
rule moves numbers inside a head.

A table has a rule for everything that any model of the family has; those apply whose leaf is in the
parameter tree of the config.
"""

import dataclasses
import fnmatch
import functools
import itertools
import math
import re

import numpy as np

from a3_jax.errors import InputError, nearest
from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import abstract_params

QUERY_TENSOR = "model.query_embed"
QUERY_LEAF = ("query_embed",)
# Parts of names that torch.compile, FSDP, activation checkpointing and DDP put in.
_WRAPPERS = r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)[.]"


@dataclasses.dataclass(frozen=True)
class LeafRule:
    """One line of a family's table.

    Attributes:
      name: in the file; inside a layer what follows the layer's prefix.
      leaf: name in the parameter tree.
      axes: "stored -> leaf"; axes apart by commas, merged axes written together, 1 for a unit axis.
      part: which of the parts that the digit among the axes counts.
    """

    name: str
    leaf: str
    axes: str
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      prefix: of all names but the head's, which files of a model without head leave out.
      layer_prefix: of the tensors of a layer, with `{layer}`.
      tensors, layer_tensors: outside of layers, the embedding first, and in each.
      head: the rule of the output matrix, stored where it is not tied to the embedding.
      buffers: patterns of names that hold no parameters and are passed over.
      renamed: beginnings of names in the files of DiffuLLaMA and DiffuGPT, and what replaces them here.
    """

    tensors: tuple[LeafRule, ...]
    layer_tensors: tuple[LeafRule, ...]
    prefix: str = "model."
    layer_prefix: str = "model.layers.{layer}."
    head: LeafRule = LeafRule("lm_head.weight", "head", "V,D -> D,V")
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq", "rotary_emb.inv_freq")
    renamed: tuple[tuple[str, str], ...] = (("denoise_model.", "model."),)


def _pair(name, leaf, axes, bias_axes, part=0) -> tuple[LeafRule, LeafRule]:
    """Returns the rules of a weight and its bias."""
    return LeafRule(f"{name}.weight", leaf, axes, part), LeafRule(
        f"{name}.bias", f"{leaf}_bias", bias_axes, part
    )


_QUERY = LeafRule(QUERY_TENSOR, "query_embed", "1,1,D -> D")
_TENSORS = (
    LeafRule("model.embed_tokens.weight", "embed", "V,D -> V,D"),
    LeafRule("model.norm.weight", "final_norm", "D -> D"),
    _QUERY,
)
_PROJECTIONS = (
    *_pair("self_attn.q_proj", "q", "NH,D -> D,N,H", "NH -> N,H"),
    *_pair("self_attn.k_proj", "k", "KH,D -> D,K,H", "KH -> K,H"),
    *_pair("self_attn.v_proj", "v", "KH,D -> D,K,H", "KH -> K,H"),
    *_pair("self_attn.o_proj", "o", "D,NH -> N,H,D", "D -> D"),
    *_pair("mlp.gate_proj", "gate", "F,D -> D,F", "F -> F"),
    *_pair("mlp.up_proj", "up", "F,D -> D,F", "F -> F"),
    *_pair("mlp.down_proj", "down", "D,F -> F,D", "D -> D"),
)
_HEAD_NORMS = (
    LeafRule("self_attn.q_norm.weight", "q_norm", "H -> H"),
    LeafRule("self_attn.k_norm.weight", "k_norm", "H -> H"),
)
_LLAMA = Family(
    tensors=_TENSORS,
    layer_tensors=(
        LeafRule("input_layernorm.weight", "attn_norm", "D -> D"),
        LeafRule("post_attention_layernorm.weight", "mlp_norm", "D -> D"),
        *_PROJECTIONS,
        *_HEAD_NORMS,
    ),
)
_GEMMA = Family(
    tensors=_TENSORS,
    layer_tensors=(
        LeafRule("input_layernorm.weight", "attn_norm", "D -> D"),
        LeafRule("post_attention_layernorm.weight", "attn_post_norm", "D -> D"),
        LeafRule("pre_feedforward_layernorm.weight", "mlp_norm", "D -> D"),
        LeafRule("post_feedforward_layernorm.weight", "mlp_post_norm", "D -> D"),
        *_PROJECTIONS,
        *_HEAD_NORMS,
    ),
)
_OLMO2 = Family(
    tensors=_TENSORS,
    layer_tensors=(
        LeafRule("post_attention_layernorm.weight", "attn_post_norm", "D -> D"),
        LeafRule("post_feedforward_layernorm.weight", "mlp_post_norm", "D -> D"),
        LeafRule("self_attn.q_norm.weight", "q_norm", "NH -> N,H"),
        LeafRule("self_attn.k_norm.weight", "k_norm", "KH -> K,H"),
        *_PROJECTIONS,
    ),
)
_GPT2 = Family(  # its matrices are stored [in, out]
    prefix="transformer.",
    layer_prefix="transformer.h.{layer}.",
    tensors=(
        LeafRule("transformer.wte.weight", "embed", "V,D -> V,D"),
        LeafRule("transformer.wpe.weight", "position_embed", "P,D -> P,D"),
        *_pair("transformer.ln_f", "final_norm", "D -> D", "D -> D"),
        _QUERY,
    ),
    layer_tensors=(
        *_pair("ln_1", "attn_norm", "D -> D", "D -> D"),
        *_pair("attn.c_attn", "q", "D,3NH -> D,N,H", "3NH -> N,H", part=0),
        *_pair("attn.c_attn", "k", "D,3NH -> D,N,H", "3NH -> N,H", part=1),
        *_pair("attn.c_attn", "v", "D,3NH -> D,N,H", "3NH -> N,H", part=2),
        *_pair("attn.c_proj", "o", "NH,D -> N,H,D", "D -> D"),
        *_pair("ln_2", "mlp_norm", "D -> D", "D -> D"),
        *_pair("mlp.c_fc", "up", "D,F -> D,F", "F -> F"),
        *_pair("mlp.c_proj", "down", "F,D -> F,D", "D -> D"),
    ),
    buffers=("*.attn.bias", "*.attn.masked_bias"),
    renamed=(("denoise_model.", "transformer."), ("embed_tokens.", "transformer.wte.")),
)
_LLADA = Family(
    prefix="model.transformer.",
    layer_prefix="model.transformer.blocks.{layer}.",
    tensors=(
        LeafRule("model.transformer.wte.weight", "embed", "V,D -> V,D"),
        LeafRule("model.transformer.ln_f.weight", "final_norm", "D -> D"),
        _QUERY,
    ),
    layer_tensors=(
        LeafRule("attn_norm.weight", "attn_norm", "D -> D"), LeafRule("ff_norm.weight", "mlp_norm", "D -> D"),
        LeafRule("q_proj.weight", "q", "NH,D -> D,N,H"), LeafRule("k_proj.weight", "k", "KH,D -> D,K,H"),
        LeafRule("v_proj.weight", "v", "KH,D -> D,K,H"), LeafRule("attn_out.weight", "o", "D,NH -> N,H,D"),
        LeafRule("ff_proj.weight", "gate", "F,D -> D,F"), LeafRule("up_proj.weight", "up", "F,D -> D,F"),
        LeafRule("ff_out.weight", "down", "D,F -> F,D"),
    ),
    head=LeafRule("model.transformer.ff_out.weight", "head", "V,D -> D,V"),
)  # fmt: skip
FAMILIES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "smollm3": _LLAMA,
    "olmo2": _OLMO2, "gemma2": _GEMMA, "gemma3": _GEMMA, "gpt2": _GPT2,
    "llada": _LLADA,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LeafPart:
    """Where one stored tensor, or a part of one, lives in the parameter tree.

    Attributes:
      name: in the file.
      shape: as stored.
      leaf: path in the parameter tree.
      layer: index into the leaf's leading layer axis; None where the leaf is this tensor alone.
      split: the stored shape with merged axes apart.
      order: the transposition from `split`, without the axis of parts, to the leaf's axes.
      part: (axis of `split`, index) of the part; None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    leaf: tuple[str, ...]
    layer: int | None
    split: tuple[int, ...]
    order: tuple[int, ...]
    part: tuple[int, int] | None = None

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Returns the shape of the leaf, or of its slice of one layer."""
        return self.to_leaf(np.broadcast_to(np.int8(0), self.shape)).shape

    def to_leaf(self, stored: np.ndarray) -> np.ndarray:
        """Returns the leaf, or its slice of one layer, as a view of a stored tensor."""
        return self._part_of(stored.reshape(self.split)).transpose(self.order)

    def _part_of(self, array):
        return array if self.part is None else np.moveaxis(array, self.part[0], 0)[self.part[1]]


@functools.cache
def tensor_table(config: ModelConfig) -> dict[str, tuple[LeafPart, ...]]:
    """Returns every tensor of a model by its name in the file, the embedding first, each with its parts."""
    family, tree = FAMILIES[config.family], abstract_params(config)
    rows = [(row, "", None) for row in (*family.tensors, family.head) if row.leaf in tree]
    for layer in range(config.num_layers):
        prefix = family.layer_prefix.format(layer=layer)
        rows += [(row, prefix, layer) for row in family.layer_tensors if row.leaf in tree["last_layer"]]
    table: dict[str, tuple[LeafPart, ...]] = {}
    for row, prefix, layer in rows:
        tensor = _tensor(row, config, prefix, layer)
        table[tensor.name] = (*table.get(tensor.name, ()), tensor)
    return table


def embedding(config: ModelConfig) -> str:
    """Returns the name of the embedding."""
    return FAMILIES[config.family].tensors[0].name


def tied_head(config: ModelConfig) -> str | None:
    """Returns the output matrix that a file may repeat although it is tied to the embedding."""
    return FAMILIES[config.family].head.name if config.tie_embeddings else None


def shape_of(name: str, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a stored tensor, which may be the tied head."""
    return tensor_table(config)[embedding(config) if name == tied_head(config) else name][0].shape


def table_names(names, config: ModelConfig, file=None) -> dict[str, str]:
    """Returns the tensors of a file by the names of the table, without known buffers.

    A tied matrix that is stored as the head alone is the embedding.

    Args:
      names: of the stored tensors, with the family's prefix or without.
      file: names the checkpoint in errors.

    Returns:
      Name in the table -> name in the file; an unknown name is its own.
    """
    family, found = FAMILIES[config.family], {}
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in family.buffers):
            continue
        full = _full_name(name, config)
        if full in found:
            raise InputError(f"is the same tensor as {found[full]}", file=file, field=name)
        found[full] = name
    if tied_head(config) in found and embedding(config) not in found:
        found[embedding(config)] = found.pop(family.head.name)
    return found


def _full_name(name: str, config: ModelConfig) -> str:
    """Returns the table's name of a stored tensor; an unknown one as it is."""
    family = FAMILIES[config.family]
    tried = [name, *(prefix + name for prefix in (family.prefix, "model."))]
    tried += [new + name.removeprefix(old) for old, new in family.renamed if name.startswith(old)]
    return next((one for one in tried if _is_known(one, config)), name)


def _is_known(name: str, config: ModelConfig) -> bool:
    return name in tensor_table(config) or name in (QUERY_TENSOR, tied_head(config))


def check_names(names, config: ModelConfig, file) -> None:
    """Checks that a file has every parameter, and nothing else.

    Args:
      names: of `table_names`. The query vector may be absent.
      file: names the checkpoint in errors.
    """
    _check_wrappers(names, config, file)
    head = FAMILIES[config.family].head.name
    for name in tensor_table(config):
        if name not in names and name != QUERY_TENSOR:
            why = "; config.json has no tie_word_embeddings" if name == head else ""
            raise InputError(f"tensor is missing{why}", file=file, field=name)
    for name, stored in names.items():
        if not _is_known(name, config):
            raise InputError(
                f"unknown tensor for this architecture{nearest(stored, tensor_table(config))}",
                file=file, field=stored,
            )  # fmt: skip


def _check_wrappers(names, config: ModelConfig, file) -> None:
    """Refuses a file whose names are those of a wrapper around the model, or of an adapter to it."""
    unknown = [stored for name, stored in names.items() if not _is_known(name, config)]
    for name in unknown:
        if ".lora_" in name:
            why = "belongs to a LoRA adapter, not to a model: merge it into its base first (merge_and_unload)"
            raise InputError(why, file=file, field=name)
    first = min(unknown, default="")
    fronts = itertools.accumulate(f"{part}." for part in first.split(".")[:-1])
    ways = [
        (f"begin with {front!r}", f"^{re.escape(front)}")
        for front in fronts
        if all(name.startswith(front) for name in unknown)
    ]
    for what, pattern in (*ways, ("are those of a wrapper", _WRAPPERS)):
        found = [_full_name(re.sub(pattern, "", name), config) for name in unknown]
        if 2 * len(unknown) > len(names) and all(_is_known(name, config) for name in found):
            count = "all" if len(unknown) == len(names) else f"{len(unknown)} of the"
            why = f"{count} {len(names)} tensor names {what}, where this architecture has {found[0]}: "
            why += "store the state dict of the model inside, or rename them"
            raise InputError(why, file=file, field=unknown[0])


def _tensor(row: LeafRule, config: ModelConfig, prefix: str = "", layer: int | None = None) -> LeafPart:
    sizes = {
        "1": 1, "3": 3, "V": config.vocab_size, "D": config.d_model, "F": config.mlp_size,
        "H": config.head_size, "N": config.num_heads, "K": config.num_kv_heads, "P": config.max_length,
    }  # fmt: skip
    stored, leaf_axes = (part.strip().split(",") for part in row.axes.split("->"))
    split = [axis for merged in stored for axis in merged if axis != "1"]
    part = (split.index("3"), row.part) if "3" in split else None
    whole = [axis for axis in split if axis != "3"]
    leaf, index = (row.leaf,), None
    if layer is not None:  # the last layer is alone in the tree, those before it are stacked
        stacked = layer < config.num_layers - 1
        leaf, index = ("layers" if stacked else "last_layer", row.leaf), layer if stacked else None
    return LeafPart(
        name=prefix + row.name,
        shape=tuple(math.prod(sizes[axis] for axis in merged) for merged in stored),
        leaf=leaf,
        layer=index,
        split=tuple(sizes[axis] for axis in split),
        order=tuple(whole.index(axis) for axis in leaf_axes),
        part=part,
    )
