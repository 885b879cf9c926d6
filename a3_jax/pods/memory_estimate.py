"""Bytes of a chip in a train step, by formula.

    parameters     4 P / (fsdp tensor)                              P numbers in float32
    optimiser      AdamW (4 + 4) P, with bfloat16 first moments (2 + 4) P, over the same chips
    gradient       4 P over the same chips, twice with microbatches: the piece's and the sum
    activations    rows x length x what the layers keep of a token (`flops.kept_bytes_per_token`)
    layer          rows x length x 2 streams x 6 (D + F): gate, up, their product, gradients of these
    head           gathered head V D and its float32 gradient, logits of a chunk of rows; a table of its
                   own for embeddings is gathered as well

What the formula leaves out (copies, padding to tiles, what is gathered ahead) makes it too small by some
tenths of a GiB at the sizes of the paper's models; `docs/pods.md` holds it against the compiler.
"""

import dataclasses

from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import kept_bytes_per_token, parameter_count
from a3_jax.pods.parallel_config import ParallelConfig
from a3_jax.training.config import RunConfig

CHUNK_ROWS = 1024  # of the loss on accelerators, `training.loss`
_LAYER_ARRAYS = 6


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    layer: int
    head: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate_memory(
    run: RunConfig, model: ModelConfig, layout: ParallelConfig, objective="any_order"
) -> Memory:
    """Bytes of a chip in a run's step.

    Args:
      run: optimiser, batch, length and dtype are read; mesh, microbatches and remat are the layout's.
      objective: of the stage, "any_order" has two streams.
    """
    parts = layout.fsdp * layout.tensor
    numbers, itemsize = parameter_count(model), 2 if run.dtype == "bfloat16" else 4
    tokens, streams = layout.rows(run.batch_size) * run.seq_len, 2 if objective == "any_order" else 1
    moments = (2 if run.moment_dtype == "bfloat16" else 4) + 4
    kept = _kept(model, layout.remat, itemsize) * streams / 2
    chunk = min(CHUNK_ROWS, tokens)
    table = model.vocab_size * model.d_model / layout.tensor
    head = table * (itemsize + 4) + chunk * model.vocab_size / layout.tensor * 4
    if not model.tie_embeddings:
        head += table * itemsize
    width = model.d_model + model.mlp_size / layout.tensor
    return Memory(
        parameters=round(4 * numbers / parts),
        optimizer=round(moments * numbers / parts) if run.optimizer == "adamw" else 0,
        gradients=round(4 * numbers / parts * (1 if layout.microbatches == 1 else 2)),
        activations=round(tokens * kept / (layout.tensor if layout.remat in ("dots", "none") else 1)),
        layer=round(tokens * streams * _LAYER_ARRAYS * width * itemsize),
        head=round(head),
    )


def _kept(model: ModelConfig, remat: str, itemsize: int) -> float:
    """Bytes that both streams' layers keep of a token on the chip."""
    if remat == "offload":
        return 0.0
    if remat != "none":
        return kept_bytes_per_token(model, remat, itemsize)
    # Besides what "dots" keeps: results of both norms and of both halves of the block, rotated heads, and
    # of the mlp what the activation gives and takes. What of it XLA computes again is its own affair.
    row = 4 * model.d_model + 2 * model.num_heads * model.head_size + 2 * model.mlp_size
    return kept_bytes_per_token(model, "dots", itemsize) + (2 * model.num_layers - 1) * row * itemsize
