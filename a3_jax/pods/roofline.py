"""How long a step takes at least: arithmetic, memory and networks, each at its full rate, all at once.

    time >= max(FLOPs / peak, bytes of memory / bandwidth, sent within a slice / ICI, sent beyond / DCN)

Rates are those of `model.accelerators`. A chip's links carry half of their bytes in each direction. DCN is
the published bandwidth of a pod over its chips: v5e 6.4 Tbit/s over 256 chips, v6e 25.6 Tbit/s over 256
(docs.cloud.google.com/tpu/docs/v5e and v6e); for v5p an assumption, 6.25 GB/s a chip (200 Gbit/s a host).
Bounds, not predictions: Williams et al., Roofline, 2009, doi 10.1145/1498765.1498785.
"""

import dataclasses
from collections.abc import Mapping

from a3_jax.model.accelerators import ACCELERATORS, Accelerator
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import (
    TRAINING,
    forward_bytes,
    forward_flops,
    parameter_count,
    train_step_flops,
    visible_pairs,
)
from a3_jax.pods.parallel_config import ParallelConfig
from a3_jax.pods.topologies import Pod
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
