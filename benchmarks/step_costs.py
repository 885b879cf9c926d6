"""The step benchmark: compiled steps in turn at each length, under eight names of `a3 bench`.
Each name is a row of `STEP_BENCHMARKS`: the calls that take turns, the metrics of each, and the ratios.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints.fingerprint import fingerprints, tree_names
from a3_jax.decoding import scoring
from a3_jax.errors import InputError
from a3_jax.evaluation.models.any_order import AnyOrder as EvaluatedModel
from a3_jax.evaluation.models.interface import ScoreTarget as Target
from a3_jax.model.attention import IMPLEMENTATIONS, AttentionArgs, attention
from a3_jax.model.flops import step_ratio, train_step_flops
from a3_jax.model.sharding import batch_sharding, make_mesh
from a3_jax.model.two_stream import TwoStream
from a3_jax.ordering.intervals import bounds
from a3_jax.runtime import distributed, lease, watchdog
from a3_jax.tokenizer import bytes_tokenizer
from a3_jax.training import run_log
from a3_jax.training.step import make_loss
from benchmarks import torch_models
from benchmarks.fresh_process import fresh_process
from benchmarks.measurement import MeasurementError, Row, alternate, note, ratio
from benchmarks.settings import Settings, draw_rows, sort_rows
from benchmarks.train_steps import TrainStep, random_checkpoint, train_step

UNITS = {"time": "s", "rate": "tokens/s", "flops": "FLOPs", "temporary": "bytes", "peak": "bytes",
         "process_peak": "bytes", "loss_difference": "ratio", "grad_norm_difference": "ratio"}  # fmt: skip
PASSES = ("forward", "forward_backward")
OBJECTIVES = {"two_stream": "any_order", "ar": "ar"}
GUARD_CALLS, SAVE_EVERY = 200, 100  # steps between saves, as in the paper's configs
CHOICES = 4  # endings of each context in `eval`
TOLERANCES = {"loss": 1e-4, "grad_norm": 1e-3}  # relative, between the release and us


class Group(NamedTuple):
    """Named calls that take turns, and the `setting` of their rows."""

    setting: dict[str, Any]
    calls: Mapping[str, Callable[[], Any]]  # return when done, perhaps with quantities of `UNITS`
    constants: Mapping[str, Mapping[str, float]] = {}  # quantities that no call changes
    tokens: Mapping[str, int] = {}  # per call, where these are not those of the setting
    times: Mapping[str, int] = {}  # how often a call does what is timed, where that is not once


Measured = dict[tuple[str, int], dict[str, Any]]  # (name, length) -> quantity -> measurements, and "setting"


class StepBenchmark(NamedTuple):
    """One comparison of steps."""

    groups: Callable[[Settings, int], Iterator[Group]]  # yields a length's, one after the other
    metrics: Mapping[str, str] = {}  # metric, with {} for the call's name -> quantity of `UNITS`
    ratios: Sequence[tuple[str, str, str, str]] = ()  # (metric, quantity, name above, name below)
    more: Callable[[Settings, int, Measured], list[Row]] = lambda *_: []  # a length's further rows
    warm_ups: int = 1  # rounds that don't count


def measure(settings: Settings) -> list[Row]:
    """Runs the benchmark of the table that the settings name."""
    benchmark, rows, measured = STEP_BENCHMARKS[settings.name], [], {}
    for length in settings.lengths:
        for group in benchmark.groups(settings, length):
            found = _measure_group(settings, group, benchmark.warm_ups)
            del group  # before the memory of the next is taken
            for each, figures in found.items():
                measured[each, length] = figures
                rows += [
                    Row(metric.format(each), UNITS[quantity], figures["setting"], figures[quantity])
                    for metric, quantity in benchmark.metrics.items() if quantity in figures
                ]  # fmt: skip
    for length in settings.lengths:
        for metric, quantity, above, below in benchmark.ratios:
            if (above, length) in measured and (below, length) in measured:
                figures, others = measured[above, length], measured[below, length]
                rows.append(ratio(metric, figures[quantity], others[quantity], figures["setting"]))
        rows += benchmark.more(settings, length, measured)
    return rows


def _measure_group(settings: Settings, group: Group, warm_ups: int) -> dict[str, dict[str, Any]]:
    results, measured = {name: [] for name in group.calls}, {}
    label = f"{settings.name}: length {group.setting['length']}"
    calls = {
        name: lambda call=call, into=results[name]: into.append(call()) for name, call in group.calls.items()
    }
    for name, seconds in alternate(calls, settings.repeats, label, warm_ups).items():
        tokens = group.tokens.get(name, group.setting["length"] * group.setting["batch"])
        known = UNITS.keys() & (results[name][-1] if isinstance(results[name][-1], dict) else {})
        measured[name] = {
            "setting": group.setting,
            "time": [value / group.times.get(name, 1) for value in seconds],
            "rate": [tokens / value for value in seconds],
            **{quantity: [result[quantity] for result in results[name][warm_ups:]] for quantity in known},
            **{quantity: [value] for quantity, value in group.constants.get(name, {}).items()},
        }
    return measured


def _attention(settings: Settings, length: int) -> Iterator[Group]:
    """Yields each implementation in each pass: both streams' rows over the same keys."""
    size, batch = settings.d_model // settings.heads, settings.batch_at(length)
    setting = settings.describe(length, rows=2 * length, head_size=size)
    for unused in ("d_model", "layers", "mlp", "vocab", "remat", "attention"):
        del setting[unused]
    rows, rng = sort_rows(draw_rows(settings, length, batch)), np.random.default_rng(settings.seed)
    start, content_limit, query_limit = bounds(rows["ranks"], rows["ranks"], rows["segment_ids"])
    intervals = [np.concatenate(pair, axis=1) for pair in ((start, start), (content_limit, query_limit))]
    shapes = [(batch, 2 * length, settings.heads, size), *[(batch, length, settings.kv_heads, size)] * 2]
    drawn = [rng.standard_normal(shape, np.float32).astype(settings.dtype) for shape in shapes]
    arrays = jax.device_put((*drawn, *intervals), jax.devices()[0])
    absent, calls, constants = {"auto", *["splash"] * (jax.default_backend() != "tpu")}, {}, {}
    for direction in PASSES:
        for name in (name for name in IMPLEMENTATIONS if name not in absent):
            compiled: Any = _attention_pass(name, direction).lower(*arrays).compile()
            calls[f"{name}_{direction}"] = lambda run=compiled: jax.block_until_ready(run(*arrays))
            constants[f"{name}_{direction}"] = {"temporary": compiled.memory_analysis().temp_size_in_bytes}
    yield Group(setting, calls, constants)


