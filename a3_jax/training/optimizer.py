"""Optimisers whose learning rate comes in as a number, and the schedule that makes that number.

The schedule is plain Python over the curriculum, so that a run of many stages, each with its own
rate, warm-up and decay, needs one compiled step, and a resumed run nothing but its step.
"""

import math
from collections.abc import Sequence

import jax
import optax

from a3_jax.errors import InputError, nearest
from a3_jax.ordering.curriculum import SCHEDULES, Stage, stage_at

OPTIMIZERS = ("adamw", "adafactor")
MOMENT_DTYPES = ("float32", "bfloat16")


def make_optimizer(
    name: str = "adamw",
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    moment_dtype: str = "float32",
    factored_from: int = 128,
) -> optax.GradientTransformation:
    """Makes an optimiser up to its learning rate: `updates` are multiplied by `-learning_rate` in the step.

    Bytes of state for a matrix [D, F] of float32: AdamW 8 D F, with a bfloat16 first moment 6 D F,
    Adafactor 4 (D + F).

    Args:
      name: "adamw" (Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101) or
        "adafactor" (Shazeer and Stern, arXiv 1804.04235: a second moment of row and column means,
        decay 1 - t^-0.8, updates of an RMS of 1 at most; no first moment and no relative step size, so
        that learning rate and weight decay mean what they do with AdamW).
      b1, b2, eps: as in Adam; not used by Adafactor.
      weight_decay: pulls matrices towards zero; norms, biases and the query vector are left alone.
      clip: the gradient's largest global norm; 0 for no limit.
      moment_dtype: of AdamW's first moment, "float32" or "bfloat16". The second is never rounded: with
        b2 = 0.999 its steps are too small for bfloat16.
      factored_from: Adafactor keeps means of an array's two largest axes from this size on; smaller
        arrays, and heads of 64, have a whole second moment.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"unknown: {name!r}{nearest(name, OPTIMIZERS)}", field="optimizer")
    if name == "adafactor" and moment_dtype != "float32":
        raise InputError(f"adafactor has no first moment to keep in {moment_dtype}", field="moment_dtype")
    if name == "adafactor":
        scale = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=factored_from), optax.clip_by_block_rms(1.0)
        )
    else:
        scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=moment_dtype)
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        scale,
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
    )


def is_matrix(params) -> dict:
    """Marks the leaves that decay, by name: a stack of layers' norms has two axes as well."""

    def decays(path, leaf):
        del leaf
        return not path[-1].key.endswith(("norm", "bias", "query_embed"))

    return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate(
    stages: Sequence[Stage], step: int, *, learning_rate: float, warmup_steps: int, schedule: str
) -> float:
    """Returns the learning rate of the step with this number, counted from 0 over all stages.

    A schedule spans consecutive stages until one that restarts it. A stage's own rate, warm-up or
    schedule takes the place of the run's.

        rate      /----\\____        /--\\__
                 /           \\      /      \\
        stages  | 1 | 2 | 3  |  4 (restart) |

    Args:
      stages: the curriculum.
      step: 0 <= step < the sum of the stages' steps.
      learning_rate, warmup_steps, schedule: the run's, for stages without their own.
    """
    index, stage, _ = stage_at(stages, step)
    begin = max(i for i in range(index + 1) if i == 0 or stages[i].restart_schedule)
    end = next((i for i in range(index + 1, len(stages)) if stages[i].restart_schedule), len(stages))
    first_step = sum(stage.steps for stage in stages[:begin])
    return _own(stage.learning_rate, learning_rate) * decay(
        _own(stage.schedule, schedule),
        step - first_step,
        warmup_steps=_own(stage.warmup_steps, warmup_steps),
        steps=sum(stage.steps for stage in stages[begin:end]),
    )


def decay(schedule: str, step: int, *, warmup_steps: int, steps: int) -> float:
    """Returns the share of the full rate, 0 to 1, at `step` (from 0) of `steps`.

    Rises by 1 / warmup_steps per step to 1, then falls to 0, which it would reach at `steps`: no step
    is spent at rate zero.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown: {schedule!r}{nearest(schedule, SCHEDULES)}", field="schedule")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def _own(value, default):
    return default if value is None else value
