"""The two-stream decoder of A3 (arXiv 2601.13228), on one set of weights.

Content rows start from token embeddings, query rows from one learned vector. Both go through the
same blocks; keys and values come from the content rows only. A row sees an interval of those keys
(`ordering.intervals`), so the model knows nothing of orders, groups or documents:

    content rows  tokens, positions, start, limit --+-- q --> attention --> mlp --> content hidden
                                                    +-- k, v --^
    query rows    vector, positions, start, limit ----- q --> attention --> mlp --> query hidden

With rank = position the content stream is the pretrained left-to-right model, logit for logit.
"""

import functools
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from a3_jax.model.attention import FEW_ROWS, attention
from a3_jax.model.attention_cached import append, cached_attention
from a3_jax.model.attention_chunked import RESIDUALS, AttentionArgs
from a3_jax.model.config import ModelConfig
from a3_jax.model.layers import (
    ACTIVATIONS,
    embed,
    layer_norm,
    rms_norm,
    rotary_angles,
    rotary_frequencies,
    rotate,
    softcap,
)
from a3_jax.model.sharding import axes_shardings, constrain

NO_WINDOW = 2**30
_DRAW_BLOCK = 4096
OUTPUTS = ("query", "content", "both")
_BLOCK_INPUT = "block_input"
_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "none": None,
    # To a policy attention is a loop, not a dot: what is kept of it has a name.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(RESIDUALS)
    ),
    "block": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@struct.dataclass
class Rows:
    """The rows of one stream.

    Attributes:
      positions: [B, T] int32, original position in the document; rotary angles follow it.
      start, limit: [B, T] int32, the interval of content keys (or cache slots) that a row sees.
      tokens: [B, T] int32 for content rows; None for query rows, which start from the learned vector.
    """

    positions: Any
    start: Any
    limit: Any
    tokens: Any = None


@struct.dataclass
class Cache:
    """Keys and values of committed tokens: append-only, a slot is a commit.

    Attributes:
      key, value: [L, B, K, S, H]: a head's keys are next to each other.
      length: [B] int32, slots in use. Setting it back forgets the slots after it.
    """

    key: Any
    value: Any
    length: Any


@struct.dataclass
class Outputs:
    """Hidden states after the final norm, [B, T, D], None where not asked for, and the new cache."""

    query: Any = None
    content: Any = None
    cache: Cache | None = None


@struct.dataclass
class LayerConfig:
    """What differs from layer to layer besides weights, [L] each; the layer scan slices it.

    Attributes:
      index: int32, the layer's index in the cache.
      window: int32, how many keys back a content row sees left to right, itself included.
      rotary_table: int32, row of `frequency_tables`; a table of zeros means no rotation.
    """

    index: Any
    window: Any
    rotary_table: Any


def layer_configs(config: ModelConfig) -> LayerConfig:
    """Returns the configs of all layers, NumPy int32 [L] each."""
    window, table = [], []
    local_table = int(config.local_rope_theta is not None)
    for layer in range(config.num_layers):
        local = layer in config.local_layers
        window.append(config.window if local and config.window is not None else NO_WINDOW)
        table.append(local_table if local else 0)
        if layer in config.unrotated_layers:
            table[-1] = local_table + 1
    return LayerConfig(*(np.asarray(values, np.int32) for values in (range(len(table)), window, table)))


