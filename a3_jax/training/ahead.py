"""The step of a run compiled before it: for chips that need not be there, or while the run is opened."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import batch_sharding
from a3_jax.training.config import RunConfig
from a3_jax.training.parts import network_of, optimizer_of
from a3_jax.training.state import abstract_state, state_shardings
from a3_jax.training.step import make_train_step

# What libtpu needs to compile where there is no TPU, and where others compile at the same time.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}
# Where there is none it would ask for its host in vain, and complain.
_NO_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}


def topology_devices(topology: str, slices: int = 1) -> list:
    """The chips of a TPU topology, as descriptions that the compiler takes for devices.

    Args:
      topology: such as "v5e:4x4" or "v5p:4x4x4".
      slices: how many of them, joined by the data-centre network.

    Raises:
      InputError: libtpu is not installed or knows no such topology.
    """
    wanted = _ENVIRONMENT | (_NO_HOST if os.environ.get("JAX_PLATFORMS") == "cpu" else {})
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # libtpu's own kinds, whose first line says what is wrong
        raise InputError(f"{topology!r}: {str(error).splitlines()[0]}", field="topology") from error
    return list(described.devices)


def compile_step(
    run: RunConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    objective: str,
    content_loss_weight: float = 0.0,
) -> Any:
    """The step that `training.run` would compile for this run and mesh; nothing is computed.

    Args:
      run: batch, length, dtype, remat, attention and optimiser are read.
      model: of the run.
      mesh: of `run.open_mesh`, over present devices or those of `topology_devices`.
      objective, content_loss_weight: of the stage.

    Returns:
      `jax.stages.Compiled`.
    """
    network, optimizer = network_of(run, model), optimizer_of(run)
    step = make_train_step(
        network, optimizer, mesh,
        objective=objective, microbatches=run.microbatches, content_loss_weight=content_loss_weight,
    )  # fmt: skip
    arguments = step_arguments(run, model, mesh)
    with jax.set_mesh(mesh):  # for lowering alone: no array can be made on chips that are not there
        return step.lower(*arguments).compile()


def compiled_meanwhile(
    step: Any, run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh, stack: contextlib.ExitStack
) -> Callable:
    """A step that a thread compiles from now on; its first call waits for that.

    JAX keeps what it has compiled for shapes, and takes it for arrays like them.

    Args:
      step: of `make_train_step`.
      stack: waits in the end too: a process that compiles can't end well.
    """
    arguments = step_arguments(run, model, mesh)

    def compile_it():
        with contextlib.suppress(Exception), jax.set_mesh(mesh):  # the call fails of the same, and is heard
            step.lower(*arguments).compile()

    thread = threading.Thread(target=compile_it, name="a3 compile", daemon=True)
    thread.start()
    stack.callback(thread.join)

    def call(*values):
        thread.join()
        return step(*values)

    return call


def step_arguments(run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """State, batch and learning rate of a run's step as shapes with their places on the mesh."""
    rows = dict.fromkeys(("tokens", "positions", "segment_ids", "ranks"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((run.batch_size, run.seq_len), dtype, sharding=batch_sharding(mesh))
        for name, dtype in {**rows, "weights": jnp.float32}.items()
    }
    return placed_state(run, model, mesh), batch, jax.ShapeDtypeStruct((), jnp.float32)


def placed_state(run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """The run's `TrainState` as shapes with their places on the mesh."""
    optimizer = optimizer_of(run)
    return placed(abstract_state(model, optimizer), state_shardings(model, optimizer, mesh))


def placed(tree, shardings) -> Any:
    """A tree of shapes with the shardings of another, which has the same leaves."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
