"""Chips that need not be there, and the step of a run compiled for them."""

import os
from typing import Any

import jax

from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.training.config import RunConfig
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.setup import make_model, step_arguments
from a3_jax.training.step import make_train_step

# What libtpu needs to compile where there is no TPU, and where others compile at the same time.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}
# Where there is none it would ask for its host in vain, and complain.
_NO_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}


def topology_devices(topology: str, slices: int = 1) -> list:
    """Returns the chips of a TPU topology, as descriptions that the compiler takes for devices.

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
    """Compiles the step that `training.train` would run on this mesh; nothing is computed.

    Args:
      run: batch, length, dtype, remat, attention and optimiser are read.
      model: the run's.
      mesh: made by `setup.open_mesh`, over present devices or those of `topology_devices`.
      objective, content_loss_weight: the stage's.

    Returns:
      `jax.stages.Compiled`.
    """
    optimizer = make_optimizer(run.optimizer, **run.optimizer_options)
    step = make_train_step(
        make_model(run, model), optimizer, mesh,
        objective=objective, microbatches=run.microbatches, content_loss_weight=content_loss_weight,
    )  # fmt: skip
    arguments = step_arguments(run, model, mesh)
    with jax.set_mesh(mesh):  # for lowering alone: no array can be made on chips that are not there
        return step.lower(*arguments).compile()
