"""`a3 bench attention`: the implementations against each other, both streams' rows over the same keys."""

from collections.abc import Callable

import jax
import numpy as np

from a3_jax.benchmarks.measurement import Row, alternate, note, ratio
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows
from a3_jax.benchmarks.steps import temporary_bytes
from a3_jax.model.attention import IMPLEMENTATIONS, attention
from a3_jax.ordering.intervals import bounds

PASSES = ("forward", "forward_backward")


def measure(settings: Settings) -> list[Row]:
    """Time and temporary memory of each implementation and pass, and of all others over `dense`."""
    rows = []
    for length in settings.lengths:
        arrays = _arrays(settings, length)
        for name in PASSES:
            rows += _compare(settings, length, name, arrays)
    return rows


def names_here() -> list[str]:
    """The implementations that run on this machine's first device."""
    absent = {"auto"} if jax.default_backend() == "tpu" else {"auto", "splash"}
    return [name for name in IMPLEMENTATIONS if name not in absent]


def _compare(settings, length, pass_name, arrays):
    names, setting = names_here(), settings.describe(length, rows=2 * length)
    for unused in ("d_model", "layers", "mlp", "vocab", "remat", "attention"):
        del setting[unused]
    setting["head_size"] = settings.d_model // settings.heads
    note(f"attention: length {length}, {pass_name}: compiling")
    compiled = {name: jax.jit(_passes(settings, name)[pass_name]).lower(*arrays).compile() for name in names}
    seconds = alternate(
        {name: _call(function, arrays) for name, function in compiled.items()},
        settings.repeats,
        f"attention: length {length}, {pass_name}",
    )
    temporary = {name: temporary_bytes(compiled[name]) for name in names}
    rows = []
    for name in names:
        rows.append(Row(f"{name}_{pass_name}_time", "s", setting, seconds[name]))
        rows.append(Row(f"{name}_{pass_name}_temporary", "bytes", setting, [temporary[name]]))
    for name in (name for name in names if name != "dense"):
        rows.append(ratio(f"{name}_{pass_name}_time_over_dense", seconds[name], seconds["dense"], setting))
        memory = ratio(
            f"{name}_{pass_name}_temporary_over_dense", [temporary[name]], [temporary["dense"]], setting
        )
        rows.append(memory)
    return rows


def _passes(settings, implementation) -> dict[str, Callable]:
    """Pass -> function of (query, key, value, start, limit)."""
    scale = (settings.d_model // settings.heads) ** -0.5

    def forward(query, key, value, start, limit):
        return attention(query, key, value, start, limit, scale=scale, implementation=implementation)

    def total(query, key, value, start, limit):
        return forward(query, key, value, start, limit).astype(np.float32).sum()

    return {"forward": forward, "forward_backward": jax.grad(total, argnums=(0, 1, 2))}


def _call(compiled, arrays):
    return lambda: jax.block_until_ready(compiled(*arrays))


def _arrays(settings, length):
    """query [B, 2S, N, H]; key, value [B, S, K, H]; start, limit [B, 2S]: content rows, then query rows."""
    batch, size = settings.batch_at(length), settings.d_model // settings.heads
    rows = sort_rows(draw_rows(settings, length, batch))
    start, content_limit, query_limit = bounds(rows["ranks"], rows["ranks"], rows["segment_ids"])
    rng = np.random.default_rng(settings.seed)
    shapes = [(batch, 2 * length, settings.heads, size)] + [(batch, length, settings.kv_heads, size)] * 2
    drawn = [rng.standard_normal(shape, np.float32).astype(settings.dtype) for shape in shapes]
    both = [np.concatenate(pair, axis=1) for pair in ((start, start), (content_limit, query_limit))]
    return tuple(jax.device_put(array, jax.devices()[0]) for array in (*drawn, *both))
