"""The tensors of each model family as a table: name in the file, leaf of the parameter tree, axes.

A row such as

    "self_attn.q_proj.weight"  ->  leaf "q",  "NH,D -> D,N,H"

says that the stored matrix has the merged axes N and H (output features) before D, and that the leaf
is the same numbers with axes D, N, H. Rotary halves are those of Hugging Face checkpoints in the
model too, so no row moves numbers inside a head.
"""

import dataclasses
import fnmatch
import functools
import math

import numpy as np

from a3_jax.errors import InputError, nearest
from a3_jax.model.config import ModelConfig

QUERY_TENSOR = "model.query_embed"
QUERY_LEAF = ("query_embed",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a family's table.

    Attributes:
      name: in the file; inside a layer what follows the layer's prefix.
      leaf: name in the parameter tree.
      axes: "stored -> leaf"; axes apart by commas, merged axes written together, 1 for a unit axis.
    """

    name: str
    leaf: str
    axes: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      layer_prefix: of the tensors of a layer, with `{layer}`.
      tensors, layer_tensors: outside of layers, and in each.
      head: the row of the output matrix, stored where it is not tied to the embedding.
      buffers: patterns of names that hold no parameters and are passed over.
    """

    layer_prefix: str
    tensors: tuple[Row, ...]
    layer_tensors: tuple[Row, ...]
    head: Row
    buffers: tuple[str, ...]


FAMILIES = {
    "llama": Family(
        layer_prefix="model.layers.{layer}.",
        tensors=(
            Row("model.embed_tokens.weight", "embed", "V,D -> V,D"),
            Row("model.norm.weight", "final_norm", "D -> D"),
            Row(QUERY_TENSOR, "query_embed", "1,1,D -> D"),
        ),
        layer_tensors=(
            Row("input_layernorm.weight", "attn_norm", "D -> D"),
            Row("self_attn.q_proj.weight", "q", "NH,D -> D,N,H"),
            Row("self_attn.k_proj.weight", "k", "KH,D -> D,K,H"),
            Row("self_attn.v_proj.weight", "v", "KH,D -> D,K,H"),
            Row("self_attn.o_proj.weight", "o", "D,NH -> N,H,D"),
            Row("post_attention_layernorm.weight", "mlp_norm", "D -> D"),
            Row("mlp.gate_proj.weight", "gate", "F,D -> D,F"),
            Row("mlp.up_proj.weight", "up", "F,D -> D,F"),
            Row("mlp.down_proj.weight", "down", "D,F -> F,D"),
        ),
        head=Row("lm_head.weight", "head", "V,D -> D,V"),
        buffers=("*.rotary_emb.inv_freq",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one stored tensor lives in the parameter tree.

    Attributes:
      name: in the file.
      shape: as stored.
      leaf: path in the parameter tree.
      layer: index into the leaf's leading layer axis; None where the leaf is this tensor alone.
      split: the stored shape with merged axes apart.
      order: the transposition from `split` to the leaf's axes.
    """

    name: str
    shape: tuple[int, ...]
    leaf: tuple[str, ...]
    layer: int | None
    split: tuple[int, ...]
    order: tuple[int, ...]

    def to_leaf(self, stored: np.ndarray) -> np.ndarray:
        """The leaf (or its slice of one layer) of a stored tensor; a view."""
        return stored.reshape(self.split).transpose(self.order)

    def to_stored(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `to_leaf`."""
        return leaf.transpose(np.argsort(self.order)).reshape(self.shape)


@functools.cache
def tensor_table(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a model by its name in the file, in the order of a forward pass."""
    family = FAMILIES[config.family]
    embed, *others = family.tensors
    tensors = [_tensor(embed, config)]
    for layer in range(config.num_layers):
        prefix = family.layer_prefix.format(layer=layer)
        tensors += [_tensor(row, config, prefix, layer) for row in family.layer_tensors]
    tensors += [_tensor(row, config) for row in others]
    if not config.tie_embeddings:
        tensors.append(_tensor(family.head, config))
    return {tensor.name: tensor for tensor in tensors}


def tied_head(config: ModelConfig) -> Tensor | None:
    """The output matrix that a file may repeat although it is tied: the embedding under a second name."""
    if not config.tie_embeddings:
        return None
    head = FAMILIES[config.family].head
    return dataclasses.replace(next(iter(tensor_table(config).values())), name=head.name)


def is_buffer(name: str, family: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FAMILIES[family].buffers)


def check_names(names, config: ModelConfig, file) -> None:
    """Every parameter is there, and nothing but parameters and known buffers.

    Args:
      names: of the stored tensors. The query vector may be absent.
      file: names the checkpoint in errors.

    Raises:
      InputError: naming the first tensor that is missing or unknown.
    """
    table = tensor_table(config)
    tied = tied_head(config)
    optional = {QUERY_TENSOR, tied.name} if tied else {QUERY_TENSOR}
    for name in table:
        if name not in names and name not in optional:
            raise InputError("tensor is missing", file=file, field=name)
    for name in names:
        if name not in table and name not in optional and not is_buffer(name, config.family):
            raise InputError(
                f"unknown tensor for this architecture{nearest(name, table)}", file=file, field=name
            )


def _tensor(row: Row, config: ModelConfig, prefix: str = "", layer: int | None = None) -> Tensor:
    sizes = {
        "1": 1, "V": config.vocab_size, "D": config.d_model, "F": config.mlp_size, "H": config.head_size,
        "N": config.num_heads, "K": config.num_kv_heads,
    }  # fmt: skip
    stored, leaf_axes = (part.strip().split(",") for part in row.axes.split("->"))
    split = [axis for merged in stored for axis in merged if axis != "1"]
    leaf, index = (row.leaf,), None
    if layer is not None:  # the last layer stands alone in the tree, those before it are stacked
        stacked = layer < config.num_layers - 1
        leaf, index = ("layers" if stacked else "last_layer", row.leaf), layer if stacked else None
    return Tensor(
        name=prefix + row.name,
        shape=tuple(math.prod(sizes[axis] for axis in merged) for merged in stored),
        leaf=leaf,
        layer=index,
        split=tuple(sizes[axis] for axis in split),
        order=tuple(split.index(axis) for axis in leaf_axes),
    )
