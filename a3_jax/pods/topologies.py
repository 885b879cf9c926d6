"""The pods that a run may use, and how it is laid out over their chips."""

import dataclasses
import math
from collections.abc import Mapping

from a3_jax.errors import InputError, nearest

CHIPS_PER_HOST = 4
_RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
# The type's number counts chips, on v5p TensorCores: two a chip. Slices of up to four chips have one host.
_SLICES = {
    "v5e:1x1": ("v5litepod-1", 1), "v5e:2x2": ("v5litepod-4", 4), "v5e:2x4": ("v5litepod-8", 8),
    "v5e:4x4": ("v5litepod-16", 16), "v5e:4x8": ("v5litepod-32", 32), "v5e:8x8": ("v5litepod-64", 64),
    "v5e:8x16": ("v5litepod-128", 128), "v5e:16x16": ("v5litepod-256", 256),
    "v5p:2x2x1": ("v5p-8", 4), "v5p:2x2x2": ("v5p-16", 8),
    "v5p:2x2x4": ("v5p-32", 16), "v5p:2x4x4": ("v5p-64", 32), "v5p:4x4x4": ("v5p-128", 64),
    "v5p:4x4x8": ("v5p-256", 128),
    "v6e:1x1": ("v6e-1", 1), "v6e:2x2": ("v6e-4", 4), "v6e:2x4": ("v6e-8", 8),
    "v6e:4x4": ("v6e-16", 16), "v6e:4x8": ("v6e-32", 32),
    "v6e:8x8": ("v6e-64", 64), "v6e:8x16": ("v6e-128", 128), "v6e:16x16": ("v6e-256", 256),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice: `name` such as v5e:4x4, `tpu_type` such as v5litepod-16, `chips`, `hosts`, `runtime`."""

    name: str
    tpu_type: str
    chips: int
    hosts: int
    runtime: str

    @property
    def accelerator(self) -> str:
        """The kind of chip, as `model.accelerators` calls it."""
        return self.name.split(":")[0]


@dataclasses.dataclass(frozen=True)
class Pod:
    """Equal slices that train one run, joined by the data-centre network: `slice`, and how many `slices`."""

    slice: Topology
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slice.chips * self.slices

    def __str__(self) -> str:
        return self.slice.name if self.slices == 1 else f"{self.slices} x {self.slice.name}"


def find_topology(name, *, file=None) -> Topology:
    """Returns the slice of a topology (v5e:4x4) or TPU type (v5litepod-16)."""
    by_type = {tpu_type: key for key, (tpu_type, _) in _SLICES.items()}
    key = by_type.get(name, name)
    if key not in _SLICES:
        raise InputError(
            f"unknown topology {name!r}{nearest(name, [*_SLICES, *by_type])}", file=file, field="topology"
        )
    tpu_type, chips = _SLICES[key]
    hosts = max(1, chips // CHIPS_PER_HOST)
    return Topology(key, tpu_type, chips, hosts, _RUNTIMES[key.split(":")[0]])


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
