"""Peak rates and memory of accelerators, as their vendors publish them, by the names that JAX uses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

GIB = 2**30
_GOOGLE = "https://docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One chip: a TPU with all its cores, or a GPU.

    Attributes:
      name: common name; for a TPU the first part of a topology's name ("v5e:4x4").
      kinds: `device_kind` of its JAX devices.
      peak_flops: bfloat16 FLOPs per second, dense (half of what is quoted "with sparsity").
      memory_bytes: size of its high-bandwidth memory.
      memory_bandwidth: bytes per second to and from that memory.
      link_bandwidth: bytes per second over all links to other chips (ICI, NVLink), both directions together.
      source: the vendor's document.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    source: str


ACCELERATORS = (
    Accelerator("v4", ("TPU v4",), 275e12, 32 * GIB, 1200e9, 600e9,
                _GOOGLE + "v4; links: arXiv 2304.01433, table 4, 6 of 50 GB/s each way"),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 400e9, _GOOGLE + "v5e"),
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 1200e9, _GOOGLE + "v5p"),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 800e9, _GOOGLE + "v6e"),
    Accelerator("tpu7x", ("TPU7x",), 2307e12, 192 * GIB, 7380e9, 1200e9, _GOOGLE + "tpu7x"),
    Accelerator("A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * 10**9, 1555e9, 600e9,
                "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
    Accelerator("A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 10**9, 2039e9, 600e9,
                "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
    Accelerator("H100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80 * 10**9, 3350e9, 900e9,
                "NVIDIA H100 Tensor Core GPU architecture, SXM5"),
    Accelerator("H200", ("NVIDIA H200",), 989.4e12, 141 * 10**9, 4800e9, 900e9,
                "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    Accelerator("B200", ("NVIDIA B200",), 2250e12, 180 * 10**9, 8000e9, 1800e9,
                "NVIDIA Blackwell architecture technical brief, HGX B200; DGX B200 data sheet"),
)  # fmt: skip


def find_accelerator(device_kind: str) -> Accelerator | None:
    """Returns the chip that a JAX device with this `device_kind` is or is part of; None if unknown."""
    return next((chip for chip in ACCELERATORS if device_kind in chip.kinds), None)


def count_chips(devices: Sequence[Any]) -> int:
    """Counts the chips of JAX devices: the cores of a TPU chip may be one device or two."""
    chips = {
        (getattr(device, "slice_index", 0), *device.coords) if device.platform == "tpu" else device.id
        for device in devices
    }
    return len(chips)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Returns dense bfloat16 FLOPs per second of all devices' chips together; None if one is unknown."""
    chips = {find_accelerator(device.device_kind) for device in devices}
    chip = chips.pop()
    return None if chips or chip is None else chip.peak_flops * count_chips(devices)
