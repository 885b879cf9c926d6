"""What a run carries from step to step, and how it is laid out over the mesh."""

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
class TrainState:
    """A pure function of (seed, steps done, rows seen): resuming is loading it.

    Attributes:
      step: int32 scalar, replicated: optimiser steps done.
      params: float32 parameter tree.
      opt_state: optax state; moments are laid out as the parameters they belong to.
    """

    step: Any
    params: Any
    opt_state: Any


def create(params, optimizer: optax.GradientTransformation, step: int = 0) -> TrainState:
    """A fresh state around given parameters."""
    return TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=optimizer.init(params))


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    step: int = 0,
    params=None,
) -> TrainState:
    """A state created where it will live: no device ever holds more than its share.

    Args:
      params: parameters to begin with; None draws them from `seed`.
      step: the number of steps that count as done (a run that begins at a later stage).
    """
    shardings = state_shardings(config, optimizer, mesh)
    if params is None:
        make = jax.jit(lambda key: create(init_params(config, key), optimizer, step), out_shardings=shardings)
        return make(jax.random.key(seed))
    params = jax.device_put(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), shardings.params)
    rest = jax.jit(
        lambda params: (jnp.asarray(step, jnp.int32), optimizer.init(params)),
        out_shardings=(shardings.step, shardings.opt_state),
    )(params)
    return TrainState(step=rest[0], params=params, opt_state=rest[1])


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The same tree of `ShapeDtypeStruct`, without computing anything."""
    return jax.eval_shape(lambda params: create(params, optimizer), abstract_params(config))


def state_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The same tree of `NamedSharding`: moments as their parameters, counters replicated.

    A mean over one axis of a parameter (Adafactor) is laid out as the axes that are left.
    """
    everywhere = replicated(mesh)
    state, params = abstract_state(config, optimizer), param_shardings(mesh, config)

    def moment_sharding(moment, param, sharding):
        if moment.shape == param.shape:
            return sharding
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
    return TrainState(step=everywhere, params=params, opt_state=opt_state)