def _attention_pass(name, direction):
    def forward(query, *others):
        return attention(query, *others, args=AttentionArgs(query.shape[-1] ** -0.5), implementation=name)

    def total(*arrays):
        return forward(*arrays).astype(np.float32).sum()

    return jax.jit(forward if direction == "forward" else jax.grad(total, argnums=(0, 1, 2)))


def _train(settings: Settings, length: int) -> Iterator[Group]:
    """Yields the two-stream step, the AR step of the same model, and that of `transformers`."""
    batch, calls = settings.batch_at(length), {}
    for name, objective in OBJECTIVES.items():
        calls[name] = train_step(settings, length, batch, objective)
    if reason := torch_models.why_no_torch(settings):
        note(f"train: no transformers step: {reason}")
    else:
        calls["transformers_ar"] = torch_models.llama_step(settings, length, batch)
    yield Group(settings.describe(length), calls)


def _train_formula(settings, length, measured) -> list[Row]:
    formula = step_ratio(settings.model(length), length, settings.tokens_per_group)
    times = zip(*(measured[name, length]["time"] for name in OBJECTIVES), strict=True)
    over_formula = [two_stream / ar / formula for two_stream, ar in times]
    return [
        Row("two_stream_flops_over_ar", "ratio", settings.describe(length), [formula]),
        Row("measured_over_formula", "ratio", settings.describe(length), over_formula),
    ]


