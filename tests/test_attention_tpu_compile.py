"""Splash attention compiled ahead of time for TPUs that are not there: real compiler, no chip."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")

ROWS, KEYS = 2048, 1024
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from a3_jax.model.attention import AttentionArgs, attention
from a3_jax.model.sharding import make_mesh, partition_spec

def total(query, key, value, start, limit):
    out = attention(query, key, value, start, limit, AttentionArgs(0.125, 30.0))
    return jnp.sum(out.astype(jnp.float32) ** 2)

rows, keys, names = json.loads(sys.argv[1])
programs = {}
for name in names:
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, chips)

    def array(shape, dtype, *axes):
        sharding = jax.NamedSharding(mesh, partition_spec(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    query = array((2, rows, 4, 64), jnp.bfloat16, "batch", "length", "heads", "head_size")
    key = array((2, keys, 2, 64), jnp.bfloat16, "batch", "length", "kv_heads", "head_size")
    row = array((2, rows), jnp.int32, "batch", "length")
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        programs[name] = step.lower(query, key, key, row, row).compile().as_text()
print(json.dumps(programs))
"""


@pytest.fixture(scope="module")
def programs():
    """Topology -> the optimised program of forward and backward over a mesh of its chips.

    In its own process: what libtpu reads from the environment must be there before jax starts.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    arguments = json.dumps([ROWS, KEYS, TOPOLOGIES])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_forward_and_backward_compile_to_three_kernels_and_no_scores(programs, topology):
    program = programs[topology]
    kernels = re.findall(r"%(\w+)\.?\d* = .* custom_call_target=\"tpu_custom_call\"", program)
    assert sorted(kernels) == [f"splash_mha_{name}_residuals" for name in ("dkv_no", "dq_no", "fwd")]
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program)
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < ROWS * KEYS
    assert f"bf16[1,{ROWS},2,64]" in program  # a device's own examples and heads
    assert not re.search(r"= [^=]*\b(all-gather|all-to-all|collective-permute)", program)
