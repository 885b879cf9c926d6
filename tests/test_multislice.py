"""Several slices: the data axis alone goes from one to the next; the numbers are those of one slice."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.model.sharding import make_mesh, number_of_slices
from a3_jax.pods.local import start_child
from a3_jax.training import setup
from a3_jax.training.config import RunConfig
from a3_jax.training.train import train
from tests.multislice_run import config_of
from tests.prepared_fixtures import make_prepared, rows

COMPILE = """
import dataclasses, json
from a3_jax.errors import InputError
from a3_jax.model.sharding import make_mesh
from a3_jax.pods.aot_compile import compile_step, topology_devices
from a3_jax.training.config import RunConfig
from a3_jax.training.setup import open_mesh
from tests.multislice_run import config_of
from tests.training_fixtures import TINY

run = RunConfig.from_config(config_of("rows"))
chips = topology_devices("v5e:2x2", slices=2)
mesh = open_mesh(run, chips[::2] + chips[1::2])
slices = [[chip.slice_index for chip in row.flat] for row in mesh.devices]
told = {"shape": dict(mesh.shape), "slices": slices}
try:
    make_mesh({"fsdp": 8}, chips)
except InputError as error:
    told["refused"] = str(error)
one = topology_devices("v5e:4x4")
tensor = make_mesh({"fsdp": 2, "tensor": 8}, one).devices.reshape(2, 8)
told["hosts"] = [sorted({chip.process_index for chip in row}) for row in tensor]
tiny = dataclasses.replace(TINY, num_layers=1)
told["program"] = compile_step(run, tiny, mesh, "ar").as_text()
print(json.dumps(told))
"""


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def train_as_slices(data, workdir):
    """What each of two processes of two devices prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "A3_SLICES_ARE_PROCESSES": "1"}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "A3_NUM_PROCESSES": "2"}
    environment["A3_COMPILATION_CACHE"] = f"{workdir}-programs"
    logs = [f"{workdir}-{number}.log" for number in range(2)]
    command = [sys.executable, "-m", "tests.multislice_run", data, str(workdir)]
    processes = []
    for number, log in enumerate(logs):
        with open(log, "wb") as file:
            processes.append(start_child(command, environment | {"A3_PROCESS_ID": str(number)}, file))
    try:
        statuses = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    told = [pathlib.Path(log).read_text() for log in logs]
    assert statuses == [0, 0], told
    return [json.loads(next(line for line in text.splitlines() if line[:1] == "{")) for text in told]


@pytest.mark.drill
def test_two_slices_train_as_one_does(tmp_path):
    """Two processes as slices: the same losses to 1e-6, and a checkpoint that one process goes on from."""
    data = make_prepared(tmp_path / "data", rows(40, seq_len=24))
    for told in train_as_slices(data, tmp_path / "two"):
        assert told == {"processes": [[0], [1]], "devices": 4}
    config = config_of(data) | {"mesh": {"data": 2, "fsdp": 2, "tensor": 1}}
    train(config, tmp_path / "one", devices=jax.devices()[:4])
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)
    assert len(one) == 4 and len(set(one)) == 4
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
    train(config_of(data), tmp_path / "two", devices=jax.devices()[:1])  # from step 2
    assert len(losses(tmp_path / "two")) == 4
    np.testing.assert_allclose(losses(tmp_path / "two"), two, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def compiled():
    """The step compiled for two slices, in a process of its own for libtpu's sake."""
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_data_alone_crosses_slices(compiled):
    """Whatever the order in which the devices are named; `data=0` is the number of slices."""
    assert compiled["shape"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert compiled["slices"] == [[0] * 4, [1] * 4]
    assert "all-reduce" in compiled["program"]


def test_a_mesh_that_would_cross_slices_otherwise_is_refused(compiled):
    assert compiled["refused"] == (
        "mesh: data is 1: on 2 slices it must be a multiple of 2, as it alone goes from one to the next"
    )


def test_an_axis_lies_on_neighbouring_chips(compiled):
    """Eight chips of a v5e:4x4 are half of it, two hosts, and not the first eight of some other order."""
    assert compiled["hosts"] == [[0, 1], [2, 3]]


def test_processes_stand_for_slices_only_where_that_is_said(monkeypatch):
    devices = jax.devices()
    assert number_of_slices(devices) == 1 and number_of_slices(devices, slices_are_processes=True) == 1
    assert list(make_mesh({"data": 2, "fsdp": 4}).devices.flat) == devices

    class Elsewhere:
        process_index, platform = 1, "cpu"

    both = [devices[0], Elsewhere()]
    assert number_of_slices(both) == 1 and number_of_slices(both, slices_are_processes=True) == 2
    run = RunConfig.from_config(config_of("rows"))
    monkeypatch.setenv("A3_SLICES_ARE_PROCESSES", "1")
    assert setup.open_mesh(run, devices).shape["data"] == 1
    with pytest.raises(InputError, match="on 2 slices it must be a multiple of 2"):
        make_mesh({"fsdp": 2}, both, slices_are_processes=True)
