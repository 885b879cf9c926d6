"""Our train step as a call: compiled, its state kept, its work done on return."""

import types
from typing import Any

import jax
import numpy as np

from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import batch_sharding, make_mesh
from a3_jax.model.two_stream import TwoStream, init_params
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.step import make_train_step
from a3_jax.training.train_state import init_state
from benchmarks.measurement import note
from benchmarks.settings import Settings, draw_rows, sort_rows
from benchmarks.torch_models import CLIP, LEARNING_RATE, WEIGHT_DECAY


class TrainStep:
    """A call makes one step on the first device, by default on the last rows; it returns its metrics."""

    def __init__(self, settings: Settings, config: ModelConfig, rows, objective, params=None, b2=0.999):
        self._mesh, dtype = make_mesh(devices=jax.devices()[:1]), jax.numpy.dtype(settings.dtype)
        model = TwoStream(config, dtype, remat=settings.remat, attention=settings.attention)
        optimizer = make_optimizer(weight_decay=WEIGHT_DECAY, clip=CLIP, b2=b2)
        with jax.set_mesh(self._mesh):
            self.state = init_state(config, optimizer, self._mesh, seed=settings.seed, params=params)
            self._batch = jax.device_put(sort_rows(rows), batch_sharding(self._mesh))
            step = make_train_step(model, optimizer, self._mesh, objective=objective, microbatches=1)
            self.compiled: Any = step.lower(self.state, self._batch, np.float32(LEARNING_RATE)).compile()

    def __call__(self, rows=None, rate: float = LEARNING_RATE) -> dict[str, float]:
        with jax.set_mesh(self._mesh):
            if rows is not None:
                self._batch = jax.device_put(sort_rows(rows), batch_sharding(self._mesh))
            results = self.compiled(self.state, self._batch, np.float32(rate))
            self.state, metrics = jax.block_until_ready(results)
        return {name: float(value) for name, value in metrics.items()}


def train_step(settings: Settings, length: int, batch: int, objective="any_order", residual="standard"):
    """Returns the `TrainStep` of a new model on drawn rows."""
    note(f"compiling a step: {objective}, {batch} x {length}")
    rows = draw_rows(settings, length, batch, objective)
    return TrainStep(settings, settings.model(length, residual), rows, objective)


def random_checkpoint(settings: Settings, config: ModelConfig, tokenizer=None) -> Any:
    """Returns what `open_checkpoint` would, with random parameters."""
    params = init_params(config, jax.random.key(settings.seed), jax.numpy.dtype(settings.dtype))
    return types.SimpleNamespace(params=params, config=config, tokenizer=tokenizer, meta=None)
