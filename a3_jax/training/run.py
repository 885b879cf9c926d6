"""Opening a run: config, newest checkpoint, model, data, mesh; then the loop."""

import contextlib
import dataclasses
import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from a3_jax.checkpoints.a3_format import Meta, StepWriter, with_manifest
from a3_jax.checkpoints.manifest import raise_damage, read_manifest
from a3_jax.errors import EXIT_NUMERICS, EXIT_PREEMPTED, DamagedCheckpoint, InputError, RunError
from a3_jax.model.accelerators import peak_flops
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import train_step_flops
from a3_jax.model.sharding import batch_sharding, make_mesh, number_of_slices, replicated
from a3_jax.ordering.curriculum import stage_at, trained_context
from a3_jax.paths import as_path, check_parents, read_json, write_json
from a3_jax.runtime.compile_cache import compilation_cache
from a3_jax.runtime.coordination import (
    assert_same_on_all_processes,
    barrier,
    is_process_zero,
    run_on_all,
    run_on_process_zero,
)
from a3_jax.runtime.distributed import PeerLost, ProcessFlags, exit_on_failure, rows_of_process
from a3_jax.runtime.lease import Lease
from a3_jax.runtime.preemption import StopRequest
from a3_jax.runtime.versions import software
from a3_jax.runtime.watchdog import Limits, Watchdog
from a3_jax.training import loop
from a3_jax.training.ahead import compiled_meanwhile, placed
from a3_jax.training.config import RunConfig, check_unchanged, model_config
from a3_jax.training.evaluate import held_out_losses
from a3_jax.training.events import Events, process_seconds
from a3_jax.training.metrics import JsonLines, Profiler, TensorBoard
from a3_jax.training.optimizer import learning_rate
from a3_jax.training.parts import network_of, optimizer_of
from a3_jax.training.progress import ProgressLine
from a3_jax.training.samples import make_sampler
from a3_jax.training.saving import Saver, storage_faults
from a3_jax.training.start import open_run_data, open_start, reopen_start
from a3_jax.training.state import Numerics, TrainState, abstract_state, init_state, state_shardings
from a3_jax.training.step import LOSSES, make_loss, make_reset, make_train_step

JSON_LINES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
SLICES_ARE_PROCESSES = "A3_SLICES_ARE_PROCESSES"  # an environment variable


def train(config: Mapping[str, Any], workdir, devices=None):
    """Trains a run to its end, from its start or from its newest intact checkpoint.

        WORKDIR/config.json      the resolved run; data.json: checksums of its data
        WORKDIR/metrics.jsonl    one object a step; eval.jsonl, samples.jsonl, events.jsonl beside it
        WORKDIR/checkpoints/N    an A3 checkpoint after N steps
        WORKDIR/tensorboard      and profile, if steps are to be profiled
        WORKDIR/lease.json       who writes here, while it does; stacks/ of a process that hung

    Several processes that were joined (`runtime.distributed.join`) make the same call and train one run.

    Args:
      config: `ConfigDict` or dictionary with the fields of `RunConfig`.
      workdir: directory of this run alone, local or in a bucket.
      devices: to run on; default all.

    Returns:
      The path of the last checkpoint.

    Raises:
      InputError: a config, data, tokenizer or checkpoint that can't be used, a directory that belongs to
        a run with another config or is written by another run, or processes that differ. Nothing is
        written then.
      RunError: told to stop (75), saving failed (77), or loss and gradients are no numbers any more (79).
    """
    run, workdir = RunConfig.from_config(config), as_path(workdir)
    last_words: list[Callable[[BaseException | None], None]] = []

    def tell(error=None):
        for function in reversed(last_words):
            function(error)

    with contextlib.ExitStack() as stack, exit_on_failure(tell):
        stop = stack.enter_context(StopRequest(tell))
        assert_same_on_all_processes({"config": run.to_dict(), **software()})
        newest = run_on_process_zero("progress", lambda: _find_progress(run, workdir))
        if not run_on_process_zero("done", lambda: _is_done(run, workdir, newest)):
            _train(run, workdir, newest, devices, stop, last_words, stack)
    done = max(newest or 0, run.total_steps)
    last = workdir / "checkpoints" / str(done)
    if is_process_zero():
        print(f"finished: {done} of {run.total_steps} steps, {last}")
    return last