def _memory(settings: Settings, length: int) -> Iterator[Group]:
    """Yields each step by itself, in a fresh process."""
    setting = settings.describe(length, _equal_tokens(settings, length))
    for name, objective in OBJECTIVES.items():
        task = {"settings": settings, "length": length, "batch": setting["batch"], "objective": objective}
        with fresh_process(name, train_step, **task) as step:
            yield Group(setting, {name: step})


def _equal_tokens(settings, length) -> int:
    """Returns the batch at a length, where `settings.batch_at` counts sequences of the longest."""
    longest = max(settings.lengths)
    if broken := [shorter for shorter in settings.lengths if longest % shorter]:
        raise InputError(f"{broken[0]} does not divide the longest, {longest}", field="lengths")
    return settings.batch_at(longest) * longest // length


def _memory_growth(settings, length, measured) -> list[Row]:
    """Returns the peaks over those of the next shorter length, if there is one."""
    rows, longer = [], {name: measured[name, length] for name in OBJECTIVES}
    for shorter in sorted(other for other in settings.lengths if other < length)[-1:]:
        for name, figures in longer.items():
            setting, below = figures["setting"] | {"against_length": shorter}, measured[name, shorter]["peak"]
            rows.append(ratio(f"{name}_peak_over_shorter", figures["peak"], below, setting))
    return rows


def _scaling(settings: Settings, length: int) -> Iterator[Group]:
    """Yields, at the longest length, the two-stream steps of all."""
    lengths, calls, constants = settings.lengths, {}, {}
    if len(set(lengths)) < 2:
        raise InputError("an exponent takes at least two lengths", field="lengths")
    if length != max(lengths):
        return
    tokens = {str(each): each * settings.batch_at(each) for each in lengths}
    for each in lengths:
        step = calls[str(each)] = train_step(settings, each, settings.batch_at(each))
        flops = train_step_flops(settings.model(each), each, group_size=settings.tokens_per_group).total
        temporary = step.compiled.memory_analysis().temp_size_in_bytes
        constants[str(each)] = {"temporary": temporary, "flops": flops * settings.batch_at(each)}
    yield Group(settings.describe(length, from_length=min(lengths)), calls, constants, tokens)


def _scaling_rows(settings, length, measured) -> list[Row]:
    """Returns a length's figures; with the longest, the exponents, of which times have one per round."""
    lengths, rows = settings.lengths, []
    figures = {each: measured[str(each), max(lengths)] for each in lengths}
    for metric, quantity in SCALING_METRICS.items():
        rows.append(Row(metric, UNITS[quantity], settings.describe(length), figures[length][quantity]))
        if length == max(lengths) and quantity != "rate":
            rounds = zip(*(figures[each][quantity] for each in lengths), strict=True)
            slopes = [float(np.polyfit(np.log(lengths), np.log(values), 1)[0]) for values in rounds]
            rows.append(Row(f"{quantity}_exponent", "exponent", figures[length]["setting"], slopes))
    return rows


def _release(settings: Settings, length: int) -> Iterator[Group]:
    """Yields the authors' step and ours from equal weights and ranks, each in a process of its own."""
    if not settings.release:
        raise InputError("give a directory that holds the authors' llama_xlnet.py", field="--release")
    differences = _compare_first_steps(settings, length)
    task = {"settings": settings, "length": length, "batch": settings.batch_at(length)}
    with (
        fresh_process("release", torch_models.release_step, **task) as theirs,
        fresh_process("a3", train_step, **task, residual="release") as ours,
    ):
        setting = settings.describe(length, residual="release")
        yield Group(setting, {"release": theirs, "a3": ours}, {"a3": differences})


def _compare_first_steps(settings, length) -> dict[str, float]:
    """Returns the relative differences of loss and gradient norm; both models are gone on return."""
    theirs = torch_models.release_step(settings, length, settings.batch_at(length))
    rows = draw_rows(settings, length, settings.batch_at(length))
    checkpoint = torch_models.open_as_ours(theirs.model, settings.model(length, "release"), "float32")
    ours = TrainStep(settings, checkpoint.config, rows, "any_order", checkpoint.params)
    first_ours, first_theirs, differences = ours(), theirs(), {}
    for name, tolerance in TOLERANCES.items():
        both = f"{first_theirs[name]:.6f} (theirs), {first_ours[name]:.6f} (ours)"
        note(f"release: length {length}: {name} {both}")
        difference = differences[f"{name}_difference"] = abs(first_ours[name] / first_theirs[name] - 1)
        if not difference <= tolerance:
            message = f"the {name} of equal weights and ranks differs: {both}"
            raise MeasurementError(f"release: length {length}: {message}")
    return differences


