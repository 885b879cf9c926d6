"""The run itself, straight, in the order things happen, over any iterator of batches."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from a3_jax.errors import EXIT_PREEMPTED, RunError
from a3_jax.ordering.curriculum import Stage, stage_at, total_steps
from a3_jax.runtime.distributed import ProcessFlags
from a3_jax.runtime.preemption import StopRequest
from a3_jax.runtime.watchdog import Watchdog
from a3_jax.training.events import Events
from a3_jax.training.metrics import JsonLines, Profiler, TensorBoard, numbers
from a3_jax.training.progress import ProgressLine
from a3_jax.training.saving import Saver
from a3_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Functions:
    """What the loop calls; all but `learning_rate` are compiled or touch the disk.

    Attributes:
      batches: (step, batches passed over for good) -> iterator of the batches from that step on.
      step: kind of a stage's steps (`step_kind`) -> (state, batch, learning_rate) -> (state, metrics).
      reset_optimizer: state -> state with fresh moments.
      learning_rate: step, from 0 -> rate.
      place: batch of NumPy arrays -> the same on the devices.
      evaluate: (params, whether to stop) -> {name: nats a token}, None if stopped; None without
        held-out rows.
      sample: (steps done, params) -> None, writes infillings to read; None for none.
      roll_back: (first and last of the steps that were skipped, counted from 1) -> (state, steps done,
        batches passed over).
      utilization: (objective, tokens a second) -> share of the chips' peak rate; None where that rate
        isn't known.
    """

    batches: Callable[[int, int], Iterator[Mapping[str, np.ndarray]]]
    step: Mapping[tuple[str, float], Callable]
    reset_optimizer: Callable
    learning_rate: Callable[[int], float]
    place: Callable
    evaluate: Callable[[Any, Callable[[], bool]], dict[str, float] | None] | None
    sample: Callable[[int, Any], None] | None
    roll_back: Callable[[int, int], tuple[TrainState, int, int]]
    utilization: Callable[[str, float], float] | None = None


@dataclasses.dataclass(frozen=True)
class Guards:
    """What keeps a run from being lost, or from going wrong unseen."""

    saver: Saver
    flags: ProcessFlags
    stop: StopRequest
    watchdog: Watchdog
    check_lease: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between two of each; 0 for none. A stage's end is always evaluated and saved.

    Attributes:
      max_skipped: steps in a row without a finite loss and gradient after which the run rolls back.
    """

    evaluate: int
    sample: int
    save: int
    log: int
    max_skipped: int


@dataclasses.dataclass(frozen=True)
class Logs:
    """Where results go."""

    metrics: JsonLines
    evaluations: JsonLines
    events: Events
    tensorboard: TensorBoard
    progress: ProgressLine
    profiler: Profiler


def step_kind(stage: Stage) -> tuple[str, float]:
    """What makes a stage's step another program: (objective, content loss weight)."""
    return stage.objective, stage.content_loss_weight


def train(
    state: TrainState,
    functions: Functions,
    logs: Logs,
    guards: Guards,
    *,
    stages: Sequence[Stage],
    first_step: int,
    rows_ahead: int,
    evaluate_first: str,
    intervals: Intervals,
) -> TrainState:
    """Runs the curriculum from `first_step` to its end.

    Step n is dispatched before the metrics of step n - 1 are read, so that the device never waits
    for the host. A checkpoint or an evaluation reads them first: rows on disk are never behind it.

    Args:
      state: after `first_step` steps; its buffers are used again.
      functions, logs, guards: what to call, where to write, what to ask.
      stages: the curriculum.
      first_step: steps done before.
      rows_ahead: batches passed over for good before.
      evaluate_first: the stage that held-out losses are due for before the first step; empty: none are.
      intervals: how often.

    Returns:
      The state after the last step, which is on disk.

    Raises:
      RunError: told to stop, or too many saves or steps in a row failed.
    """
    reader = _MetricsReader(logs, intervals.log, functions.utilization)
    saver, watchdog, events = guards.saver, guards.watchdog, logs.events
    compiled = set()

    # 0. Where the run begins.
    step, batches = first_step, functions.batches(first_step, rows_ahead)
    if evaluate_first:
        _evaluate(functions, logs, guards, first_step, evaluate_first, state)
        reader.restart_clock()

    while step < total_steps(stages):
        # 1. The stage: only the rows and the rate know about it, and a fresh optimiser if it asks for one.
        _, stage, stage_first = stage_at(stages, step)
        if step == stage_first and stage.reset_optimizer:
            state = functions.reset_optimizer(state)

        # 2. Rows and rate, functions of (seed, step).
        done = step + 1
        logs.profiler.start_before(done)
        watchdog.enter("data")
        with reader.waiting_for_data():
            batch = functions.place(next(batches))
        rate = functions.learning_rate(step)

        # 3. The step is dispatched; what it will have measured is read after the next one's dispatch.
        kind = step_kind(stage)
        watchdog.enter("step" if kind in compiled else "compile")
        begin = time.monotonic()
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = functions.step[kind](state, batch, np.float32(rate))
        if kind not in compiled:
            compiled.add(kind)
            reader.leave_out("compile", time.monotonic() - begin, what=f"{stage.objective} step")
            watchdog.enter("step")
        guards.stop.anything_to_save = True
        guards.check_lease()
        flags = guards.flags.any(bool(guards.stop), saver.has_failed())
        reader.read_previous()
        reader.pending = done, stage, rate, metrics, flags

        # 4. What is due after this step.
        stage_ends = done == stage_first + stage.steps
        profile_ends = logs.profiler.ends_with(done)
        evaluate_now = intervals.evaluate and (stage_ends or done % intervals.evaluate == 0)
        sample_now = intervals.sample and (stage_ends or done % intervals.sample == 0)
        save_now = stage_ends or saver.due or (intervals.save and done % intervals.save == 0)
        told = reader.stop or reader.save_failed
        anything = profile_ends or evaluate_now or sample_now or save_now or told
        if anything and reader.skipped < intervals.max_skipped:
            reader.read_previous()
        if profile_ends:
            logs.profiler.stop()

        # 5. Nothing was learned for too long: back to the checkpoint before, and past these rows.
        if reader.skipped >= intervals.max_skipped:
            watchdog.enter("restore")
            reader.drop_pending()
            if reader.save_failed:
                saver.count_failure()
            first_skipped = reader.step - reader.skipped + 1
            state, step, rows_ahead = functions.roll_back(first_skipped, reader.step)
            batches, reader = functions.batches(step, rows_ahead), reader.fresh()
            continue

        # 6. A failed save is tried again; on a request to stop nothing but saving is done any more.
        stopping = reader.stop and done < total_steps(stages)  # the last step's end is near enough
        save_now = save_now and (stage_ends or not reader.skipped)  # nothing was learned since the last one
        if reader.save_failed:
            reader.save_failed, save_now = False, True
            saver.count_failure()
        if evaluate_now and not stopping:
            is_last = done == total_steps(stages)
            stopping = not _evaluate(functions, logs, guards, done, stage.name, state, to_its_end=is_last)
        if sample_now and functions.sample is not None and not stopping:
            watchdog.enter("sample")
            with events.timed("sample", step=done):
                functions.sample(done, state.params)
        if save_now or stopping:
            watchdog.enter("save")
            with events.timed("save", step=done):
                (saver.finish if stopping else saver.save)(done, stage.name, state)
        if stopping:
            events.write("preempt", step=done)
            raise RunError(EXIT_PREEMPTED, f"stopped by SIGTERM after step {done}, which is saved")
        if anything:
            reader.restart_clock()
        step = done

    watchdog.enter("save")
    saver.settle()
    if saver.due:
        saver.finish(step, stage_at(stages, step - 1)[1].name, state)
    events.write("finish", step=step)
    return state


