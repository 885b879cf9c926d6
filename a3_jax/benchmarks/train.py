"""`a3 bench train`: the two-stream step against the AR step of the same model, in JAX and in PyTorch."""

import functools
import importlib.util
from collections.abc import Callable

import jax

from a3_jax.benchmarks.measurement import Row, alternate, note, ratio
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows, thread_count
from a3_jax.benchmarks.steps import Steps
from a3_jax.model.flops import step_ratio


def measure(settings: Settings) -> list[Row]:
    """Seconds and tokens a second of each step, and their ratios, measured and by formula."""
    reason = why_no_torch(settings)
    if reason:
        note(f"train: no transformers step: {reason}")
    return [row for length in settings.lengths for row in _measure_length(settings, length)]


def why_no_torch(settings: Settings) -> str | None:
    """Why there is no PyTorch step beside ours; None where there is one."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if jax.default_backend() != "cpu" or settings.dtype != "float32":
        return "compared on CPU in float32 only"
    return None


def _measure_length(settings, length):
    batch, setting = settings.batch_at(length), settings.describe(length)
    steps = Steps(settings, settings.model(length))
    rows = {
        objective: sort_rows(draw_rows(settings, length, batch, objective))
        for objective in ("any_order", "ar")
    }
    note(f"train: length {length}: compiling")
    contenders: dict[str, Callable] = {
        "two_stream": steps.compile(rows["any_order"], "any_order"),
        "ar": steps.compile(rows["ar"], "ar"),
    }
    if why_no_torch(settings) is None:
        from a3_jax.benchmarks.torch_steps import llama_step

        contenders["transformers_ar"] = llama_step(
            settings.model(length), rows["ar"]["tokens"], threads=thread_count(), seed=settings.seed
        )
    seconds = alternate(contenders, settings.repeats, f"train: length {length}")
    table = []
    for name, times in seconds.items():
        table.append(Row(f"{name}_step_time", "s", setting, times))
        table.append(
            Row(f"{name}_tokens_per_second", "tokens/s", setting, [batch * length / t for t in times])
        )
    return table + _ratios(settings, length, seconds, setting)


def _ratios(settings, length, seconds, setting):
    over = functools.partial(ratio, setting=setting)
    formula = step_ratio(settings.model(length), length, settings.tokens_a_group)
    measured = over("two_stream_step_time_over_ar", seconds["two_stream"], seconds["ar"])
    rows = [
        measured,
        Row("two_stream_flops_over_ar", "ratio", setting, [formula]),
        Row("measured_over_formula", "ratio", setting, [value / formula for value in measured.repeats]),
    ]
    if "transformers_ar" in seconds:
        others = seconds["transformers_ar"]
        rows += [
            over("two_stream_step_time_over_transformers_ar", seconds["two_stream"], others),
            over("ar_step_speedup_over_transformers", others, seconds["ar"]),
        ]
    return rows
