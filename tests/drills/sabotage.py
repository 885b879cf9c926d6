"""What a drill does to a process from inside: `A3_DRILL` names it, the drills' config puts it in place.

nan:4,5          the weights of these steps' rows (from 1) are no numbers
die:6            kill -9 as soon as the rows of step 6 are asked for
poison:6         the same, once the saves before it are on disk
stuck:6          sleeps before step 6 for ever
slow_rows        the rows of every step take half a second
slow_eval        every held-out batch takes a fifth of a second
slow_save:2      a save takes 2 seconds longer
"""

import os
import resource
import signal
import threading
import time

import numpy as np


def put_in_place() -> None:
    name, _, argument = os.environ.get("A3_DRILL", "").partition(":")
    if name:
        _FAULTS[name](argument)


def _for_each_batch(change):
    """`change(step, batch) -> batch`, steps from 1, on what a run trains on."""
    from a3_jax.data import feature_converter

    stream = feature_converter.stream

    def changed(plan, first_step):
        for number, batch in enumerate(stream(plan, first_step), start=first_step + 1):
            yield change(number + plan.skipped_batches, batch)

    feature_converter.stream = changed


def _nan(argument):
    steps = {int(step) for step in argument.split(",")}

    def change(step, batch):
        if step in steps:
            batch["weights"] = np.full_like(batch["weights"], np.nan)
        return batch

    _for_each_batch(change)


def _at(argument, fault):
    def change(step, batch):
        if step == int(argument):
            fault()
        return batch

    _for_each_batch(change)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_saved():
    for thread in threading.enumerate():
        if thread.name == "a3_save":
            thread.join()
    _die()


def _slow_rows(_):
    def change(_, batch):
        time.sleep(0.5)
        return batch

    _for_each_batch(change)


def _slow_eval(_):
    from a3_jax.data import batches

    eval_batch = batches.eval_batch

    def slow(*args, **options):
        for batch in eval_batch(*args, **options):
            time.sleep(0.2)
            yield batch

    batches.eval_batch = slow


def _slow_save(argument):
    from a3_jax.checkpoints.step_writer import StepWriter

    commit = StepWriter._commit

    def slow(self, *args):
        time.sleep(float(argument))
        return commit(self, *args)

    StepWriter._commit = slow


def _small_files(argument):
    def limit(step, batch):
        if step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(argument), resource.RLIM_INFINITY))
        return batch

    _for_each_batch(limit)


_FAULTS = {
    "nan": _nan,
    "die": lambda argument: _at(argument, _die),
    "poison": lambda argument: _at(argument, _die_saved),
    "stuck": lambda argument: _at(argument, lambda: time.sleep(3600)),
    "slow_rows": _slow_rows,
    "slow_eval": _slow_eval,
    "slow_save": _slow_save,
    "small_files": _small_files,
}
