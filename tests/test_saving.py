"""Failed saves are told, tried again and counted; a few in a row end the run."""

import errno

import pytest

from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.model.sharding import make_mesh
from a3_jax.runtime.distributed import ProcessFlags
from a3_jax.training.saving import Saver, storage_faults
from a3_jax.training.train_state import TrainState


class Writer:
    """Saves that end at the next look, well or badly by a list."""

    def __init__(self, *outcomes):
        self.outcomes, self.saved, self._pending = list(outcomes), [], None

    def save(self, step, *_):
        self._pending = step, self.outcomes.pop(0)

    def failure(self):
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending[1]:
            self.saved.append(pending[0])
            return None
        return OSError("No space left on device")

    def wait(self):
        failure = self.failure()
        if failure is not None:
            raise failure


STATE = TrainState(0, {}, {}, None)


def saver(writer, attempts=3):
    notes = []
    made = Saver(
        writer, ProcessFlags(make_mesh()), None, lambda stage: None, attempts=attempts, note=notes.append
    )
    return made, notes


def test_a_failure_is_known_by_the_next_look_and_tried_again():
    writer = Writer(False, True)
    made, notes = saver(writer)
    made.save(4, "l2r", STATE)
    assert made.has_failed() and not made.has_failed(), "told once"
    made.count_failure()
    assert made.due and len(notes) == 1 and "No space left" in notes[0]
    made.save(5, "l2r", STATE)
    made.settle()
    assert writer.saved == [5] and not made.due


def test_only_failures_in_a_row_count():
    writer = Writer(False, False, True, False, False, True)
    made, _ = saver(writer)
    for step in range(1, 7):
        made.save(step, "l2r", STATE)
    made.settle()
    assert writer.saved == [3, 6]


@pytest.mark.parametrize("how", ["looking", "saving", "finishing"])
def test_too_many_end_the_run(how):
    made, notes = saver(Writer(False, False, False, False), attempts=3)

    def save_all():
        for step in range(1, 5):
            (made.finish if how == "finishing" else made.save)(step, "l2r", STATE)
            if how == "looking" and made.has_failed():
                made.count_failure()

    with pytest.raises(RunError, match="3 times in a row") as error:
        save_all()
    assert error.value.status == EXIT_STORAGE and len(notes) == 3


def test_finish_returns_when_it_is_on_disk():
    writer = Writer(False, True)
    made, _ = saver(writer)
    made.finish(7, "l2r", STATE)
    assert writer.saved == [7]


def test_a_full_disk_is_no_bad_input():
    """And what is bad input stays so."""

    def write(number):
        with storage_faults():
            raise InputError("can't be written", file="config.json") from OSError(number, "no")

    with pytest.raises(RunError, match=r"config.json: can't be written") as error:
        write(errno.ENOSPC)
    assert error.value.status == EXIT_STORAGE
    with pytest.raises(InputError):
        write(errno.EACCES)