def frequency_tables(config: ModelConfig):
    """Returns (radians per position, float32 [H / 2]; factor of cosines and sines) of each table.

    The model's own; that of local layers, if they have a base of their own; zeros, if some layers are
    not rotated.
    """
    c = config
    factor = 1.0 if c.rope_scaling is None else c.rope_scaling.attention_factor
    tables = [(rotary_frequencies(c.head_size, c.rope_theta, c.rope_scaling), factor)]
    if c.local_rope_theta is not None:
        tables.append((rotary_frequencies(c.head_size, c.local_rope_theta), 1.0))
    if c.unrotated_layers:
        tables.append((jnp.zeros(c.head_size // 2, jnp.float32), 1.0))
    return tables


@struct.dataclass
class AttentionInputs:
    """What the rows of both streams see and where they are, content rows first: the same for all layers.

    Attributes:
      start, limit: [B, R] int32, R = content rows + query rows.
      cos, sin: [tables, B, R, H / 2] float32; None without rotary positions.
    """

    start: Any
    limit: Any
    cos: Any
    sin: Any


class Block(nn.Module):
    """One layer over both streams' rows at once: each projection is one matrix product.

    Attributes:
      content_rows: how many of the rows are content rows; they come first.
      first_output: the rows before it give keys and values only. 0, or `content_rows` in the last
        layer when just the query output is wanted.
      few_rows: weights are [out, in], see `prepare_cpu_decode_params`.
    """

    config: ModelConfig
    dtype: Any
    precision: Any
    attention: str
    content_rows: int
    first_output: int = 0
    few_rows: bool = False

    @nn.compact
    def __call__(self, carry, layer: LayerConfig, inputs: AttentionInputs):
        c = self.config
        x_BRD, cache = carry
        x_BRD = checkpoint_name(x_BRD, _BLOCK_INPUT)
        with jax.named_scope("attention"):
            normed_BRD = self.norm_if("pre", "attn_norm", x_BRD)
            attended_BRD, cache = self.attend(normed_BRD, cache, layer, inputs)
            # In the last layer content rows end here, when nobody wants their output: they gave their keys.
            x_BRD = x_BRD[:, self.first_output :] + self.norm_if("post", "attn_post_norm", attended_BRD)
        with jax.named_scope("mlp"):
            normed_BRD = self.norm_if("pre", "mlp_norm", x_BRD)
            residual_BRD = normed_BRD if c.residual == "release" else x_BRD
            x_BRD = residual_BRD + self.norm_if("post", "mlp_post_norm", self.mlp(normed_BRD))
        return (constrain(x_BRD, ("batch", "length", "embed_act")), cache), None

    def attend(self, x_BRD, cache, layer, inputs):
        """Attention with output projection: [B, R, D] to [B, R - first_output, D], and the new cache."""
        c, content, first = self.config, self.content_rows, self.first_output
        # Both streams ask, content rows alone answer: no row ever sees the query vector of another.
        content_BSD = x_BRD[:, :content]
        query_BTNH = self.heads("q", x_BRD[:, first:], "heads", c.num_heads)
        key_BSKH = self.heads("k", content_BSD, "kv_heads", c.num_kv_heads)
        value_BSKH = self.heads("v", content_BSD, "kv_heads", c.num_kv_heads, normed=False)
        if c.positions == "rotary":
            cos_BRh, sin_BRh = inputs.cos[layer.rotary_table], inputs.sin[layer.rotary_table]
            query_BTNH = rotate(query_BTNH, cos_BRh[:, first:], sin_BRh[:, first:])
            key_BSKH = rotate(key_BSKH, cos_BRh[:, :content], sin_BRh[:, :content])
        # A sliding window raises `start`. A query row's own token is not among its keys but counts as seen,
        # as it does for the content row of the same token.
        window_R = layer.window - (jnp.arange(inputs.limit.shape[1]) >= content)
        start_BT = jnp.maximum(inputs.start, inputs.limit - window_R)[:, first:]
        limit_BT = inputs.limit[:, first:]
        args = AttentionArgs(c.attention_scale or c.head_size**-0.5, c.attention_softcap, self.precision)
        if cache is not None:
            # The new rows go after those in use; what padding leaves there is never read.
            put = functools.partial(append, layer=layer.index, length_B=cache.length)
            cache = cache.replace(key=put(cache.key, key_BSKH), value=put(cache.value, value_BSKH))
        if cache is not None and query_BTNH.shape[1] <= FEW_ROWS:
            out_BTNH = cached_attention(
                query_BTNH, cache.key, cache.value, layer.index, start_BT, limit_BT, args
            )
        else:
            if cache is not None:  # many rows, as in a prefill: one layer of the cache, [B, S, K, H]
                key_BSKH, value_BSKH = (
                    array_LBKSH[layer.index].astype(query_BTNH.dtype).swapaxes(1, 2)
                    for array_LBKSH in (cache.key, cache.value)
                )
            out_BTNH = attention(query_BTNH, key_BSKH, value_BSKH, start_BT, limit_BT, args, self.attention)
        axes, shape = ("heads", "head_size", "embed"), (c.num_heads, c.head_size, c.d_model)
        return self.linear("o", out_BTNH, axes, shape, inputs=2, bias=c.out_bias), cache

    def mlp(self, x_BTD):
        """Gated MLP (Shazeer, arXiv 2002.05202): down(act(gate(x)) * up(x)), or down(act(up(x)))."""
        c, axes, activation = self.config, ("embed", "mlp"), ACTIVATIONS[self.config.activation]
        shape, bias = (c.d_model, c.mlp_size), c.mlp_bias
        gate_BTF = self.linear("gate", x_BTD, axes, shape, bias=bias) if c.gated_mlp else None
        up_BTF = self.linear("up", x_BTD, axes, shape, bias=bias)
        hidden_BTF = activation(up_BTF) if gate_BTF is None else activation(gate_BTF) * up_BTF
        return self.linear("down", hidden_BTF, axes[::-1], shape[::-1], bias=bias)

    def heads(self, name, x_BTD, axis, count, normed=True):
        """Projects to heads, [B, T, D] to [B, T, count, H], with the norm that queries and keys have."""
        c = self.config
        axes, shape = ("embed", axis, "head_size"), (c.d_model, count, c.head_size)
        x_BTNH = self.linear(name, x_BTD, axes, shape, bias=c.qkv_bias)
        if not normed or c.qk_norm == "none":
            return x_BTNH
        over = {"head": 1, "full": 2}[c.qk_norm]  # each head by itself, or all of them together
        return _norm(self, f"{name}_norm", x_BTNH, axes[-over:], shape[-over:])

    def linear(self, name, x, axes, shape, inputs=1, bias=False):
        """Multiplies x [B, T, in] by the weight `name`, whose first `inputs` axes are "in": [B, T, out]."""
        stored_axes, stored_shape = axes, shape
        if self.few_rows:
            stored_axes, stored_shape = (names[inputs:] + names[:inputs] for names in (axes, shape))
        scale = math.prod(shape[:inputs]) ** -0.5
        weight = _parameter(self, name, stored_axes, stored_shape, scale).astype(self.dtype)
        if self.few_rows:  # weight [out, in] times x [B, T, in] is [out, B, T]
            last = tuple(range(-inputs, 0))
            out = jnp.tensordot(weight, x, axes=(last, last), precision=self.precision)
            out = jnp.moveaxis(out, (-2, -1), (0, 1))
        else:
            out = jnp.tensordot(x, weight, axes=inputs, precision=self.precision)
        if not bias:
            return out
        return out + _parameter(self, f"{name}_bias", axes[inputs:], shape[inputs:], 0.0).astype(self.dtype)

    def norm_if(self, where, name, x_BTD):
        """Returns the norm `name` of x if the model has one there ("pre" or "post"), else x."""
        return _norm(self, name, x_BTD) if self.config.norm_place in (where, "both") else x_BTD


class TwoStream(nn.Module):
    """The decoder as a Flax module; `run_rows` runs it with given parameters.

    Attributes:
      dtype: type of activations and matrix products; parameters are cast to it.
      precision: that of matrix products; `jax.lax.Precision.HIGHEST` for float32 proper on accelerators.
      remat: what is kept for the backward pass, the rest being computed again: "none" (all of it),
        "dots" (matrix products and attention), "block" (each block's input), "offload" (the same, in
        the host's memory).
      attention: how attention is computed, see `attention.IMPLEMENTATIONS`.
      few_rows: layers one by one, with those parameters of `prepare_cpu_decode_params`, instead of in a scan.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    precision: Any = None
    remat: str = "none"
    attention: str = "auto"
    few_rows: bool = False

    @nn.compact
    def __call__(
        self, content: Rows, query: Rows | None = None, outputs: str = "query", cache: Cache | None = None
    ):
        """Runs content and query rows through the layers.

        Args:
          content: rows with tokens, [B, T]. Without a cache, `start` and `limit` of all rows index these
            rows, so they must be sorted (`ordering.intervals.sort_order`). With a cache they are appended to
            it, but for those that see nothing (padding), which come last; `start` and `limit` index its
            slots, of which at least T must be free.
          query: rows without tokens, [B, Tq], or None.
          outputs: "query", "content" or "both"; work that feeds none of them is not done.
          cache: keys and values of earlier calls, or None.

        Returns:
          `Outputs`.
        """
        if outputs not in OUTPUTS or (query is None and outputs != "content"):
            raise ValueError(f"outputs={outputs!r} with {'no ' if query is None else ''}query rows")
        if outputs == "content":
            query = None
        c, rows = self.config, content.tokens.shape[1]
        x_BRD = self.embedded(content, query)
        # Query rows need the content rows' keys in every layer, but not what the last layer makes of them.
        first_output = rows if outputs == "query" else 0
        x_BRD, cache = self._layers(x_BRD, cache, _attention_inputs(c, content, query), rows, first_output)
        with jax.named_scope("final_norm"):
            hidden_BRD = _norm(self, "final_norm", x_BRD)
        if cache is not None:  # of the rows written, padding came last: it stays outside of the length
            added_B = jnp.sum(content.limit > content.start, axis=1, dtype=jnp.int32)
            cache = cache.replace(length=cache.length + added_B)
        return Outputs(
            query=None if query is None else hidden_BRD[:, rows - first_output :],
            content=None if first_output else hidden_BRD[:, :rows],
            cache=cache,
        )

    def embedded(self, content, query):
        """Content rows' embeddings, then the vector per query row, [B, R, D]; both get learned positions."""
        c = self.config
        table_VD = _parameter(self, "embed", ("vocab", "embed"), (c.vocab_size, c.d_model), 0.02)
        vector_D = _parameter(self, "query_embed", ("norm",), (c.d_model,), c.query_init_scale)
        if not c.tie_embeddings:  # declared with the rest, read by `logits`
            _parameter(self, "head", ("embed", "vocab"), (c.d_model, c.vocab_size), c.d_model**-0.5)
        with jax.named_scope("embed"):
            x_BRD = embed(table_VD, content.tokens, self.dtype)
            if c.scale_embedding:
                x_BRD = x_BRD * jnp.asarray(math.sqrt(c.d_model), self.dtype)
        # All query rows start from the same vector: position and interval are what tells them apart.
        positions_BR = content.positions
        if query is not None:
            vectors_BTD = jnp.broadcast_to(vector_D.astype(self.dtype), (*query.positions.shape, c.d_model))
            x_BRD = jnp.concatenate([x_BRD, vectors_BTD], axis=1)
            positions_BR = jnp.concatenate([positions_BR, query.positions], axis=1)
        if c.positions == "learned":
            shape = (c.max_length, c.d_model)
            learned = _parameter(self, "position_embed", ("length", "embed"), shape, 0.02)
            x_BRD = x_BRD + learned[positions_BR].astype(self.dtype)
        return constrain(x_BRD, ("batch", "length", "embed_act"))

    def _layers(self, x_BRD, cache, inputs, content_rows, first_output):
        """Runs all blocks but the last in one scan or one by one; of the last, less may be wanted."""
        configs = layer_configs(self.config)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        arguments = {
            "config": self.config, "dtype": self.dtype, "precision": self.precision,
            "attention": self.attention, "content_rows": content_rows, "few_rows": self.few_rows,
        }  # fmt: skip
        carry = (x_BRD, cache)
        if self.few_rows:
            for layer in range(self.config.num_layers - 1):
                layer_config = jax.tree.map(lambda x, layer=layer: x[layer], configs)
                carry, _ = block(**arguments, name=f"layer_{layer}")(carry, layer_config, inputs)
        elif self.config.num_layers > 1:
            # One traced block stands for all layers, weights stacked [L - 1, ...]: the time to compile does
            # not grow with depth.
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=cast(Any, (0, nn.broadcast)),
                length=self.config.num_layers - 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            first_layers = jax.tree.map(lambda x: x[:-1], configs)
            carry, _ = scanned(**arguments, name="layers")(carry, first_layers, inputs)
        last_layer = block(**arguments, first_output=first_output, name="last_layer")
        carry, _ = last_layer(carry, jax.tree.map(lambda x: x[-1], configs), inputs)
        return carry


def default_dtype() -> str:
    """Returns the default dtype of inference: float32 on CPU, bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_two_stream(config: ModelConfig, dtype: str) -> TwoStream:
    """Makes the model for rows [B, T] in a dtype given by name; float32 implies full precision."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return TwoStream(config, dtype=jnp.dtype(dtype), precision=precision)


def prepare_cpu_decode_params(params, config: ModelConfig):
    """Returns the layers' parameters for a model with `few_rows`: each layer by itself, weights [out, in].

    On CPU a scan over layers copies each one's weights out of their stack, and a product of few rows with
    a weight [in, out] packs all of it first: together most of the time of a decoding step.
    """
    inputs = dict.fromkeys(("q", "k", "v", "gate", "up", "down"), 1) | {"o": 2}  # norms and biases have none

    def outputs_first(name, weight):
        n = inputs.get(name, 0)
        return jnp.moveaxis(weight, tuple(range(n)), tuple(range(-n, 0)))

    layers = {
        f"layer_{layer}": jax.tree.map(lambda x, layer=layer: x[layer], params["layers"])
        for layer in range(config.num_layers - 1)
    }
    layers["last_layer"] = params["last_layer"]
    return {
        layer: {name: outputs_first(name, weight) for name, weight in weights.items()}
        for layer, weights in layers.items()
    }


def run_rows(
    model: TwoStream,
    params,
    content: Rows,
    query: Rows | None = None,
    outputs: str = "query",
    cache: Cache | None = None,
) -> Outputs:
    """Runs `TwoStream.__call__` with the parameter tree `params`: a pure function of its arguments.

    Args:
      model: the module.
      params: tree of arrays, see `init_params`.
      content, query: rows [B, T] and [B, Tq].
      outputs, cache: as in `TwoStream.__call__`.
    """
    return cast(Outputs, model.apply({"params": params}, content, query, outputs, cache))


def logits(params, config: ModelConfig, hidden, precision=None):
    """Returns scores over the vocabulary, float32 [..., V], of final hidden states [..., D]."""
    if config.tie_embeddings:
        return logits_of_table(params["embed"], config, hidden, precision)
    # Products of the computation's dtype, summed in float32: logits are never rounded.
    head_DV = params["head"].astype(hidden.dtype)
    scores = jnp.einsum(
        "...D,DV->...V", hidden, head_DV, precision=precision, preferred_element_type=jnp.float32
    )
    return softcap(scores, config.final_softcap)


def logits_of_table(table_VD, config: ModelConfig, hidden, precision=None):
    """Returns `logits` [..., V] by a head that is laid out as an embedding table, [V, D].

    The table comes first in the product: with few rows CPUs then read it in place, without packing it.
    """
    table_VD = table_VD.astype(hidden.dtype)
    scores = jnp.einsum(
        "VD,...D->...V", table_VD, hidden, precision=precision, preferred_element_type=jnp.float32
    )
    return softcap(scores, config.final_softcap)


def init_params(config: ModelConfig, key, dtype=jnp.float32):
    """Draws a parameter tree: nested dicts of arrays of `dtype`, shapes as in `docs/formats.md`."""
    params = nn.unbox(jax.jit(functools.partial(_init, config))(key))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(config: ModelConfig, dtype=jnp.float32):
    """Returns the tree of `init_params` as `jax.ShapeDtypeStruct`s: nothing is computed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(_declared(config)))


def logical_axes(config: ModelConfig):
    """Returns the tree of `init_params` with each array's axis names as a `PartitionSpec`."""
    return nn.get_partition_spec(_declared(config))


def param_shardings(mesh, config: ModelConfig):
    """Returns the tree of `init_params` as `NamedSharding`s on a mesh."""
    return axes_shardings(mesh, logical_axes(config), abstract_params(config))


def init_cache(config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> Cache:
    """Returns an empty cache, [L, B, K, slots, H], sharded by example and kv head on a mesh."""
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_size)
    axes = ("layers", "batch", "kv_heads", "length", "head_size")
    key, value = (constrain(jnp.zeros(shape, dtype), axes) for _ in range(2))
    return Cache(key, value, jnp.zeros((batch,), jnp.int32))


@functools.lru_cache(maxsize=16)
def _declared(config):
    """Returns what the model declares, boxed with axis names; tracing it takes a third of a second."""
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def _init(config, key):
    # The shapes of parameters don't depend on the rows: one of each stream is enough.
    one = jnp.zeros((1, 1), jnp.int32)
    content, query = (Rows(positions=one, start=one, limit=one, tokens=tokens) for tokens in (one, None))
    return TwoStream(config).init(key, content, query)["params"]


def _parameter(module: nn.Module, name, axes, shape, scale=None) -> jax.Array:
    """Declares a parameter: its logical axes, its shape, and ones (no scale), zeros or N(0, scale^2)."""
    initializer = functools.partial(_normal, scale)
    if not scale:
        initializer = nn.initializers.ones if scale is None else nn.initializers.zeros
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(initializer, axes), shape))


def _norm(module, name, x, axes=("norm",), shape=None):
    """Applies the model's kind of norm, with the scale `name`, and a bias if it is LayerNorm."""
    c = module.config
    shape, offset = shape or (c.d_model,), c.norm == "rms_offset"
    scale = _parameter(module, name, axes, shape, 0.0 if offset else None)
    if c.norm == "layer":
        return layer_norm(x, scale, _parameter(module, f"{name}_bias", axes, shape, 0.0), c.norm_eps)
    return rms_norm(x, scale.astype(module.dtype), c.norm_eps, offset)


def _normal(scale, key, shape, dtype=jnp.float32):
    """Draws N(0, scale^2) block by block: XLA compiles a small random draw three times faster on CPU."""
    # Each block has its own key, so the numbers don't depend on how the array is sharded.
    size = math.prod(shape)
    blocks = jnp.arange(-(-size // _DRAW_BLOCK))
    drawn = jax.lax.map(
        lambda block: jax.random.normal(jax.random.fold_in(key, block), (_DRAW_BLOCK,)), blocks
    )
    return (scale * drawn.reshape(-1)[:size]).reshape(shape).astype(dtype)


def _attention_inputs(config, content, query) -> AttentionInputs:
    streams = [content] if query is None else [content, query]
    positions_BR, start_BR, limit_BR = (
        jnp.concatenate([getattr(rows, field) for rows in streams], axis=1)
        for field in ("positions", "start", "limit")
    )
    if config.positions == "learned":
        return AttentionInputs(start=start_BR, limit=limit_BR, cos=None, sin=None)
    # Made once, outside of the layers' scan, which picks its table by index.
    tables = []
    for frequencies, factor in frequency_tables(config):
        cos, sin = rotary_angles(positions_BR, frequencies)
        tables.append((cos, sin) if factor == 1.0 else (factor * cos, factor * sin))
    cos, sin = (jnp.stack(parts) for parts in zip(*tables, strict=True))
    return AttentionInputs(start=start_BR, limit=limit_BR, cos=cos, sin=sin)