def _train(run: RunConfig, workdir, newest: int | None, devices, stop: StopRequest, last_words, stack):
    """Opens the run and trains it to its end.

    Args:
      newest: the step to go on from, if it is intact; None for a new run.
      stop: SIGTERM.
      last_words: gets what is to be done if this process has to leave at once.
      stack: gets what is to be closed in the end.
    """
    checkpoints, is_first = workdir / "checkpoints", is_process_zero()
    mesh = open_mesh(run, devices)
    stack.enter_context(jax.set_mesh(mesh))
    start = open_start(run, mesh) if newest is None else reopen_start(checkpoints)
    data_file = workdir / "data.json"
    saved = read_json(data_file) if newest is not None and data_file.exists() else None
    data, described = run_on_all("data", lambda: open_run_data(run, start, saved))
    assert_same_on_all_processes({"data": described})
    optimizer = optimizer_of(run)
    shardings = state_shardings(start.model, optimizer, mesh)
    lease = _claim(run, workdir, newest, stack, last_words)  # the last thing that can be bad input
    if is_first:
        _warn(run, start, data)
        with storage_faults():
            write_json(data_file, described)
            write_json(workdir / "config.json", run.to_dict())
    barrier("written")  # nobody goes on before
    stack.enter_context(compilation_cache(run.compilation_cache, mesh.devices.flat[0].platform))

    events = stack.enter_context(contextlib.closing(Events(workdir / "events.jsonl", is_first)))
    last_words.append(functools.partial(_write_end, events))
    limits = Limits(step=run.hang_seconds)
    watchdog = stack.enter_context(
        Watchdog(workdir, jax.process_index(), limits, functools.partial(_write_hang, events))
    )
    watchdog.enter("restore")
    steps = _steps(run, start.model, mesh, optimizer, newest, stack)
    writer = stack.enter_context(StepWriter(checkpoints, run.keep, events.write, lease.check))
    began = time.monotonic()
    abstract = abstract_state(start.model, optimizer)
    restore = functools.partial(_restore, writer, abstract, shardings)
    state = restore() if newest is not None else None
    restored = state is not None
    if newest is not None and not restored:
        raise InputError("the steps that were there are gone", file=checkpoints)
    if state is None:
        state = init_state(
            start.model, optimizer, mesh, seed=run.seed, step=run.first_step, params=start.params
        )
    first_step, rows_ahead = int(state.step), int(state.numerics.rows_ahead)
    _write_beginning(events, run, mesh, first_step, time.monotonic() - began if restored else None)

    logs, samples = _open_logs(run, workdir, events, first_step, stack)
    guards = _guards(run, start, mesh, writer, stop, watchdog, lease, logs.progress.note)

    def roll_back(first, last):
        nonlocal state, rows_ahead
        state = _roll_back(first, last, rows_ahead, restore, guards.saver, writer, mesh)
        rows_ahead = int(state.numerics.rows_ahead)
        step = int(state.step)
        for file in (logs.metrics, logs.evaluations, samples):
            file.cut_back(step)
        events.write("rollback", from_step=last, to_step=step, skipped_steps=last - first + 1)
        return state, step, rows_ahead

    functions = _functions(run, start, data, mesh, optimizer, steps, samples, logs.progress.note, roll_back)
    loop.train(
        state,
        functions,
        logs,
        guards,
        stages=run.stages,
        first_step=first_step,
        rows_ahead=rows_ahead,
        evaluate_first=_evaluation_due(run, first_step, restored, logs.evaluations),
        intervals=loop.Intervals(
            run.eval_every, run.sample_every, run.checkpoint_every, run.log_every, run.max_skipped
        ),
    )


