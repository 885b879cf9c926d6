"""The real step of a tiny model compiled for TPUs that are not there: once for all tests that read it.

Compiling takes a minute, so the processes of one run of pytest share what they compile: a lock for
each case, and the program's text in the directory that they have in common.
"""

import fcntl
import os
import subprocess
import sys

import pytest

from a3_jax.model.config import ModelConfig

LENGTH, SHORT = 2048, 512
MODEL = ModelConfig(
    vocab_size=1536, d_model=128, num_layers=2, num_heads=2, num_kv_heads=2, head_size=64, mlp_size=256,
    max_length=LENGTH, tie_embeddings=True,
)  # fmt: skip
# Case -> topology, slices, mesh, remat, length, attention. The last two are for collectives alone: short
# rows and dense attention compile in a third of the time.
CASES = {
    "fsdp": ("v5e:2x2", 1, {"fsdp": 4}, "none", LENGTH, "auto"),
    "tensor": ("v5e:2x2", 1, {"fsdp": 2, "tensor": 2}, "offload", LENGTH, "auto"),
    "data": ("v5e:2x2", 1, {"data": 2, "fsdp": 2}, "dots", SHORT, "dense"),
    "slices": ("v5e:1x1", 2, {"data": 2, "fsdp": 1}, "block", SHORT, "dense"),
}
CHIPS = {case: 1 if case == "slices" else 4 for case in CASES}  # of a slice
_PROGRAM = "import sys; from tests.tpu_programs import compile_case; print(compile_case(sys.argv[1]))"


def compile_text(topology, slices, sizes, remat, length, attention):
    """The optimised program of the tiny model's step: a row a chip along data and fsdp."""
    import jax

    from a3_jax.model.sharding import make_mesh
    from a3_jax.ordering.curriculum import paper_stages
    from a3_jax.pods.aot_compile import compile_step, topology_devices
    from a3_jax.training.config import RunConfig

    run = RunConfig(
        stages=paper_stages(), seq_len=length, batch_size=4, learning_rate=1e-3, model=MODEL.to_dict(),
        dtype="bfloat16", remat=remat, attention=attention,
    )  # fmt: skip
    devices = jax.devices()[:4] if topology == "cpu" else topology_devices(topology, slices)
    return compile_step(run, MODEL, make_mesh(sizes, devices), "any_order").as_text()


def compile_case(case):
    return compile_text(*CASES[case])


def program(case, tmp_path_factory):
    """The text of a case's program, from a process of its own for libtpu's sake."""
    pytest.importorskip("libtpu")
    directory = tmp_path_factory.getbasetemp()
    directory = directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory
    file = directory / f"tpu-program-{case}.txt"
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_text(run_apart(_PROGRAM, case))
    return file.read_text()


def run_apart(code, *arguments, **environment):
    """What a process with the TPU compiler writes to its standard output."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
