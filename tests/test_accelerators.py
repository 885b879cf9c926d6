"""The table of chips: names as the TPU compiler gives them, peaks as JAX's own table has them."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from a3_jax.model.accelerators import ACCELERATORS, count_chips, find_accelerator, peak_flops

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def device(kind, chip, core=0, slice_index=0):
    return SimpleNamespace(platform="tpu", device_kind=kind, coords=(chip, 0, 0), core_on_chip=core,
                           slice_index=slice_index, id=99)  # fmt: skip


def test_names_and_kinds_are_of_one_chip_each():
    for names in (
        [chip.name for chip in ACCELERATORS],
        [kind for chip in ACCELERATORS for kind in chip.kinds],
    ):
        assert len(names) == len(set(names))
    assert all(chip.source and find_accelerator(kind) is chip for chip in ACCELERATORS for kind in chip.kinds)


def test_an_unknown_device_has_no_peak():
    assert find_accelerator("cpu") is None
    assert peak_flops(jax.devices()) is None
    assert peak_flops([device("TPU v5 lite", 0), device("TPU v9", 1)]) is None
    assert peak_flops([device("TPU v5 lite", 0), device("TPU v4", 1)]) is None


def test_two_cores_are_one_chip():
    cores = [device("TPU7x", chip, core, piece) for chip in (0, 1) for core in (0, 1) for piece in (0, 1)]
    assert count_chips(cores) == 4
    assert peak_flops(cores) == 4 * 2307e12
    gpus = [SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", id=index) for index in range(8)]
    assert peak_flops(gpus) == 8 * 989.4e12


def test_peaks_are_those_of_the_table_in_jax():
    """JAX's table of TPUs was written by others, from the same sheets, in three digits, a core at a time."""
    from jax._src.pallas.mosaic import tpu_info

    for name in TPUS:
        chip = next(chip for chip in ACCELERATORS if chip.name == name)
        versions = {tpu_info.chip_version_from_device_kind(kind) for kind in chip.kinds}
        assert len(versions) == 1 and None not in versions
        (version,) = versions
        core = tpu_info._get_tpu_info_impl(version, 1)
        cores = version.num_physical_tensor_cores_per_chip
        theirs = [core.bf16_ops_per_second, core.hbm_capacity_bytes]
        np.testing.assert_allclose(np.array([chip.peak_flops, chip.memory_bytes]) / cores, theirs, rtol=0.01)
        # There v5p has 2.46e12 bytes a second, Google's page says 2765e9.
        np.testing.assert_allclose(chip.memory_bandwidth / cores, core.mem_bw_bytes_per_second, rtol=0.13)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_kinds_and_chips_are_those_of_the_compiler():
    """Topologies of four chips each, described by libtpu without a TPU, in a process of its own."""
    code = f"""
import json
from jax.experimental import topologies
from a3_jax.model.accelerators import count_chips, find_accelerator
found = {{}}
for name, topology in {TPUS}.items():
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    found[name] = [find_accelerator(devices[0].device_kind).name, count_chips(devices)]
print(json.dumps(found))
"""
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                            timeout=300, check=True)  # fmt: skip
    assert json.loads(result.stdout.splitlines()[-1]) == {name: [name, 4] for name in TPUS}
