"""Our train step as a call without arguments: compiled, its state kept, its work done on return."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from a3_jax.benchmarks.settings import Settings
from a3_jax.checkpoints.fingerprint import tree_names
from a3_jax.errors import InputError, nearest
from a3_jax.model.attention import IMPLEMENTATIONS
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import batch_sharding, make_mesh
from a3_jax.model.two_stream import REMAT_POLICIES, TwoStream
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.state import init_state
from a3_jax.training.step import make_train_step

LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-5, 0.01, 1.0  # the paper's; PyTorch's steps get the same


def check_names(settings: Settings) -> None:
    """Refuses an unknown remat policy or attention implementation.

    Raises:
      InputError: as said.
    """
    for field, names in (("remat", REMAT_POLICIES), ("attention", IMPLEMENTATIONS)):
        value = getattr(settings, field)
        if value not in names:
            message = f"must be one of {', '.join(names)}, got {value!r}{nearest(value, names)}"
            raise InputError(message, field=field)


class Steps:
    """Train steps of one model on one device, which share its state: no step needs a second copy.

    Args:
      settings: dtype, remat, attention and seed are read.
      config: the model.
      params: parameters to begin with; None draws them.
    """

    def __init__(self, settings: Settings, config: ModelConfig, params=None):
        self._mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
        self._optimizer = make_optimizer(weight_decay=WEIGHT_DECAY, clip=CLIP)
        self._model = TwoStream(
            config, dtype=jax.numpy.dtype(settings.dtype), remat=settings.remat, attention=settings.attention
        )
        with jax.set_mesh(self._mesh):
            self._state = init_state(config, self._optimizer, self._mesh, seed=settings.seed, params=params)

    def compile(self, batch: Mapping[str, Any], objective: str) -> "CompiledStep":
        """The step of an objective for batches of this shape, holding this one."""
        with jax.set_mesh(self._mesh):
            batch = jax.device_put(dict(batch), batch_sharding(self._mesh))
            step = make_train_step(
                self._model, self._optimizer, self._mesh, objective=objective, microbatches=1
            )
            compiled = step.lower(self._state, batch, np.float32(LEARNING_RATE)).compile()
        return CompiledStep(self, compiled, batch)

    def leaves(self) -> dict[str, Any]:
        """The arrays of the state by name, as a checkpoint has them."""
        return tree_names(self._state)

    def run(self, compiled, batch) -> dict[str, float]:
        """One step; its metrics as numbers."""
        with jax.set_mesh(self._mesh):
            state, metrics = compiled(self._state, batch, np.float32(LEARNING_RATE))
            self._state, metrics = jax.block_until_ready((state, metrics))
        return {name: float(value) for name, value in metrics.items()}


class CompiledStep:
    """A call makes one step."""

    def __init__(self, steps: Steps, compiled, batch):
        self._steps, self._compiled, self._batch = steps, compiled, batch

    def __call__(self) -> dict[str, float]:
        return self._steps.run(self._compiled, self._batch)

    def temporary_bytes(self) -> int:
        """What the function of this name says of the step."""
        return temporary_bytes(self._compiled)


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled function sets aside beside arguments and results, by the compiler's account."""
    return compiled.memory_analysis().temp_size_in_bytes