class _MetricsReader:
    """Reads a step's metrics from the device one step late, and writes them down.

    Attributes:
      pending: (number, stage, learning rate, metrics, flags on the device) of the last dispatched step.
      step: whose metrics were read last.
      skipped: how many steps in a row, up to that one, changed nothing.
      stop, save_failed: whether any process has wanted to stop, or has failed to save.
    """

    def __init__(self, logs: Logs, log_every: int, utilization: Callable[[str, float], float] | None):
        self.pending: tuple[int, Stage, float, Mapping[str, Any], Any] | None = None
        self.step = self.skipped = 0
        self.stop = self.save_failed = False
        self._logs, self._log_every, self._utilization = logs, log_every, utilization
        self.restart_clock()

    def fresh(self) -> "_MetricsReader":
        """One that has read nothing, into the same logs."""
        return _MetricsReader(self._logs, self._log_every, self._utilization)

    def restart_clock(self) -> None:
        """From now on counts for the next step's speed: evaluation and saving don't."""
        self._clock, self._data_seconds, self._left_out = time.monotonic(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting_for_data(self):
        begin = time.monotonic()
        yield
        self._data_seconds += time.monotonic() - begin

    def leave_out(self, event: str, seconds: float, **fields) -> None:
        """Time since the last reading that was no part of a step, an event of its own."""
        self._left_out += seconds
        self._logs.events.write(event, **fields, seconds=round(seconds, 4))

    def drop_pending(self) -> None:
        """Of the last dispatched step only the flags count: the run goes back before it."""
        if self.pending is not None:
            self._count(self.pending[-1])
            self.pending = None

    def _count(self, flags) -> None:
        stop, save_failed = (bool(flag) for flag in np.asarray(flags))
        self.stop, self.save_failed = self.stop or stop, self.save_failed or save_failed

    def read_previous(self) -> None:
        if self.pending is None:
            return
        (self.step, stage, rate, metrics, flags), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}  # waits for that step to end
        self._count(flags)
        self.skipped = int(values["skipped"])
        seconds = time.monotonic() - self._clock - self._left_out
        data_seconds = self._data_seconds
        self.restart_clock()
        row = {
            "step": self.step,
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
        skipped = {"skipped": True} if self.skipped else {}
        self._logs.metrics.append(row | skipped)
        self._logs.events.write(
            "step", step=self.step, seconds=round(seconds, 5), data_seconds=round(data_seconds, 5),
            tokens=int(values["tokens"]), **skipped,
        )  # fmt: skip
        self._logs.progress.update(row)
        if skipped:
            self._logs.progress.note(f"warning: step {self.step} has no finite loss and gradient: skipped")
        if self.step % self._log_every == 0:
            self._logs.tensorboard.write(self.step, numbers(row, "train/"))


def _evaluate(functions, logs, guards, step, stage, state, to_its_end=False) -> bool:
    """Held-out losses, written down; False if a process was told to stop meanwhile and it isn't the last."""
    if functions.evaluate is None:
        return True

    def should_stop():
        guards.watchdog.beat()
        return guards.flags.any_now(bool(guards.stop))[0] and not to_its_end

    guards.watchdog.enter("evaluate")
    with logs.events.timed("evaluate", step=step):
        losses = functions.evaluate(state.params, should_stop)
    if losses is None:
        return False
    row = {"step": step, "stage": stage, **losses}
    logs.evaluations.append(row)
    logs.tensorboard.write(step, numbers(row, "held_out/"))
    logs.progress.note(
        f"held out at step {step}: " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    )
    return True
