"""The run itself, straight, in the order things happen, over any iterator of batches."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from a3_jax.ordering.curriculum import Stage, stage_at, total_steps
from a3_jax.training.metrics import JsonLines, Profiler, TensorBoard, numbers
from a3_jax.training.progress import ProgressLine
from a3_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Functions:
    """What the loop calls; all but `learning_rate` are compiled or touch the disk.

    Attributes:
      step: kind of a stage's steps (`step_kind`) -> (state, batch, learning_rate) -> (state, metrics).
      reset_optimizer: state -> state with fresh moments.
      learning_rate: step, from 0 -> rate.
      place: batch of NumPy arrays -> the same on the devices.
      evaluate: params -> {name: nats a token}; None without held-out rows.
      sample: (steps done, params) -> None, writes infillings to read; None for none.
      save: (steps done, stage name, state) -> None, returns before the disk is done.
      utilization: (objective, tokens a second) -> share of the chips' peak rate; None where that rate
        isn't known.
    """

    step: Mapping[tuple[str, float], Callable]
    reset_optimizer: Callable
    learning_rate: Callable[[int], float]
    place: Callable
    evaluate: Callable[[Any], dict[str, float]] | None
    sample: Callable[[int, Any], None] | None
    save: Callable[[int, str, TrainState], None]
    utilization: Callable[[str, float], float] | None = None


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between two of each; 0 for none. A stage's end is always evaluated and saved."""

    evaluate: int
    sample: int
    save: int
    log: int


@dataclasses.dataclass(frozen=True)
class Logs:
    """Where results go."""

    metrics: JsonLines
    evaluations: JsonLines
    tensorboard: TensorBoard
    progress: ProgressLine
    profiler: Profiler


def step_kind(stage: Stage) -> tuple[str, float]:
    """What makes a stage's step another program: (objective, content loss weight)."""
    return stage.objective, stage.content_loss_weight


def train(
    state: TrainState,
    batches: Iterator[Mapping[str, np.ndarray]],
    functions: Functions,
    logs: Logs,
    *,
    stages: Sequence[Stage],
    first_step: int,
    fresh: bool,
    intervals: Intervals,
) -> TrainState:
    """Runs the curriculum from `first_step` to its end.

    Step n is dispatched before the metrics of step n - 1 are read, so that the device never waits
    for the host. A checkpoint or an evaluation reads them first: rows on disk are never behind it.

    Args:
      state: after `first_step` steps; its buffers are used again.
      batches: the batch of step `first_step`, and of each one after it.
      functions, logs: what to call, where to write.
      stages: the curriculum.
      first_step: steps done before.
      fresh: nothing was trained yet, so that held-out losses are also taken before the first step.
      intervals: how often.

    Returns:
      The state after the last step.
    """
    reader = _MetricsReader(logs, intervals.log, functions.utilization)

    # 0. Where the run begins.
    if fresh and intervals.evaluate:
        _evaluate(functions, logs, first_step, stage_at(stages, first_step)[1], state)

    for step in range(first_step, total_steps(stages)):
        # 1. The stage: only the rows and the rate know about it, and a fresh optimiser if it asks for one.
        _, stage, stage_first = stage_at(stages, step)
        if step == stage_first and stage.reset_optimizer:
            state = functions.reset_optimizer(state)

        # 2. Rows and rate, functions of (seed, step).
        done = step + 1
        logs.profiler.start_before(done)
        batch = functions.place(next(batches))
        rate = functions.learning_rate(step)

        # 3. The step is dispatched; what it will have measured is read after the next one's dispatch.
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = functions.step[step_kind(stage)](state, batch, np.float32(rate))
        reader.read_previous()
        reader.pending = done, stage, rate, metrics

        # 4. What is due after this step.
        stage_ends = done == stage_first + stage.steps
        profile_ends = logs.profiler.ends_with(done)
        evaluate_now = intervals.evaluate and (stage_ends or done % intervals.evaluate == 0)
        sample_now = intervals.sample and (stage_ends or done % intervals.sample == 0)
        save_now = stage_ends or (intervals.save and done % intervals.save == 0)
        anything = profile_ends or evaluate_now or sample_now or save_now
        if anything:
            reader.read_previous()
        if profile_ends:
            logs.profiler.stop()
        if evaluate_now:
            _evaluate(functions, logs, done, stage, state)
        if sample_now and functions.sample is not None:
            functions.sample(done, state.params)
        if save_now:
            functions.save(done, stage.name, state)
        if anything:
            reader.restart_clock()

    return state


class _MetricsReader:
    """Reads a step's metrics from the device one step late, and writes them down.

    Attributes:
      pending: (number, stage, learning rate, metrics on the device) of the last dispatched step.
    """

    def __init__(self, logs: Logs, log_every: int, utilization: Callable[[str, float], float] | None):
        self.pending: tuple[int, Stage, float, Mapping[str, Any]] | None = None
        self._logs, self._log_every, self._utilization = logs, log_every, utilization
        self.restart_clock()

    def restart_clock(self) -> None:
        """From now on counts for the next step's speed: evaluation and saving don't."""
        self._clock = time.monotonic()

    def read_previous(self) -> None:
        if self.pending is None:
            return
        (step, stage, rate, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}  # waits for that step to end
        seconds = time.monotonic() - self._clock
        self.restart_clock()
        row = {
            "step": step,
            "stage": stage.name,
            "loss": values["loss"],
            "learning_rate": rate,
            "grad_norm": values["grad_norm"],
            "tokens_per_second": values["tokens"] / max(seconds, 1e-9),
        }
        if self._utilization is not None:
            row["mfu"] = self._utilization(stage.objective, row["tokens_per_second"])
        if "content_loss" in values:
            row["content_loss"] = values["content_loss"]
        self._logs.metrics.append(row)
        self._logs.progress.update(row)
        if step % self._log_every == 0:
            self._logs.tensorboard.write(step, numbers(row, "train/"))


def _evaluate(functions, logs, step, stage, state):
    if functions.evaluate is None:
        return
    losses = functions.evaluate(state.params)
    row = {"step": step, "stage": stage.name, **losses}
    logs.evaluations.append(row)
    logs.tensorboard.write(step, numbers(row, "held_out/"))
    logs.progress.note(
        f"held out at step {step}: " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    )
