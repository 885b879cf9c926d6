"""`a3 bench memory`: the peak of a train step over lengths at equal tokens, in fresh processes."""

import itertools

from a3_jax.benchmarks.measurement import Row, note, ratio
from a3_jax.benchmarks.settings import Settings
from a3_jax.benchmarks.worker import Peaks, measure_apart
from a3_jax.errors import InputError

KINDS = ("two_stream", "ar")


def measure(settings: Settings) -> list[Row]:
    """Peak bytes of both steps at each length, of one length over the one before, and of the streams.

    `settings.batch_at` counts sequences of the longest length; shorter ones come in larger batches.

    Raises:
      InputError: a length that does not divide the longest.
    """
    lengths, longest = sorted(set(settings.lengths)), max(settings.lengths)
    for length in lengths:
        if longest % length:
            raise InputError(f"{length} does not divide the longest, {longest}", field="lengths")
    batches = {length: settings.batch_at(longest) * longest // length for length in lengths}
    peaks: dict[tuple[str, int], Peaks] = {}
    for length in lengths:
        for kind in KINDS:
            note(f"memory: {kind}, length {length}, batch {batches[length]}")
            peaks[kind, length] = measure_apart(kind, settings, length, batches[length])
    rows = []
    for length in lengths:
        setting = settings.describe(length, batches[length])
        for kind in KINDS:
            rows += peak_rows(kind, peaks[kind, length], setting)
        two_stream, ar = (peaks[kind, length].steps for kind in KINDS)
        rows.append(ratio("two_stream_peak_over_ar", two_stream, ar, setting))
    for shorter, longer in itertools.pairwise(lengths):
        setting = settings.describe(longer, batches[longer], against_length=shorter)
        for kind in KINDS:
            above, below = peaks[kind, longer].steps, peaks[kind, shorter].steps
            rows.append(ratio(f"{kind}_peak_over_shorter", above, below, setting))
    return rows


def peak_rows(name: str, peaks: Peaks, setting) -> list[Row]:
    """Rows of the peak while steps run, and of the whole process, compilation included."""
    return [
        Row(f"{name}_peak", "bytes", setting, peaks.steps),
        Row(f"{name}_process_peak", "bytes", setting, [peaks.process]),
    ]
