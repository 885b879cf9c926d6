"""The two-stream model's cost: floating-point operations and bytes, a formula for each part.

    FLOPs per row           q, o      k, v       attention     mlp      head
    content, layers 1..L-1   4 D N H   4 D K H   4 N H pairs   6 D F      -
    content, last layer        -       4 D K H       -           -        -
    query, every layer       4 D N H     -       4 N H pairs   6 D F    2 D V (once)

Without a gate the mlp costs 4 D F. A multiply-add counts as two; `pairs` is the number of keys that the row
sees; looking up an embedding costs nothing. The last layer's content half gives keys and values alone, as
long as only the query output is wanted (`two_stream.Block.first_output`). A training step costs three times
its forward pass: the gradient of a matrix product is two more of the same size. These are the model FLOPs of
Chowdhery et al. (PaLM, arXiv 2204.02311, appendix B): masked pairs, what remat computes again and
elementwise work don't count.
"""

import dataclasses

from a3_jax.model.config import ModelConfig

TRAINING = 3  # the forward pass, and for each of its products the gradients of both factors


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs or bytes by part, all layers together."""

    projections: float = 0.0  # q, k, v and o
    attention: float = 0.0  # scores, and their product with the values
    mlp: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.mlp + self.head

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Cost":
        return Cost(*(factor * part for part in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class StreamCosts:
    """FLOPs of the content rows and of the query rows."""

    content: Cost
    query: Cost

    @property
    def total(self) -> float:
        return self.content.total + self.query.total

    def __mul__(self, factor: float) -> "StreamCosts":
        return StreamCosts(self.content * factor, self.query * factor)


def visible_pairs(length: int, group_size: int = 1) -> tuple[float, float]:
    """Counts the (row, key) pairs that the content rows and the query rows of one document see.

    A content row sees its own group and those before, a query row only those before. In any order
    that is (T^2 + sum g^2) / 2 and (T^2 - sum g^2) / 2 over groups of g tokens: (T + g) / 2 and
    (T - g) / 2 per row, if g divides T.
    """
    groups, rest = divmod(length, group_size)
    own = groups * group_size**2 + rest**2
    return (length**2 + own) / 2, (length**2 - own) / 2


def forward_flops(
    config: ModelConfig,
    content_rows: int,
    query_rows: int = 0,
    *,
    content_pairs: float,
    query_pairs: float = 0.0,
    outputs: str = "query",
) -> StreamCosts:
    """Returns the FLOPs of one sequence's forward pass, with the logits of the rows that are wanted.

    Args:
      config: the model's.
      content_rows, query_rows: rows of each stream.
      content_pairs, query_pairs: the pairs that they see in one layer, see `visible_pairs`.
      outputs: "query", "content" or "both", as in `two_stream.TwoStream`.
    """
    c, width = config, config.num_heads * config.head_size
    if outputs == "content":
        query_rows, query_pairs = 0, 0.0

    def stream(rows, pairs, layers, wanted):
        return Cost(
            projections=4.0 * c.d_model * width * rows * layers,
            attention=4.0 * width * pairs * layers,
            mlp=2.0 * _mlp_matrices(c) * c.d_model * c.mlp_size * rows * layers,
            head=2.0 * c.d_model * c.vocab_size * rows * wanted,
        )

    whole_layers = c.num_layers - (outputs == "query")
    keys_values = 4.0 * c.d_model * c.num_kv_heads * c.head_size * content_rows * c.num_layers
    return StreamCosts(
        content=stream(content_rows, content_pairs, whole_layers, outputs != "query") + Cost(keys_values),
        query=stream(query_rows, query_pairs, c.num_layers, True),
    )


def train_step_flops(
    config: ModelConfig, length: int, *, group_size: int = 1, objective: str = "any_order"
) -> StreamCosts:
    """Returns the FLOPs of a training step on one sequence: one document of `length` tokens.

    Args:
      config: the model's.
      length: tokens, as many rows of each stream.
      group_size: tokens predicted together. It hardly matters: what content rows see more, query rows
        see less, except in the last layer.
      objective: "any_order", both streams; "ar" and "masked_diffusion", the content stream alone with
        the head on every row, of which the second sees all.
    """
    if objective != "any_order":
        pairs, _ = visible_pairs(length, length if objective == "masked_diffusion" else 1)
        return forward_flops(config, length, content_pairs=pairs, outputs="content") * TRAINING
    content_pairs, query_pairs = visible_pairs(length, group_size)
    forward = forward_flops(config, length, length, content_pairs=content_pairs, query_pairs=query_pairs)
    return forward * TRAINING


def step_ratio(config: ModelConfig, length: int, group_size: int = 1) -> float:
    """Returns the FLOPs of the two-stream step over those of the model's left-to-right step."""
    both = train_step_flops(config, length, group_size=group_size)
    return both.total / train_step_flops(config, length, objective="ar").total


