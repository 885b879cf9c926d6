"""Memory and time of a train step by formula: what a search looks at before it compiles anything.

Memory, bytes of a chip:

    parameters     4 P / (fsdp tensor)                              P numbers in float32
    optimiser      AdamW (4 + 4) P, with bfloat16 first moments (2 + 4) P, over the same chips
    gradient       4 P over the same chips, twice with microbatches: the piece's and the sum
    activations    rows x length x what the layers keep per token (`flops.kept_bytes_per_token`)
    layer          rows x length x 2 streams x 6 (D + F): gate, up, their product, gradients of these
    head           gathered head V D and its float32 gradient, logits of a chunk of rows; a table of its
                   own for embeddings is gathered as well

It leaves out copies, padding to tiles and what is gathered early: too small by some tenths of a GiB at the
sizes of the paper's models; `docs/pods.md` holds it against the compiler.

Time, at least (Williams et al., Roofline, 2009, doi 10.1145/1498765.1498785), all at full rate at once:

    time >= max(FLOPs / peak, bytes of memory / bandwidth, sent within a slice / ICI, sent beyond / DCN)

Rates are those of `model.accelerators`. A chip's links carry half of their bytes in each direction. DCN is
the published bandwidth of a pod over its chips: v5e 6.4 Tbit/s over 256 chips, v6e 25.6 Tbit/s over 256
(docs.cloud.google.com/tpu/docs/v5e and v6e); for v5p an assumption, 6.25 GB/s per chip (200 Gbit/s per host).
"""

import dataclasses
from collections.abc import Mapping

from a3_jax.model.accelerators import ACCELERATORS, Accelerator
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import (
    TRAINING,
    forward_bytes,
    forward_flops,
    kept_bytes_per_token,
    parameter_count,
    train_step_flops,
    visible_pairs,
)
from a3_jax.pods.topologies import ParallelConfig, Pod
from a3_jax.training.config import RunConfig

DCN_BANDWIDTH = {"v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9}  # bytes per second that a chip sends


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step that each part takes by itself at its full rate."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def bound(self) -> float:
        """Seconds of a step at least."""
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """Returns the name of the largest of the four."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def accelerator_of(pod: Pod) -> Accelerator:
    """Returns the chip of a pod."""
    return next(chip for chip in ACCELERATORS if chip.name == pod.slice.accelerator)


def step_flops(run: RunConfig, model: ModelConfig, objective: str = "any_order") -> float:
    """Model FLOPs of a step over the whole batch; what remat computes again is not among them."""
    return train_step_flops(model, run.seq_len, objective=objective).total * run.batch_size


def estimate_times(
    run: RunConfig,
    model: ModelConfig,
    layout: ParallelConfig,
    pod: Pod,
    *,
    ici: float,
    dcn: float,
    objective: str,
) -> Times:
    """Returns the times of a step.

    Args:
      ici, dcn: bytes that a chip sends in a step, within its slice and beyond.
      objective: the stage's.
    """
    chip = accelerator_of(pod)
    flops = step_flops(run, model, objective) + _computed_again(run, model, layout, objective)
    return Times(
        compute=flops / (chip.peak_flops * pod.chips),
        memory=_memory_bytes(run, model, layout, objective) / chip.memory_bandwidth,
        ici=ici / (chip.link_bandwidth / 2),
        dcn=dcn / DCN_BANDWIDTH[chip.name],
    )


def estimate_traffic(
    run: RunConfig, model: ModelConfig, layout: ParallelConfig, pod: Pod
) -> tuple[float, float]:
    """Bytes that a chip sends in a step by formula, within its slice and beyond: for a search.

    Every microbatch gathers the weights twice (for the backward pass again) and scatters their gradient, all
    in the dtype of the computation; data sums gradients once a microbatch; tensor sums each layer's two
    outputs of both streams, forward and backward.
    """
    itemsize = 2 if run.dtype == "bfloat16" else 4
    numbers = parameter_count(model) / layout.tensor
    fsdp, tensor = (1 - 1 / size for size in (layout.fsdp, layout.tensor))
    ici = layout.microbatches * numbers * 3 * itemsize * fsdp
    rows = layout.rows(run.batch_size) * layout.microbatches * run.seq_len
    ici += 2 * tensor * 8 * model.num_layers * rows * model.d_model * itemsize
    summed = layout.microbatches * 2 * (1 - 1 / layout.data) * itemsize * numbers / layout.fsdp
    return (ici, summed) if pod.slices > 1 else (ici + summed, 0.0)


def describe(
    times: Times, run: RunConfig, model: ModelConfig, pod: Pod, objective: str
) -> Mapping[str, object]:
    """Returns the times, the highest utilisation and the least chip-hours that follow from them."""
    chip = accelerator_of(pod)
    utilization = step_flops(run, model, objective) / (times.bound * chip.peak_flops * pod.chips)
    return {
        **{f"{name}_seconds": seconds for name, seconds in dataclasses.asdict(times).items()},
        "step_seconds_at_least": times.bound,
        "limited_by": times.limit,
        "utilization_at_most": utilization,
        "tokens_per_second_at_most": run.batch_size * run.seq_len / times.bound,
        "chip_hours_at_least": times.bound * run.total_steps * pod.chips / 3600,
        "rates": {
            "peak_flops": chip.peak_flops, "memory_bandwidth": chip.memory_bandwidth,
            "ici_sent": chip.link_bandwidth / 2, "dcn_sent": DCN_BANDWIDTH[chip.name], "source": chip.source,
        },
    }  # fmt: skip


def _computed_again(run, model, layout, objective) -> float:
    """FLOPs of the layers' second forward pass; "dots" keeps the results of all its products."""
    if layout.remat not in ("block", "offload"):
        return 0.0
    length = run.seq_len
    if objective == "any_order":
        content, query = visible_pairs(length)
        forward = forward_flops(model, length, length, content_pairs=content, query_pairs=query)
    else:
        pairs, _ = visible_pairs(length, length if objective == "masked_diffusion" else 1)
        forward = forward_flops(model, length, content_pairs=pairs, outputs="content")
    heads = forward.content.head + forward.query.head
    return (forward.total - heads) * run.batch_size


def _memory_bytes(run, model, layout, objective) -> float:
    """Bytes to and from a chip's memory: products of every microbatch, and what the optimiser touches."""
    itemsize = 2 if run.dtype == "bfloat16" else 4
    query = run.seq_len if objective == "any_order" else 0
    forward = forward_bytes(
        model, run.seq_len, query, batch=layout.rows(run.batch_size), itemsize=itemsize,
        outputs="query" if query else "content",
    )  # fmt: skip
    products = forward.total * TRAINING * layout.microbatches / layout.tensor
    state = parameter_count(model) * 4 / (layout.fsdp * layout.tensor)
    return products + state * (7 if run.optimizer == "adamw" else 4)  # read and written, the gradient read


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
