"""A run on disk: whose directory it is, how far it is, its checkpoints in the background, going back."""

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterator
from typing import Any

import jax

from a3_jax.checkpoints.a3_format import Meta, with_manifest
from a3_jax.checkpoints.manifest import raise_damage, read_manifest
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.errors import EXIT_NUMERICS, EXIT_STORAGE, DamagedCheckpoint, InputError, RunError
from a3_jax.model.sharding import replicated
from a3_jax.paths import check_parents, read_json
from a3_jax.runtime.coordination import is_process_zero, run_on_all, run_on_process_zero
from a3_jax.runtime.distributed import ProcessFlags
from a3_jax.runtime.lease import Lease
from a3_jax.tokenizer import Tokenizer
from a3_jax.training.config import RunConfig, check_unchanged
from a3_jax.training.train_state import Numerics, TrainState


def find_progress(run: RunConfig, workdir) -> int | None:
    """Returns the newest step of the run in a directory, even if damaged; None if the run is new there."""
    check_parents(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError("is a file, a run's directory is to be there", file=workdir)
    saved, step = workdir / "config.json", next(iter(with_manifest(workdir / "checkpoints")), None)
    if saved.exists():
        check_unchanged(read_json(saved), run, saved)
    elif step is not None:
        raise InputError("holds checkpoints, but no config.json of their run", file=workdir)
    return step


def is_finished(run: RunConfig, workdir, newest: int | None) -> bool:
    """Returns whether the last step is there and whole; a damaged one is trained again."""
    if newest is None or newest < run.total_steps:
        return False
    last = workdir / "checkpoints" / str(newest)
    try:
        raise_damage(last, read_manifest(last), deep=True)
    except DamagedCheckpoint:
        return False
    return True


def claim(run: RunConfig, workdir, newest: int | None, stack: contextlib.ExitStack) -> Lease:
    """Takes the directory for this run alone; `stack` gives it back."""
    lease = Lease(workdir)
    with storage_faults():
        run_on_all("lease", lambda: stack.enter_context(lease) if is_process_zero() else None)
    if run_on_process_zero("again", lambda: find_progress(run, workdir)) != newest:
        raise InputError("another run has written here meanwhile", file=workdir)
    return lease


@contextlib.contextmanager
def storage_faults() -> Iterator[None]:
    """Treats a full or broken disk as no bad input: a launcher may start the run again.

    Raises:
      RunError: instead of the `InputError` that reports it.
    """
    try:
        yield
    except InputError as error:
        if getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise RunError(EXIT_STORAGE, str(error)) from error
        raise


class Saver:
    """The checkpoints of a run; several failures in a row end it.

    Attributes:
      due: a save failed, so the next step is to be saved instead. Equal on all processes.
    """

    def __init__(
        self,
        writer: Any,
        flags: ProcessFlags,
        tokenizer: Tokenizer,
        meta_of: Callable[[str], Meta],
        *,
        attempts: int,
        note: Callable[[str], None],
    ):
        """Saves through a `StepWriter`.

        Args:
          writer: the run's.
          flags: those of its processes.
          tokenizer: goes into every checkpoint.
          meta_of: name of a stage -> the checkpoint's `Meta`.
          attempts: failed saves in a row that end the run.
          note: shows the user a line of text.
        """
        self.due = False
        self._writer, self._flags, self._tokenizer, self._meta_of = writer, flags, tokenizer, meta_of
        self._attempts, self._note = attempts, note
        self._failures, self._in_flight, self._failed = 0, False, False

    def has_failed(self) -> bool:
        """Returns whether a save has failed in this process since the last call; doesn't wait."""
        error = self._writer.failure()
        if error is not None:
            self._report(error)
        failed, self._failed = self._failed, False
        return failed

    def count_failure(self) -> None:
        """Counts a failure; must be called in all processes once one has failed to save.

        Raises:
          RunError: it was one failure too many.
        """
        if not self._in_flight:
            return  # reported late, and already counted by whoever waited for it
        self._failures, self._in_flight, self.due = self._failures + 1, False, True
        if self._failures >= self._attempts:
            raise RunError(EXIT_STORAGE, f"saving failed {self._failures} times in a row")

    def save(self, step: int, stage: str, state: TrainState) -> None:
        """Waits for the previous save and begins one; returns when the arrays may be used again.

        Raises:
          RunError: too many failed.
        """
        self.settle()
        rest = {"step": state.step, "opt_state": state.opt_state, "numerics": state.numerics}
        self.due, self._in_flight = False, True
        try:
            self._writer.save(step, state.params, rest, self._meta_of(stage), self._tokenizer)
        except Exception as error:  # at once; storage has no common type of errors
            self._report(error)

    def settle(self) -> None:
        """Waits for the last save, so that all processes know whether it succeeded.

        Raises:
          RunError: too many failed.
        """
        try:
            self._writer.wait()
        except Exception as error:
            self._report(error)
        if self._flags.any_now(self.has_failed())[0]:
            self.count_failure()
        elif self._in_flight:
            self._failures, self._in_flight = 0, False

    def finish(self, step: int, stage: str, state: TrainState) -> None:
        """Saves a step, again if that fails, and returns when it is on disk.

        Raises:
          RunError: too many failed.
        """
        self.due = True
        while self.due:
            self.save(step, stage, state)
            self.settle()

    def _report(self, error: Exception) -> None:
        self._failed = True
        self._note(f"warning: a save failed: {' '.join(str(error).split())[:300]}")


def restore(writer: StepWriter, target: TrainState, at_most: int | None = None) -> TrainState | None:
    """Restores the newest intact step, not after `at_most`; returns None if there is none.

    Args:
      writer: the run's.
      target: the state as shapes with their shardings.
      at_most: number of a step.
    """
    rest = {"step": target.step, "opt_state": target.opt_state, "numerics": target.numerics}
    found = writer.restore_newest(target.params, rest, at_most=at_most)
    if found is None:
        return None
    _, params, rest = found
    return TrainState(params=params, **{name: rest[name] for name in ("step", "opt_state", "numerics")})


def roll_back(
    first: int, last: int, skipped_batches: int, saver: Saver, writer: StepWriter, target: TrainState, mesh
) -> TrainState:
    """Restores the last checkpoint before the steps `first` to `last`, to go on with the rows after theirs.

    At most once per run: if the loss is non-finite on other data too, the data is not the cause.

    Args:
      first, last: the steps without a finite loss and gradient, counted from 1.
      skipped_batches: those that an earlier roll-back skipped.
      saver: waits for the last save.
      writer, target: as of `restore`.
      mesh: the run's.

    Raises:
      RunError: there was an earlier roll-back, or there is no such checkpoint.
    """
    said = f"steps {first} to {last} had no finite loss and gradient"
    if skipped_batches:
        raise RunError(EXIT_NUMERICS, f"{said}, after the run had rolled back once already")
    saver.settle()
    state = restore(writer, target, at_most=first - 1)
    if state is None:
        raise RunError(EXIT_NUMERICS, f"{said}, and there is no checkpoint before them")
    writer.discard_after(int(state.step))
    skipped, skipped_batches = int(state.numerics.skipped) + last - first + 1, last - int(state.step)
    numerics = jax.jit(lambda: Numerics.create(0, skipped, skipped_batches), out_shardings=replicated(mesh))()
    return dataclasses.replace(state, numerics=numerics)