def forward_bytes(
    config: ModelConfig,
    content_rows: int,
    query_rows: int = 0,
    *,
    batch: int = 1,
    itemsize: int = 2,
    outputs: str = "query",
) -> Cost:
    """Returns the least bytes that a forward pass moves: each product reads its factors, writes its result.

    Weights are read once per batch, both streams together; attention reads q, k and v and writes its
    output, no scores; logits are float32. Training moves `TRAINING` times as much, like its FLOPs,
    and the optimiser's state besides.

    Args:
      config: the model's.
      content_rows, query_rows: rows of each stream in one sequence.
      batch: sequences.
      itemsize: bytes per number of the computation, 2 in bfloat16.
      outputs: "query", "content" or "both".
    """
    c, width, kv_width = config, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    content, query = batch * content_rows, batch * query_rows * (outputs != "content")

    def product(rows, inner, outer, outer_itemsize=itemsize):
        return float((rows * inner + inner * outer) * itemsize + rows * outer * outer_itemsize)

    def layer(rows):
        return Cost(
            projections=product(rows, c.d_model, width) + product(rows, width, c.d_model)
            + 2 * product(content, c.d_model, kv_width),
            attention=2.0 * (rows * width + content * kv_width) * itemsize,
            mlp=(_mlp_matrices(c) - 1) * product(rows, c.d_model, c.mlp_size)
            + product(rows, c.mlp_size, c.d_model),
        )  # fmt: skip

    wanted = content * (outputs != "query") + query
    last = layer(wanted) + Cost(head=product(wanted, c.d_model, c.vocab_size, outer_itemsize=4))
    return layer(content + query) * (c.num_layers - 1) + last


def parameter_count(config: ModelConfig) -> int:
    """Counts the model's parameters, the query vector included."""
    c, heads, kv_heads = config, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    norm = c.d_model * (2 if c.norm == "layer" else 1)
    layer = 2 * (heads + kv_heads) * c.d_model + _mlp_matrices(c) * c.d_model * c.mlp_size
    layer += norm * (4 if c.norm_place == "both" else 2)
    layer += {"none": 0, "head": 2 * c.head_size, "full": heads + kv_heads}[c.qk_norm]
    layer += c.qkv_bias * (heads + 2 * kv_heads) + c.out_bias * c.d_model
    layer += c.mlp_bias * ((_mlp_matrices(c) - 1) * c.mlp_size + c.d_model)
    tables = c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    tables += c.max_length * c.d_model * (c.positions == "learned")
    return c.num_layers * layer + tables + norm + c.d_model


def _mlp_matrices(config: ModelConfig) -> int:
    return 3 if config.gated_mlp else 2


def kept_bytes_per_token(config: ModelConfig, remat: str, itemsize: int = 2) -> int:
    """Returns the bytes that the two-stream layers keep per token for the backward pass of a training step.

    Args:
      config: the model's.
      remat: "block" and "offload", the two rows' inputs of each layer, on the chip or in the host's
        memory; "dots", besides those the results q, k, v, o, gate and up, attention's output and its
        float32 log-normalisers (of the last layer's content row k and v alone). Of any other policy the
        compiler decides what is kept: `ValueError`.
      itemsize: bytes per number of the computation.
    """
    c = config
    inputs = 2 * c.num_layers * c.d_model
    if remat in ("block", "offload"):
        return inputs * itemsize
    if remat != "dots":
        raise ValueError(f"no formula for what remat={remat!r} keeps")
    row = (
        2 * c.num_heads * c.head_size + c.d_model + (_mlp_matrices(c) - 1) * c.mlp_size
    ) * itemsize + 4 * c.num_heads
    keys_values = 2 * c.num_kv_heads * c.head_size * itemsize
    return inputs * itemsize + (2 * c.num_layers - 1) * row + c.num_layers * keys_values
