"""Saving in the background: what failed is known by the next step, and to all processes alike."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

from a3_jax.checkpoints.a3_format import Meta
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.runtime.distributed import ProcessFlags
from a3_jax.tokenizer import Tokenizer
from a3_jax.training.state import TrainState


@contextlib.contextmanager
def storage_faults() -> Iterator[None]:
    """A disk that is full or broken is no bad input: a launcher may start the run again.

    Raises:
      RunError: in place of the `InputError` that says so.
    """
    try:
        yield
    except InputError as error:
        if getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise RunError(EXIT_STORAGE, str(error)) from error
        raise


class Saver:
    """The checkpoints of a run; a few failures in a row end it.

    Attributes:
      due: a save failed, the next step is to be saved in its place. Alike in all processes.
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
          writer: of the run.
          flags: of its processes.
          tokenizer: goes into every checkpoint.
          meta_of: name of a stage -> what the checkpoint says of itself.
          attempts: failed saves in a row that end the run.
          note: shows a line to whoever watches.
        """
        self.due = False
        self._writer, self._flags, self._tokenizer, self._meta_of = writer, flags, tokenizer, meta_of
        self._attempts, self._note = attempts, note
        self._failures, self._in_flight, self._failed = 0, False, False

    def has_failed(self) -> bool:
        """Whether a save has failed in this process since it was asked last; doesn't wait."""
        error = self._writer.failure()
        if error is not None:
            self._report(error)
        failed, self._failed = self._failed, False
        return failed

    def count_failure(self) -> None:
        """To be called in all processes once one has failed to save.

        Raises:
          RunError: it was one time too many.
        """
        if not self._in_flight:
            return  # told late, and counted by whoever waited for it
        self._failures, self._in_flight, self.due = self._failures + 1, False, True
        if self._failures >= self._attempts:
            raise RunError(EXIT_STORAGE, f"saving failed {self._failures} times in a row")

    def save(self, step: int, stage: str, state: TrainState) -> None:
        """Begins to save; returns when the arrays may be used again. Waits for the save before.

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
        """Waits for the last save, so that all processes know what became of it.

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
        """Saves a step, tries again where that fails, and returns when it is on disk.

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
