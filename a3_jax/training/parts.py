"""What a run's config says the step is made of."""

import optax

from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import TwoStream
from a3_jax.training.config import RunConfig
from a3_jax.training.optimizer import make_optimizer


def network_of(run: RunConfig, model: ModelConfig) -> TwoStream:
    """The module of a run."""
    return TwoStream(model, dtype=run.compute_dtype, remat=run.remat, attention=run.attention)


def optimizer_of(run: RunConfig) -> optax.GradientTransformation:
    """The optimiser of a run, up to its learning rate."""
    return make_optimizer(
        run.optimizer, b1=run.b1, b2=run.b2, eps=run.eps, weight_decay=run.weight_decay, clip=run.clip,
        moment_dtype=run.moment_dtype,
    )  # fmt: skip
