"""How a run is cut up: over chips, into microbatches, and by what the backward pass keeps."""

import dataclasses
import math
from collections.abc import Mapping

from a3_jax.pods.topologies import Pod


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """What a search may change without changing what a run learns.

    Attributes:
      data, fsdp, tensor: chips along each axis of the mesh.
      microbatches: pieces of a batch. remat: as of `model.two_stream`.
    """

    data: int
    fsdp: int
    tensor: int
    microbatches: int
    remat: str

    @property
    def flags(self) -> list[str]:
        """The overrides of a config that ask for it."""
        sizes = [f"--config.mesh.{axis}={getattr(self, axis)}" for axis in ("data", "fsdp", "tensor")]
        return [*sizes, f"--config.microbatches={self.microbatches}", f"--config.remat={self.remat}"]

    def rows(self, batch_size: int) -> int:
        """Rows of a microbatch on one chip, or on the chips of its tensor axis together."""
        return batch_size // (self.microbatches * self.data * self.fsdp)


def parallel_config_of(run, pod: Pod) -> ParallelConfig:
    """Returns the layout that a run's config asks for on a pod; its mesh suits it (`spec.check_mesh`)."""
    sizes = mesh_sizes(run.mesh, pod)
    return ParallelConfig(**sizes, microbatches=run.microbatches, remat=run.remat)


def mesh_sizes(mesh: Mapping[str, int], pod: Pod) -> dict[str, int]:
    """Sizes of data, fsdp and tensor, with numbers for -1 (all that remain) and data 0 (the slices)."""
    sizes = {axis: int(mesh.get(axis, 1)) for axis in ("data", "fsdp", "tensor")}
    sizes["data"] = sizes["data"] or pod.slices
    given = math.prod(size for size in sizes.values() if size > 0)
    return {axis: pod.chips // given if size == -1 else size for axis, size in sizes.items()}
