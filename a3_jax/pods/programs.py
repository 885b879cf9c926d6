"""The programs of a run, each a function that compiles it for the chips of a mesh that need not be there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import axis_parts, batch_sharding
from a3_jax.model.two_stream import abstract_params, param_shardings
from a3_jax.pods.aot_compile import compile_step
from a3_jax.training.config import RunConfig
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.setup import make_model, sharded_state, with_shardings
from a3_jax.training.step import make_reset, step_kind

Makers = dict[str, Callable[[], Any]]  # name -> a function that gives a `jax.stages.Compiled`


def train_programs(run: RunConfig, model: ModelConfig, mesh) -> Makers:
    """Each kind of step that the stages have: "train OBJECTIVE", with its content loss if it has one."""

    def maker(objective, weight):
        return lambda: compile_step(run, model, mesh, objective, weight)

    return {
        f"train {objective}" + (f" + {weight:g} content" if weight else ""): maker(objective, weight)
        for objective, weight in sorted({step_kind(stage) for stage in run.stages})
    }


def other_programs(run: RunConfig, model: ModelConfig, mesh, names: Sequence[str]) -> Makers:
    """Those of "decode", "fingerprint" and "restore" that are named."""
    makers = {"decode": _decode, "fingerprint": _fingerprint, "restore": _restore}
    return {name: lambda name=name: makers[name](run, model, mesh) for name in names}


def _fingerprint(run, model, mesh):
    """Returns the checksums of a checkpoint's arrays, over the whole state at once."""
    from a3_jax.checkpoints import fingerprint

    return fingerprint._sums.lower(jax.tree.leaves(sharded_state(run, model, mesh))).compile()


def _restore(run, model, mesh):
    """Compiles what may follow a restored state: a fresh optimiser at the beginning of a stage.

    Reading itself is no program: arrays go to the chips as they are.
    """
    optimizer = make_optimizer(run.optimizer, **run.optimizer_options)
    reset = make_reset(optimizer, make_model(run, model), mesh)
    state = sharded_state(run, model, mesh)
    with jax.set_mesh(mesh):
        return reset.lower(state).compile()


def _decode(run, model, mesh):
    """`a3 generate` in bfloat16 with its defaults: a text a part of the batch axis, half of it blank."""
    from a3_jax.decoding.batched_decode import first_state, make_decode_spec
    from a3_jax.decoding.loop import decode
    from a3_jax.decoding.options import GenerateOptions

    options, columns = GenerateOptions(dtype="bfloat16"), run.seq_len
    group = min(options.group_size, columns)
    spec = make_decode_spec(model, options, None, (columns, max(1, columns // 2), group, group))
    params = with_shardings(abstract_params(model, jnp.bfloat16), param_shardings(mesh, model))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: first_state([], columns, axis_parts("batch"), 0))
        state = with_shardings(state, jax.tree.map(lambda _: batch_sharding(mesh), state))
        return decode.lower(params, state, spec=spec).compile()
