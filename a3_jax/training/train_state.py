"""The state that a run carries from step to step, and its layout over the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import replicated
from a3_jax.model.two_stream import abstract_params, init_params, param_shardings


@struct.dataclass
class Numerics:
    """Counts of steps without a finite loss and gradient; int32 scalars, replicated.

    Attributes:
      in_a_row: consecutive skipped steps up to the last one; 0 after a step that counted.
      skipped: steps skipped since the run began.
      rows_ahead: batches skipped for good by rollbacks: step s reads the rows of step s + this.
    """

    in_a_row: Any
    skipped: Any
    rows_ahead: Any

    @classmethod
    def create(cls, in_a_row=0, skipped=0, rows_ahead=0) -> "Numerics":
        return cls(*(jnp.asarray(value, jnp.int32) for value in (in_a_row, skipped, rows_ahead)))


@struct.dataclass
class TrainState:
    """A pure function of (seed, steps done, rows seen): resuming is loading it.

    Attributes:
      step: int32 scalar, replicated: optimiser steps done.
      params: float32 parameter tree.
      opt_state: optax state; moments are laid out as the parameters they belong to.
      numerics: counts of the steps that were skipped.
    """

    step: Any
    params: Any
    opt_state: Any
    numerics: Numerics


def create(params, optimizer: optax.GradientTransformation, step: int = 0) -> TrainState:
    """Makes a fresh state, step an int32 scalar, around given parameters."""
    return TrainState(jnp.asarray(step, jnp.int32), params, optimizer.init(params), Numerics.create())


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    step: int = 0,
    params=None,
) -> TrainState:
    """Makes a state where it will live: no device ever holds more than its share.

    Args:
      config: the model's.
      optimizer: made by `make_optimizer`.
      mesh: the devices.
      seed: the run's.
      step: number of steps that count as done (int32 scalar), for a run that begins at a later stage.
      params: parameters to begin with; None draws them from `seed`.
    """
    shardings = state_shardings(config, optimizer, mesh)
    if params is None:
        make = jax.jit(lambda key: create(init_params(config, key), optimizer, step), out_shardings=shardings)
        return make(jax.random.key(seed))
    params = jax.device_put(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), shardings.params)
    # The parameters stay as they are: only what belongs to them is made by a program.
    rest = jax.jit(
        lambda params: dataclasses.replace(create(params, optimizer, step), params=None),
        out_shardings=dataclasses.replace(shardings, params=None),
    )(params)
    return dataclasses.replace(rest, params=params)


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state as a tree of `ShapeDtypeStruct`, without computing anything."""
    return jax.eval_shape(lambda params: create(params, optimizer), abstract_params(config))


def state_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state as a tree of `NamedSharding`: moments as their parameters, counters replicated.

    A mean over one axis of a parameter (Adafactor) is laid out as the axes that are left.
    """
    everywhere = replicated(mesh)
    state, params = abstract_state(config, optimizer), param_shardings(mesh, config)

    def moment_sharding(moment, param, sharding):
        if moment.shape == param.shape:
            return sharding
        # A mean over one axis has the parameter's shape without it, and keeps the other axes' layout.
        for axis in range(param.ndim):
            if moment.shape == param.shape[:axis] + param.shape[axis + 1 :]:
                left = (*sharding.spec[:axis], *sharding.spec[axis + 1 :])
                return NamedSharding(mesh, PartitionSpec(*left))
        return everywhere  # optax puts a single zero where the other kind of moment is kept

    opt_state = optax.tree_map_params(
        optimizer,
        moment_sharding,
        state.opt_state,
        state.params,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state, jax.tree.map(lambda _: everywhere, state.numerics))