def _claim(run, workdir, newest, stack, last_words) -> Lease:
    """Takes the directory for this run alone.

    Raises:
      InputError: another run has it, or had it since `newest` was looked up.
    """
    lease = Lease(workdir)
    with storage_faults():
        run_on_all("lease", lambda: stack.enter_context(lease) if is_process_zero() else None)
    if run_on_process_zero("again", lambda: _find_progress(run, workdir)) != newest:
        raise InputError("another run has written here meanwhile", file=workdir)

    def give_back(error):  # with one process an exception comes to the end of the stack, which does so last
        if error is None or jax.process_count() > 1:
            lease.release()

    if is_process_zero():
        last_words.append(give_back)
    return lease


def open_mesh(run: RunConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of a run, over whose data and fsdp axes every microbatch's rows divide.

    With A3_SLICES_ARE_PROCESSES=1 in the environment each process stands for a slice: several slices,
    tried on CPUs.

    Raises:
      InputError: sizes that don't fit the devices, their slices or the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices_are_processes = os.environ.get(SLICES_ARE_PROCESSES) == "1"
    sizes = dict(run.mesh)
    if sizes.get("data") == 0:
        sizes["data"] = number_of_slices(devices, slices_are_processes)
    mesh = make_mesh(sizes, devices, slices_are_processes)
    rows, parts = run.batch_size // run.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(
            f"{run.batch_size} rows in {run.microbatches} microbatches can't be split over {parts} devices",
            field="batch_size",
        )
    return mesh