def _score(settings: Settings, length: int) -> Iterator[Group]:
    """Yields `a3 score` of whole texts, lines in and lines out, and the loss of training on the same rows."""
    rows, mesh = draw_rows(settings, length, settings.batch_at(length)), make_mesh(devices=jax.devices()[:1])
    lines = zip(rows["tokens"].tolist(), rows["ranks"].tolist(), strict=True)
    items = [{"tokens": tokens, "ranks": ranks} for tokens, ranks in lines]
    checkpoint = random_checkpoint(settings, settings.model(length))
    model = TwoStream(checkpoint.config, dtype=jnp.dtype(settings.dtype), attention=settings.attention)
    loss, batch = make_loss(model, objective="any_order"), sort_rows(rows)

    def score():
        return scoring.score(checkpoint, items, dtype=settings.dtype)

    def training_forward():
        with jax.set_mesh(mesh):
            return jax.block_until_ready(loss(checkpoint.params, jax.device_put(batch, batch_sharding(mesh))))

    _check_equal(-sum(line["logprob"] for line in score()), float(training_forward()[0]), settings.dtype)
    yield Group(settings.describe(length), {"score": score, "training_forward": training_forward})


def _check_equal(ours: float, theirs: float, dtype: str) -> None:
    """Refuses to compare the times of two different sums."""
    if not np.isclose(ours, theirs, rtol=1e-4 if dtype == "float32" else 2e-2):
        raise MeasurementError(f"{ours} nats, but {theirs} by the other contender")


def _eval(settings: Settings, length: int) -> Iterator[Group]:
    """Yields multiple choice under evaluation, and the scoring engine on batches made beforehand.

    "engine" takes the padded batches of the evaluation, "whole_rows" as many tokens without any padding.
    """
    checkpoint = random_checkpoint(settings, settings.model(length), bytes_tokenizer())
    model, targets = EvaluatedModel(checkpoint, dtype=settings.dtype), _draw_choices(settings, length)
    run = scoring.any_order_logprobs
    with mock.patch.object(scoring, "any_order_logprobs", wraps=run) as recorded:
        ours = sum(model.score(targets))
    batches = [call.args[1] for call in recorded.call_args_list]
    whole = [_whole_rows(batch, length) for batch in batches]

    def engine(batches):
        options = {"config": checkpoint.config, "dtype": settings.dtype}
        return jax.block_until_ready([run(checkpoint.params, batch, **options) for batch in batches])

    outs = zip(engine(batches), batches, strict=True)
    theirs = sum(float(np.sum(out.logprobs, where=batch.is_scored)) for out, batch in outs)
    _check_equal(ours, theirs, "float32")
    tokens = sum(len(target.tokens) for target in targets)
    yield Group(
        settings.describe(length, choices=CHOICES),
        {"eval": lambda: model.score(targets), "engine": lambda: engine(batches),
         "whole_rows": lambda: engine(whole)},
        tokens={"eval": tokens, "engine": tokens, "whole_rows": sum(batch.tokens.size for batch in whole)},
    )  # fmt: skip


