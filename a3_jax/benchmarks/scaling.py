"""`a3 bench scaling`: how time and memory of the two-stream step grow with the length of a sequence."""

from a3_jax.benchmarks.measurement import Row, alternate, fit_exponent, note
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows
from a3_jax.benchmarks.steps import Steps
from a3_jax.errors import InputError
from a3_jax.model.flops import train_step_flops


def measure(settings: Settings) -> list[Row]:
    """Time, temporary memory and FLOPs of a step at each length, and the exponent of each.

    Raises:
      InputError: fewer than two lengths.
    """
    lengths = settings.lengths
    if len(set(lengths)) < 2:
        raise InputError("an exponent takes at least two lengths", field="lengths")
    config = settings.model(max(lengths))
    steps, compiled = Steps(settings, config), {}
    for length in lengths:
        note(f"scaling: length {length}: compiling")
        rows = sort_rows(draw_rows(settings, length, settings.batch_at(length)))
        compiled[length] = steps.compile(rows, "any_order")
    times = alternate(
        {str(length): compiled[length] for length in lengths}, settings.repeats, "scaling", warm_ups=1
    )
    seconds = {length: times[str(length)] for length in lengths}
    temporary = {length: compiled[length].temporary_bytes() for length in lengths}
    tokens = {length: length * settings.batch_at(length) for length in lengths}
    flops = {
        length: settings.batch_at(length)
        * train_step_flops(config, length, group_size=settings.tokens_a_group).total
        for length in lengths
    }
    rows = []
    for length in lengths:
        setting = settings.describe(length)
        speed = [tokens[length] / value for value in seconds[length]]
        rows += [
            Row("step_time", "s", setting, seconds[length]),
            Row("tokens_per_second", "tokens/s", setting, speed),
            Row("step_temporary", "bytes", setting, [temporary[length]]),
            Row("step_flops", "FLOPs", setting, [flops[length]]),
        ]
    rows += _exponents(settings, seconds, temporary, flops)
    return rows


def _exponents(settings, seconds, temporary, flops):
    """Repeat by repeat for the time: one pass over all lengths gives one exponent."""
    lengths = settings.lengths
    setting = settings.describe(max(lengths), from_length=min(lengths))
    passes = zip(*(seconds[length] for length in lengths), strict=True)
    return [
        Row("time_exponent", "exponent", setting, [fit_exponent(lengths, times) for times in passes]),
        Row("flops_exponent", "exponent", setting, [fit_exponent(lengths, list(flops.values()))]),
        Row("temporary_exponent", "exponent", setting, [fit_exponent(lengths, list(temporary.values()))]),
    ]
