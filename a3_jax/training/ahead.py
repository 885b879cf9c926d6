"""The first step of a run compiled before it is called."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import batch_sharding
from a3_jax.training.config import RunConfig
from a3_jax.training.parts import optimizer_of
from a3_jax.training.state import abstract_state, state_shardings


def compiled_meanwhile(
    step: Any, run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh, stack: contextlib.ExitStack
) -> Callable:
    """A step that a thread compiles from now on; its first call waits for that.

    JAX keeps what it has compiled for shapes, and takes it for arrays like them.

    Args:
      step: of `make_train_step`.
      stack: waits in the end too, however the run ends: a process that compiles can't end well.
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
    shape, place = (run.batch_size, run.seq_len), batch_sharding(mesh)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    rows: dict = dict.fromkeys(("tokens", "positions", "segment_ids", "ranks"), row)
    rows["weights"] = row.update(dtype=jnp.float32)
    return placed_state(run, model, mesh), rows, jax.ShapeDtypeStruct((), jnp.float32)


def placed_state(run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """The run's `TrainState` as shapes with their places on the mesh."""
    optimizer = optimizer_of(run)
    return placed(abstract_state(model, optimizer), state_shardings(model, optimizer, mesh))


def placed(tree, shardings) -> Any:
    """A tree of shapes with the shardings of another, which has the same leaves."""
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), tree, shardings)