def _draw_choices(settings, length) -> list[Target]:
    """Draws contexts of a third to three quarters of `length` tokens, endings of up to a quarter."""
    rng, targets = np.random.default_rng(settings.seed), []
    for _ in range(settings.batch_at(length)):
        context = rng.integers(0, settings.vocab, rng.integers(max(length // 3, 1), max(length * 3 // 4, 2)))
        for size in rng.integers(1, max(length // 4, 2), CHOICES):
            tokens = np.concatenate([context, rng.integers(0, settings.vocab, size)]).astype(np.int32)
            targets.append(Target(tokens, len(context), len(tokens)))
    return targets


def _whole_rows(batch: scoring.Batch, length: int) -> scoring.Batch:
    """Returns as many tokens in rows of `length`, and as large a share of them scored."""
    tokens = np.resize(batch.tokens, (max(1, batch.tokens.size // length), length)).astype(np.int32)
    columns = np.tile(np.arange(length, dtype=np.int32), (len(tokens), 1))
    scored = columns[:, length - max(length * 3 // 16, 1) :]
    return scoring.Batch(tokens, columns, columns, np.ones_like(columns), scored, np.ones_like(scored, bool))


def _guards(settings: Settings, length: int) -> Iterator[Group]:
    """Yields a step, what each step asks and writes to be safe, and the fingerprints of each save."""
    step = train_step(settings, length, settings.batch_at(length))
    flags = distributed.ProcessFlags(make_mesh(devices=jax.devices()[:1]))
    with (
        tempfile.TemporaryDirectory() as workdir,
        lease.Lease(workdir) as held,
        watchdog.Watchdog(workdir, 0, watchdog.Limits()) as watch,
        contextlib.closing(run_log.Events(f"{workdir}/events.jsonl")) as log,
    ):

        def guards():
            for number in range(GUARD_CALLS):
                watch.enter("data")
                watch.enter("step")
                flags.any(False, False)
                held.check()
                log.write("step", step=number, seconds=1.0, data_seconds=0.0, tokens=length)

        calls = {"step": step, "guards": guards, "fingerprints": lambda: fingerprints(tree_names(step.state))}
        yield Group(settings.describe(length, save_every=SAVE_EVERY), calls, times={"guards": GUARD_CALLS})


def _guards_share(settings, length, measured) -> list[Row]:
    times = zip(*(measured[name, length]["time"] for name in ("guards", "fingerprints", "step")), strict=True)
    shares = [(guards + saved / SAVE_EVERY) / step for guards, saved, step in times]
    return [Row("guards_and_fingerprints_over_step", "ratio", measured["step", length]["setting"], shares)]


SCALING_METRICS = {"step_time": "time", "tokens_per_second": "rate", "step_temporary": "temporary",
                   "step_flops": "flops"}  # fmt: skip
PEAKS = {"{}_peak": "peak", "{}_process_peak": "process_peak"}
STEP_BENCHMARKS = {
    "attention": StepBenchmark(
        _attention, {"{}_time": "time", "{}_temporary": "temporary"},
        [(f"{name}_{way}_{quantity}_over_dense", quantity, f"{name}_{way}", f"dense_{way}")
         for quantity in ("time", "temporary") for way in PASSES
         for name in IMPLEMENTATIONS if name != "dense"], warm_ups=2),
    "train": StepBenchmark(
        _train, {"{}_step_time": "time", "{}_tokens_per_second": "rate"},
        [("two_stream_step_time_over_ar", "time", "two_stream", "ar"),
         ("two_stream_step_time_over_transformers_ar", "time", "two_stream", "transformers_ar"),
         ("ar_step_speedup_over_transformers", "time", "transformers_ar", "ar")],
        _train_formula, warm_ups=2),
    "memory": StepBenchmark(
        _memory, PEAKS, [("two_stream_peak_over_ar", "peak", "two_stream", "ar")], _memory_growth),
    "scaling": StepBenchmark(_scaling, more=_scaling_rows),
    "release": StepBenchmark(
        _release, {"{}_step_time": "time", **PEAKS, "loss_difference_over_release": "loss_difference",
                   "grad_norm_difference_over_release": "grad_norm_difference"},
        [("step_time_speedup", "time", "release", "a3"),
         ("peak_memory_over_release", "peak", "a3", "release")]),
    "score": StepBenchmark(_score, {"{}_rate": "rate"}, [
        ("score_time_over_training_forward", "time", "score", "training_forward")]),
    "eval": StepBenchmark(_eval, {"{}_rate": "rate"}, [
        (f"eval_rate_over_{name}", "rate", "eval", name) for name in ("engine", "whole_rows")]),
    "guards": StepBenchmark(_guards, {"{}_time": "time"}, more=_guards_share, warm_ups=2),
}  # fmt: skip
