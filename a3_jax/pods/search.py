"""Which layout of a run fits a pod and is fastest, by formula; the compiler has the last word.

Candidates are all meshes whose axes are powers of two and suit the pod, the model and the batch, with every
number of microbatches and three remat policies. First come those that fit with some room, by the step's lower
bound; between equals the one whose parts take less together, then the one that keeps more.
"""

import dataclasses
from collections.abc import Iterator

from a3_jax.model.config import ModelConfig
from a3_jax.pods.estimates import (
    Memory,
    Times,
    accelerator_of,
    estimate_memory,
    estimate_times,
    estimate_traffic,
)
from a3_jax.pods.topologies import ParallelConfig, Pod
from a3_jax.training.config import RunConfig

ROOM = 0.9  # of a chip's memory that the formula may fill: it is up to a tenth too small
POLICIES = ("dots", "block", "offload")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout with its bytes and seconds by formula."""

    layout: ParallelConfig
    memory: Memory
    times: Times
    fits: bool

    @property
    def rank(self) -> tuple:
        """The smaller the better."""
        t = self.times
        together = t.compute + t.memory + t.ici + t.dcn
        if not self.fits:
            return (True, self.memory.total, 0.0, 0)
        return (False, round(t.bound, 4), round(together, 4), POLICIES.index(self.layout.remat))


def search(run: RunConfig, model: ModelConfig, pod: Pod, objective: str = "any_order") -> list[Candidate]:
    """Returns all candidates, the best first."""
    capacity = accelerator_of(pod).memory_bytes
    found = []
    for layout in layouts(run, model, pod):
        memory = estimate_memory(run, model, layout, objective)
        ici, dcn = estimate_traffic(run, model, layout, pod)
        times = estimate_times(run, model, layout, pod, ici=ici, dcn=dcn, objective=objective)
        found.append(Candidate(layout, memory, times, memory.total <= ROOM * capacity))
    return sorted(found, key=lambda candidate: candidate.rank)


def layouts(run: RunConfig, model: ModelConfig, pod: Pod) -> Iterator[ParallelConfig]:
    """Yields the layouts that suit pod, model and batch; the data axis alone crosses slices."""
    for fsdp in _powers(pod.slice.chips):
        for tensor in _powers(pod.slice.chips // fsdp):
            data = pod.chips // (fsdp * tensor)
            if data * fsdp * tensor != pod.chips or data % pod.slices or not _splits(model, fsdp, tensor):
                continue
            for pieces in range(1, run.batch_size + 1):
                if run.batch_size % pieces == 0 and run.batch_size // pieces % (data * fsdp) == 0:
                    yield from (ParallelConfig(data, fsdp, tensor, pieces, remat) for remat in POLICIES)


def advice(
    run: RunConfig, model: ModelConfig, pod: Pod, now: ParallelConfig, objective: str
) -> list[Candidate]:
    """Layouts that fit by formula when `now` does not: the nearest change first, then the best of all."""
    fitting = [candidate for candidate in search(run, model, pod, objective) if candidate.fits]

    def changes(candidate) -> int:
        mesh = sum(
            getattr(candidate.layout, axis) != getattr(now, axis) for axis in ("data", "fsdp", "tensor")
        )
        more = candidate.layout.microbatches != now.microbatches
        return mesh + more + (candidate.layout.remat != now.remat)

    nearest = min(fitting, key=changes, default=None)  # of equals the first, which is the fastest
    return [] if nearest is None else list(dict.fromkeys([nearest, fitting[0]]))


def _splits(model: ModelConfig, fsdp: int, tensor: int) -> bool:
    """Returns whether the axes divide the model's sizes that lie on them (`model.sharding.Rules`)."""
    sizes = (model.vocab_size, model.num_heads, model.num_kv_heads, model.mlp_size)
    return not model.d_model % fsdp and not any(size % tensor for size in sizes)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]
