"""Finds the hosts of this host's TPU pod: from GKE's environment variables, or a TPU VM's metadata server.

    GKE (JobSet, xpk)     TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES: the hosts of this slice;
                          MEGASCALE_NUM_SLICES: how many slices, where there are several
    TPU VM                worker-network-endpoints of the metadata server: the hosts of this slice;
                          tpu-env: MEGASCALE_NUM_SLICES and others, a line each

jax itself finds out, in the same places, which of them is process 0 and which one this is
(`cluster_detection_method`).
"""

import importlib.util
import os
import pathlib
import re
import urllib.error
import urllib.request
from typing import Any

import jax

from a3_jax.errors import EXIT_PREEMPTED, InputError, RunError

_HOSTNAMES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # the first that is set, as jax reads them
_SLICES = "MEGASCALE_NUM_SLICES"
_NO_SERVER = "TPU_SKIP_MDS_QUERY"  # set by jax, on import, where there is no TPU; by GKE; by users
_MACHINE = "/sys/class/dmi/id/product_name"
_METADATA_SECONDS = 10
_PORT = "8482"  # the one that jax takes for its coordinator


def find_pod(address: str | None = None) -> dict[str, Any] | None:
    """Returns what `jax.distributed.initialize` must be told to join the hosts of this pod.

    Asks no server except the metadata server of a TPU VM.

    Args:
      address: HOST:PORT or HOST of the coordinator, if the manifest names it; otherwise jax finds it.

    Returns:
      Keyword arguments, empty if this host is alone; None if it is in no pod.

    Raises:
      InputError: the number of slices isn't a whole number.
      RunError: the metadata server doesn't answer.
    """
    if importlib.util.find_spec("libtpu") is None or "tpu" not in _platforms():
        return None
    names = next((os.environ[name] for name in _HOSTNAMES if name in os.environ), None)
    if names is not None:
        method, hosts, slices = "gketpu", names, os.environ.get(_SLICES)
    elif _NO_SERVER not in os.environ and _is_google_machine():
        method, hosts = "gcetpu", _attribute("worker-network-endpoints")
        slices = os.environ.get(_SLICES) or _slices_of_vm()
    else:
        return None
    if len([host for host in hosts.split(",") if host]) * _number(slices) <= 1:
        return {}
    found = {"cluster_detection_method": method}
    if address:
        port = os.environ.get("JAX_COORDINATOR_PORT", _PORT)
        found["coordinator_address"] = address if re.search(r":\d+$", address) else f"{address}:{port}"
    return found


def _platforms() -> str:
    return getattr(jax.config, "jax_platforms", None) or "tpu"  # None: whatever is there


def _number(slices: str | None) -> int:
    if not slices:
        return 1
    if not slices.isdecimal():
        raise InputError(f"must be a whole number, got {slices!r}", field=_SLICES)
    return int(slices)


def _is_google_machine() -> bool:
    try:
        return pathlib.Path(_MACHINE).read_text().startswith("Google")
    except OSError:
        return False


def _slices_of_vm() -> str | None:
    found = re.search(rf"^{_SLICES}: *'?(\d+)", _attribute("tpu-env"), re.MULTILINE)
    return found and found[1]


def _attribute(name: str) -> str:
    """Returns a value of the metadata server; empty if it has none of this name."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
    try:
        with opener.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        problem = error
    except OSError as error:
        problem = error
    message = f"the metadata server says nothing of other hosts: {problem}"
    raise RunError(EXIT_PREEMPTED, f"{message} ({_NO_SERVER}=1 if this host is alone)") from problem
