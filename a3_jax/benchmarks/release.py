"""`a3 bench release`: our train step against the authors' PyTorch code, from equal weights and ranks."""

import dataclasses
import os
import tempfile

import jax

from a3_jax.benchmarks.measurement import MeasurementError, Row, alternate, note, ratio
from a3_jax.benchmarks.memory import peak_rows
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows, thread_count
from a3_jax.benchmarks.torch_steps import load_release, release_step, save_release
from a3_jax.benchmarks.worker import StepApart, measure_apart
from a3_jax.errors import InputError

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3  # relative
PEAK_STEPS = 2  # peaks hardly differ from step to step


def measure(settings: Settings) -> list[Row]:
    """Equal first losses, then step times in turn, then both peaks, at each length; on CPU.

    Raises:
      InputError: no clone, or one that can't be used.
      MeasurementError: the losses differ.
    """
    if not settings.release:
        raise InputError("give a directory that holds the authors' llama_xlnet.py", field="--release")
    module = load_release(settings.release)
    os.environ["JAX_PLATFORMS"] = "cpu"  # where PyTorch's side runs; for the processes started from here
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for length in settings.lengths:
        rows += _measure_times(settings, length, module)
        rows += _measure_peaks(settings, length)
    return rows


def _measure_times(settings, length, module):
    """Equal first steps in this process; then steps in turn, each contender in a process of its own."""
    setting, batch = settings.describe(length, residual="release"), settings.batch_at(length)
    differences = _compare_first_steps(settings, length, module)
    note(f"release: length {length}: starting both")
    with (
        StepApart("release", settings, length, batch) as theirs,
        StepApart("two_stream_release", settings, length, batch) as ours,
    ):
        contenders = {"release": theirs, "a3": ours}
        seconds = alternate(contenders, settings.repeats, f"release: length {length}", warm_ups=2)
    return [
        Row("loss_difference_over_release", "ratio", setting, [differences["loss"]]),
        Row("grad_norm_difference_over_release", "ratio", setting, [differences["grad_norm"]]),
        Row("release_step_time", "s", setting, seconds["release"]),
        Row("a3_step_time", "s", setting, seconds["a3"]),
        ratio("step_time_speedup", seconds["release"], seconds["a3"], setting),
    ]


def _compare_first_steps(settings, length, module) -> dict[str, float]:
    """Relative differences of loss and gradient norm; both models are gone on return."""
    theirs, ours = _open_pair(settings, length, module)
    note(f"release: length {length}: comparing first steps")
    first_theirs, first_ours = theirs(), ours()
    both = f"{first_theirs['loss']:.6f} (theirs), {first_ours['loss']:.6f} (ours)"
    note(f"release: length {length}: loss {both}")
    differences = {}
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        differences[name] = abs(first_ours[name] - first_theirs[name]) / abs(first_theirs[name])
        if not differences[name] <= tolerance:
            raise MeasurementError(
                f"release: length {length}: the {name} of equal weights and ranks differs: "
                f"{first_theirs[name]:.6f} (theirs), {first_ours[name]:.6f} (ours)"
            )
    return differences


def _open_pair(settings, length, module):
    """(their step, our step) from the same weights, which go through a checkpoint directory."""
    from a3_jax.benchmarks.steps import Steps
    from a3_jax.checkpoints.opening import open_checkpoint

    config = settings.model(length, residual="release")
    rows = draw_rows(settings, length, settings.batch_at(length))
    theirs = release_step(module, config, rows, thread_count(), settings.seed)
    with tempfile.TemporaryDirectory() as directory:
        save_release(theirs.model, config, directory)
        checkpoint = open_checkpoint(directory, dtype="float32")
    note(f"release: length {length}: compiling")
    ours = Steps(settings, checkpoint.config, checkpoint.params).compile(sort_rows(rows), "any_order")
    return theirs, ours


def _measure_peaks(settings, length):
    setting, batch = settings.describe(length, residual="release"), settings.batch_at(length)
    note(f"release: length {length}: peak memory of each, in a process of its own")
    settings = dataclasses.replace(settings, repeats=min(settings.repeats, PEAK_STEPS))
    kinds = ("release", "two_stream_release")
    theirs, ours = (measure_apart(kind, settings, length, batch) for kind in kinds)
    return [
        *peak_rows("release", theirs, setting),
        *peak_rows("a3", ours, setting),
        ratio("peak_memory_over_release", ours.steps, theirs.steps, setting),
    ]
