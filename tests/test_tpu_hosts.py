"""Hosts of a TPU pod find each other: what jax is told, in faked environments, and whom nobody asks."""

import http.server
import os
import subprocess
import sys
import threading
from unittest import mock

import jax
import pytest

from a3_jax.errors import EXIT_PREEMPTED, InputError, RunError
from a3_jax.runtime import distributed, tpu_hosts

GKE = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a3-0.a3,a3-1.a3"}
ALONE_ON_GKE = GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
TIMES = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 30}
NAMES = (
    "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "A3_NUM_PROCESSES", "A3_PROCESS_ID",
    "TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID",
    "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "GCE_METADATA_IP",
)  # fmt: skip


class MetadataServer(http.server.HTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Metadata)
        self.attributes, self.asked = {}, []


class Metadata(http.server.BaseHTTPRequestHandler):
    server: MetadataServer

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append((name, self.headers["Metadata-Flavor"]))
        text = self.server.attributes.get(name)
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server, of a Google machine with a TPU; `asked`: what it was asked for."""
    with MetadataServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.fixture
def joined(monkeypatch, tmp_path):
    """Joins in an environment of a machine with a TPU; what jax was told, None: nothing."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    told, settings = [], {}
    machine = tmp_path / "product_name"
    machine.write_text("Google Compute Engine\n")
    monkeypatch.setattr(tpu_hosts, "_MACHINE", str(machine))
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: told.append(given))
    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda _: mock.Mock())

    def join(environment, on="tpu,cpu", product=None):
        told.clear()
        monkeypatch.setattr(tpu_hosts, "_platforms", lambda: on)
        if product is not None:
            machine.write_text(product)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert distributed.join() == bool(told)
        if told:
            assert settings["jax_enable_preemption_service"] is False
        return told[0] if told else None

    return join


def test_a_slice_on_gke(joined):
    assert joined(GKE) == {"cluster_detection_method": "gketpu", **TIMES}


def test_several_slices_of_one_host_each_on_gke(joined):
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "a3-0.a3:8080"}
    assert joined(ALONE_ON_GKE | slices) == {"cluster_detection_method": "gketpu", **TIMES}
    with pytest.raises(InputError, match="MEGASCALE_NUM_SLICES: must be a whole number, got 'two'"):
        joined({"MEGASCALE_NUM_SLICES": "two"})


@pytest.mark.parametrize(
    ("named", "port", "address"),
    [("a3-0.a3:1234", {}, "a3-0.a3:1234"), ("a3-0.a3", {}, "a3-0.a3:8482"),
     ("a3-0.a3", {"JAX_COORDINATOR_PORT": "77"}, "a3-0.a3:77")],
)  # fmt: skip
def test_a_manifest_that_names_the_coordinator_alone(joined, named, port, address):
    """jax counts the hosts; an address without a port, which it can't take, gets one."""
    found = joined(GKE | {"JAX_COORDINATOR_ADDRESS": named} | port)
    assert found == {"cluster_detection_method": "gketpu", "coordinator_address": address, **TIMES}


def test_what_the_environment_says_wins(joined):
    named = {"JAX_COORDINATOR_ADDRESS": "h:1", "A3_NUM_PROCESSES": "8", "A3_PROCESS_ID": "7"}
    expected = {"coordinator_address": "h:1", "num_processes": 8, "process_id": 7}
    assert joined(GKE | named) == expected | TIMES
    assert joined({}, on="cpu") == expected | TIMES


def test_one_host_alone_joins_nobody(joined):
    assert joined(ALONE_ON_GKE) is None
    assert joined({"JAX_COORDINATOR_ADDRESS": "a3-0.a3:1234"}) is None, "as a manifest may name it"


OLD, NEW = "u:u:10.0.0.1,u:u:10.0.0.2", "host-0,host-1"


@pytest.mark.parametrize("endpoints", [OLD, NEW])
def test_a_slice_of_tpu_vms(joined, metadata, endpoints):
    metadata.attributes = {"worker-network-endpoints": endpoints}
    assert joined({}) == {"cluster_detection_method": "gcetpu", **TIMES}
    assert set(metadata.asked) == {("worker-network-endpoints", "Google"), ("tpu-env", "Google")}


def test_several_slices_of_one_tpu_vm_each(joined, metadata):
    """Queued resources tell of them on the metadata server."""
    metadata.attributes = {
        "worker-network-endpoints": "u:u:10.0.0.1", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
    }  # fmt: skip
    assert joined({}) == {"cluster_detection_method": "gcetpu", **TIMES}


def test_a_tpu_vm_alone(joined, metadata):
    assert joined({}) is None and metadata.asked, "no such attribute"
    metadata.attributes = {"worker-network-endpoints": "u:u:10.0.0.1", "tpu-env": "ZONE: 'z'\n"}
    assert joined({}) is None


def test_nobody_is_asked_without_a_tpu_or_elsewhere(joined, metadata, monkeypatch):
    metadata.attributes = {"worker-network-endpoints": NEW}
    assert joined({}, on="cpu") is None
    assert joined({}, product="Standard PC (Q35 + ICH9, 2009)\n") is None
    assert joined({"TPU_SKIP_MDS_QUERY": "1"}, product="Google Compute Engine\n") is None
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(tpu_hosts.importlib.util, "find_spec", lambda name: None)
    assert joined({}) is None
    assert metadata.asked == []


def test_a_metadata_server_that_does_not_answer(joined, metadata):
    """A host that would go on alone would wait for the pod's other chips for ever."""
    metadata.shutdown()
    metadata.server_close()
    with pytest.raises(RunError, match=r"the metadata server says nothing of .* refused") as told:
        joined({})
    assert told.value.status == EXIT_PREEMPTED and "TPU_SKIP_MDS_QUERY=1" in str(told.value)


def test_jax_finds_the_pod_that_we_see():
    """Its own detection, in a process that believes in a TPU: two slices of two hosts, and which this is."""
    program = """
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
found = []
def client(address, own, **_):
    found.append((address, own))
    return 1 / 0
distributed._jax.get_distributed_runtime_client = client
from a3_jax.runtime.distributed import join
try:
    join()
except ZeroDivisionError:
    print(*found[0], distributed.global_state.num_processes)
"""
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    slices |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080"}
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    hosts = {"TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1", "JAX_PLATFORMS": "tpu,cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | GKE | hosts | slices, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["localhost:8482", "3", "4"], done.stderr[-2000:]
