"""What several processes agree on, without several processes; `tests/drills` has them."""

import jax
import pytest
from jax.sharding import PartitionSpec

from a3_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, InputError, RunError
from a3_jax.model.sharding import batch_sharding, make_mesh
from a3_jax.runtime import coordination, distributed


def test_a_difference_is_named_with_both_values(monkeypatch):
    others = [{"config": {"a": 1, "b": [1, 2]}}, {"config": {"a": 2, "b": [1, 3]}}]
    monkeypatch.setattr(coordination, "gather_and_decide", lambda what, mine, decide: others)
    with pytest.raises(InputError, match=r"process 1 has config.a: 1 -> 2; .* has config.b\[1\]: 2 -> 3"):
        coordination.assert_same_on_all_processes(others[0])
    others[1] = others[0]
    coordination.assert_same_on_all_processes(others[0])


def test_flags_of_one_process():
    assert distributed.ProcessFlags(make_mesh()).any_now(True, False) == [True, False]


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
def test_the_rows_of_a_process_are_those_of_its_devices(sizes):
    """Of one process, all; of devices that another process has, the share that the sharding says."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    sharding = batch_sharding(mesh)
    assert distributed.rows_of_process(sharding, 16) == (0, 1)

    class OfSome:
        def __init__(self, devices):
            self.devices = devices

        def addressable_devices_indices_map(self, shape):
            indices = sharding.devices_indices_map(shape)
            return {device: indices[device] for device in self.devices}

    halves = [mesh.devices.reshape(-1)[:4], mesh.devices.reshape(-1)[4:]]
    assert [distributed.rows_of_process(OfSome(half), 16) for half in halves] == [(0, 2), (1, 2)]
    dealt = [mesh.devices.reshape(-1)[[0, 1, 4, 5]], mesh.devices.reshape(-1)[[2, 3, 6, 7]]]
    if "tensor" not in sizes:
        assert [distributed.rows_of_process(OfSome(some), 16) for some in dealt] == [(0, 1), (0, 1)]
    assert sharding.spec == PartitionSpec(("data", "fsdp"))


def test_processes_that_share_rows_have_the_same_part():
    """All devices along the tensor axis: both halves hold every row."""
    sharding = batch_sharding(make_mesh({"data": 1, "fsdp": 1, "tensor": 8}))
    assert distributed.rows_of_process(sharding, 6) == (0, 1)


@pytest.mark.parametrize(
    ("environment", "field"),
    [({}, "A3_NUM_PROCESSES"), ({"A3_NUM_PROCESSES": "2", "A3_PROCESS_ID": "x"}, "A3_PROCESS_ID"),
     ({"A3_NUM_PROCESSES": "2", "A3_PROCESS_ID": "2"}, "A3_PROCESS_ID")],
)  # fmt: skip
def test_an_environment_that_makes_no_sense(monkeypatch, environment, field):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name in ("A3_NUM_PROCESSES", "A3_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        distributed.join()
    assert error.value.field == field


def test_the_status_of_a_process_among_others():
    def status(error):
        return distributed._status(error)[0]

    assert status(InputError("no")) == EXIT_BAD_INPUT
    assert status(RunError(79, "numbers")) == 79
    assert status(jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed")) == EXIT_PREEMPTED
    assert status(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) == 1
    assert status(ValueError("UNKNOWN: Gloo all-reduce failed: connection reset")) == EXIT_PREEMPTED
    assert status(ValueError("a bug")) == 1
