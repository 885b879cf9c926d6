"""The compiled step holds nothing of size T x S or B x T x V: for TPUs that are not there, and on CPU."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

LENGTH, VOCABULARY, CHIPS = 2048, 2048, 4
LIMIT = LENGTH * VOCABULARY  # elements: a device's logits; all scores of a head would be twice as many
PROGRAM = """
import json, sys
from tests.test_step_memory import compile_text
print(json.dumps({name: compile_text(*case) for name, case in json.loads(sys.argv[1]).items()}))
"""
ON_TPU = {
    "v5e": ("v5e:2x2", {"fsdp": 4}, "none", "auto"),
    "v5e, offload": ("v5e:2x2", {"fsdp": 2, "tensor": 2}, "offload", "auto"),
}
ON_CPU = {
    "cpu": ("cpu", {"fsdp": 4}, "none", "auto"),
    "cpu, dense": ("cpu", {"fsdp": 4}, "none", "dense"),
}


def compile_text(topology, sizes, remat, attention):
    """The optimised program of a tiny model's real step."""
    import jax

    from a3_jax.model.config import ModelConfig
    from a3_jax.model.sharding import make_mesh
    from a3_jax.ordering.curriculum import paper_stages
    from a3_jax.training.ahead import compile_step, topology_devices
    from a3_jax.training.config import RunConfig

    run = RunConfig(
        stages=paper_stages(), seq_len=LENGTH, batch_size=CHIPS, learning_rate=1e-3, model="llama-3.2-1b",
        dtype="bfloat16", remat=remat, attention=attention,
    )  # fmt: skip
    model = ModelConfig(
        vocab_size=VOCABULARY, d_model=128, num_layers=2, num_heads=2, num_kv_heads=2, head_size=64,
        mlp_size=256, max_length=LENGTH, tie_embeddings=True,
    )  # fmt: skip
    devices = jax.devices()[:CHIPS] if topology == "cpu" else topology_devices(topology)
    return compile_step(run, model, make_mesh(sizes, devices), "any_order").as_text()


@pytest.fixture(scope="module")
def programs():
    """Case -> the optimised program; those for TPUs come from a process of their own, for libtpu's sake."""
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(ON_TPU)],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    on_tpu = json.loads(done.stdout.splitlines()[-1])
    return on_tpu | {name: compile_text(*case) for name, case in ON_CPU.items()}


def largest(program):
    shapes = re.findall(r"(?:f32|bf16|pred|s32|s8)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("case", [*ON_TPU, "cpu"])
def test_no_array_of_all_scores_or_all_logits(programs, case):
    assert largest(programs[case]) < LIMIT


def test_dense_attention_would_be_found(programs):
    """The negative control."""
    assert largest(programs["cpu, dense"]) >= 2 * LIMIT


def test_what_the_tpu_program_is_made_of(programs):
    """Splash attention's kernels; no sum of whole embedding tables over devices; offload to the host."""
    plain, offload = programs["v5e"], programs["v5e, offload"]
    assert len(set(re.findall(r"splash_mha_\w+", plain))) >= 3
    assert not re.findall(rf"= \(?\w+\[{VOCABULARY},128\]\S* all-reduce", plain)
    assert "S(5)" in offload and "S(5)" not in plain  # host memory