def _find_progress(run, workdir) -> int | None:
    """The newest step of the run in a directory, be it damaged by now; None if it is new there."""
    check_parents(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError("is a file, a run's directory is to be there", file=workdir)
    saved, step = workdir / "config.json", next(iter(with_manifest(workdir / "checkpoints")), None)
    if saved.exists():
        check_unchanged(read_json(saved), run, saved)
    elif step is not None:
        raise InputError("holds checkpoints, but no config.json of their run", file=workdir)
    return step


def _is_done(run, workdir, newest: int | None) -> bool:
    """Whether the last step is there and whole; a damaged one is trained again from the step before."""
    if newest is None or newest < run.total_steps:
        return False
    last = workdir / "checkpoints" / str(newest)
    try:
        raise_damage(last, read_manifest(last), deep=True)
    except DamagedCheckpoint:
        return False
    return True


def _warn(run, start, data) -> None:
    """What a user may not expect; only once nothing can be refused any more."""

    def shape(model: ModelConfig):
        return model.d_model, model.num_layers, model.num_heads, model.num_kv_heads, model.mlp_size

    if run.init_from and run.model and shape(start.model) != shape(model_config(run, start.model.vocab_size)):
        print(f"warning: config.model gives way to the model of {run.init_from}", file=sys.stderr)
    if data.heldout is None and run.eval_every:
        print("warning: no held-out documents, so no held-out losses", file=sys.stderr)


def _restore(writer, abstract, shardings, at_most: int | None = None) -> TrainState | None:
    """The state of the newest intact step, not after `at_most`; None where there is none."""
    target = placed(abstract, shardings)
    rest = {"step": target.step, "opt_state": target.opt_state, "numerics": target.numerics}
    found = writer.restore_newest(target.params, rest, at_most=at_most)
    if found is None:
        return None
    _, params, rest = found
    return TrainState(params=params, **{name: rest[name] for name in ("step", "opt_state", "numerics")})


def _roll_back(first, last, rows_ahead, restore, saver, writer, mesh) -> TrainState:
    """The state of the last checkpoint before steps that were skipped, to go on behind their rows.

    Once a run: what makes no numbers on other rows too is not the rows' fault.
    """
    said = f"steps {first} to {last} had no finite loss and gradient"
    if rows_ahead:
        raise RunError(EXIT_NUMERICS, f"{said}, after the run had rolled back once already")
    saver.settle()
    state = restore(at_most=first - 1)
    if state is None:
        raise RunError(EXIT_NUMERICS, f"{said}, and there is no checkpoint before them")
    writer.discard_after(int(state.step))
    skipped, ahead = int(state.numerics.skipped) + last - first + 1, last - int(state.step)
    numerics = jax.jit(lambda: Numerics.create(0, skipped, ahead), out_shardings=replicated(mesh))()
    return dataclasses.replace(state, numerics=numerics)


def _guards(run, start, mesh, writer, stop, watchdog, lease, note) -> loop.Guards:
    contexts = {stage.name: trained_context(stage) for stage in run.stages}

    def meta_of(stage):
        return Meta(start.model, source=start.source, stage=stage, context=contexts[stage],
                    run_config=run.to_dict())  # fmt: skip

    flags = ProcessFlags(mesh)
    saver = Saver(writer, flags, start.tokenizer, meta_of, attempts=run.save_attempts, note=note)
    check_lease = lease.check if is_process_zero() else lambda: None
    return loop.Guards(saver, flags, stop, watchdog, check_lease)


def _write_beginning(events, run, mesh, first_step, restore_seconds) -> None:
    events.write(
        "init", host=socket.gethostname(), pid=os.getpid(), processes=jax.process_count(),
        devices=mesh.size, first_step=first_step, total_steps=run.total_steps,
        seconds=round(process_seconds() - (restore_seconds or 0.0), 3),
    )  # fmt: skip
    if restore_seconds is not None:
        events.write("restore", step=first_step, seconds=round(restore_seconds, 4))


def _write_end(events, error) -> None:
    """The event of a run that ends before its time."""
    if isinstance(error, PeerLost):
        events.write("peer_lost", problem=str(error))
    elif error is not None and getattr(error, "status", None) != EXIT_PREEMPTED:
        events.write("failed", problem=f"{type(error).__name__}: {error}")
    elif error is None:
        events.write("preempt")


def _write_hang(events, phase, seconds, file) -> None:
    events.write("hang", phase=phase, seconds=round(seconds, 1), file=file)


def _open_logs(run, workdir, events, first_step, stack):
    """Where rows go, cut back to the step that the run goes on from; closed with the stack."""
    opened, is_first = [], is_process_zero()
    for name in JSON_LINES:
        opened.append(stack.enter_context(contextlib.closing(JsonLines(workdir / name, is_first))))
        opened[-1].cut_back(first_step)
    metrics, evaluations, samples = opened
    tensorboard = stack.enter_context(contextlib.closing(TensorBoard(workdir / "tensorboard", is_first)))
    progress = ProgressLine(first_step, run.total_steps, run.log_every, is_first)
    stack.enter_context(contextlib.closing(progress))
    profiler = Profiler(workdir / "profile", run.profile_steps, progress.note)
    stack.enter_context(contextlib.closing(profiler))
    return loop.Logs(metrics, evaluations, events, tensorboard, progress, profiler), samples


def _evaluation_due(run, first_step, restored, evaluations) -> str:
    """The stage whose held-out losses are missing at the step to begin with; empty if none are."""
    if not run.eval_every:
        return ""
    _, stage, stage_first = stage_at(run.stages, first_step)
    if run_on_process_zero("evaluated", lambda: evaluations.has(first_step)):
        return ""
    if not restored:
        return stage.name
    due = first_step == stage_first or first_step % run.eval_every == 0
    return stage_at(run.stages, first_step - 1)[1].name if due else ""


def _steps(run, model, mesh, optimizer, newest, stack) -> dict[tuple[str, float], Callable]:
    """The compiled step of each kind that the curriculum has; the first one's compilation has begun."""
    network, microbatches = network_of(run, model), run.microbatches
    make = functools.partial(make_train_step, network, optimizer, mesh, microbatches=microbatches)
    kinds = sorted({loop.step_kind(stage) for stage in run.stages})
    steps: dict = {kind: make(objective=kind[0], content_loss_weight=kind[1]) for kind in kinds}
    begin = run.first_step if newest is None else min(newest, run.total_steps - 1)
    first = loop.step_kind(stage_at(run.stages, begin)[1])
    steps[first] = compiled_meanwhile(steps[first], run, model, mesh, stack)
    return steps


def _functions(run, start, data, mesh, optimizer, steps, samples, note, roll_back) -> loop.Functions:
    """The compiled functions of a run, and those that write."""
    model = network_of(run, start.model)
    sharding, bos_id = batch_sharding(mesh), start.tokenizer.bos_id
    host, num_hosts = rows_of_process(sharding, run.batch_size)
    place = functools.partial(_place, sharding, num_hosts)
    table = data.heldout if data.heldout is not None else data.train

    def batches(step, rows_ahead):
        from a3_jax.data.batches import stream

        return stream(
            data.train, run.stages, run.seed, run.batch_size, step,
            host=host, num_hosts=num_hosts, bos_id=bos_id, rows_ahead=rows_ahead,
        )  # fmt: skip

    return loop.Functions(
        batches=batches,
        step=steps,
        reset_optimizer=make_reset(optimizer, model, mesh),
        learning_rate=lambda step: learning_rate(
            run.stages, step,
            learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, schedule=run.schedule,
        ),
        place=place,
        evaluate=_evaluation(run, model, data.heldout, place, sharding, bos_id),
        sample=make_sampler(table, start.model, start.tokenizer, samples, note, run.seed),
        roll_back=roll_back,
        utilization=_utilization(run, start.model, mesh),
    )  # fmt: skip


def _utilization(run, model, mesh):
    """A function (objective, tokens a second) -> model-FLOPs utilisation; None on unknown chips.

    Model FLOPs a second over the chips' dense bfloat16 peak, whatever the run's dtype (PaLM, arXiv
    2204.02311, appendix B). A token costs what it does in one document of `seq_len` tokens, and only
    tokens that are not padding count: rows half empty halve it, short documents packed into a row
    count a little more attention than they need.
    """
    peak = peak_flops(list(mesh.devices.flat))
    if peak is None:
        return None
    token_flops = {
        objective: train_step_flops(model, run.seq_len, objective=objective).total / run.seq_len
        for objective in {stage.objective for stage in run.stages}
    }
    return lambda objective, tokens_per_second: token_flops[objective] * tokens_per_second / peak


def _evaluation(run, model, heldout, place, sharding, bos_id):
    """A function (parameters, whether to stop): held-out losses; None without rows.

    What a stage gives is not scored.
    """
    if heldout is None:
        return None
    from a3_jax.data.batches import eval_batch

    bos_given = any(stage.bos_given for stage in run.stages)
    contexts = {order.context for stage in run.stages for order in stage.orders}
    context = contexts.pop() if len(contexts) == 1 else "flat"

    rows_a_batch = run.batch_size // run.microbatches
    host, num_hosts = rows_of_process(sharding, rows_a_batch)

    def batches(objective, order, group_size):
        rows = eval_batch(
            heldout, order, group_size, run.seed, rows_a_batch, run.eval_batches,
            host=host, num_hosts=num_hosts,
            objective=objective, context=context, bos_given=bos_given, bos_id=bos_id,
        )  # fmt: skip
        return map(place, rows)

    masks = model.config.mask_token is not None
    objectives = [objective for objective in LOSSES if masks or objective != "masked_diffusion"]
    losses = {objective: make_loss(model, objective=objective) for objective in objectives}
    return lambda params, should_stop: held_out_losses(losses, params, batches, should_stop)


def _place(sharding, parts, batch):
    """This process's rows, one of so many parts of the global batch [B, T], on its devices."""

    def place(rows):
        shape = (rows.shape[0] * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: place(rows) for name, rows in batch.items()}
