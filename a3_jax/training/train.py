"""A training run, told from top to bottom.

    config --> processes agree --> mesh --> model, tokenizer, rows --> lease --> restore --> step, step, ...

What each part is made of is in `setup`; what one step computes in `step` and `loss`; what is on disk in
`saving` (checkpoints) and `records` (rows, events).
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.errors import EXIT_PREEMPTED, InputError, RunError
from a3_jax.model.sharding import batch_sharding
from a3_jax.ordering.curriculum import stage_at, trained_context
from a3_jax.paths import as_path, read_json, write_json
from a3_jax.runtime.compile_cache import compilation_cache
from a3_jax.runtime.coordination import (
    assert_same_on_all_processes,
    barrier,
    is_process_zero,
    run_on_all,
    run_on_process_zero,
)
from a3_jax.runtime.distributed import ProcessFlags, exit_on_failure, rows_of_process
from a3_jax.runtime.preemption import StopRequest
from a3_jax.runtime.versions import software
from a3_jax.runtime.watchdog import Limits, Watchdog
from a3_jax.training.config import RunConfig
from a3_jax.training.heldout import make_evaluator, stage_due, write_losses
from a3_jax.training.optimizer import learning_rate, make_optimizer
from a3_jax.training.run_log import Events, LastWords, MetricsReader, open_records
from a3_jax.training.samples import make_sampler
from a3_jax.training.saving import (
    Saver,
    claim,
    find_progress,
    is_finished,
    restore,
    roll_back,
    storage_faults,
)
from a3_jax.training.setup import (
    compile_in_background,
    device_batch,
    init_from_checkpoint,
    init_from_config,
    make_model,
    make_utilization,
    open_mesh,
    open_run_data,
    step_arguments,
    warn,
)
from a3_jax.training.step import make_reset, make_train_step, step_kind
from a3_jax.training.train_state import init_state


def train(config: Mapping[str, Any], workdir, devices=None):
    """Trains a run to its end, from its start or from its newest intact checkpoint.

        WORKDIR/config.json      the resolved run; data.json: checksums of its data
        WORKDIR/metrics.jsonl    one object per step; eval.jsonl, samples.jsonl, events.jsonl beside it
        WORKDIR/checkpoints/N    an A3 checkpoint after N steps
        WORKDIR/tensorboard      and profile, if steps are to be profiled
        WORKDIR/lease.json       who writes here, while it does; stacks/ of a process that hung

    Several processes that have joined (`runtime.distributed.join`) make the same call and train one run.

    Args:
      config: `ConfigDict` or dictionary with the fields of `RunConfig`.
      workdir: directory of this run alone, local or in a bucket.
      devices: those to run on; default all.

    Returns:
      The path of the last checkpoint.

    Raises:
      InputError: a config, data, tokenizer or checkpoint that can't be used, a directory that belongs to
        a run with another config or is written by another run, or processes that differ. Nothing is
        written then.
      RunError: told to stop (75), saving failed (77), or loss and gradients are not finite any more (79).
    """
    run, workdir = RunConfig.from_config(config), as_path(workdir)
    checkpoints, last_words = workdir / "checkpoints", LastWords()
    with contextlib.ExitStack() as stack, exit_on_failure(last_words):
        # 1. The processes: one config, one code, and how far the run is.
        is_first = is_process_zero()
        stop = stack.enter_context(StopRequest(last_words))
        assert_same_on_all_processes({"config": run.to_dict(), **software()})
        newest = run_on_process_zero("progress", lambda: find_progress(run, workdir))
        if run_on_process_zero("done", lambda: is_finished(run, workdir, newest)):
            return _report_finished(run, checkpoints, newest)

        # 2. Mesh, model, tokenizer, rows and optimiser; up to here bad input leaves nothing behind.
        mesh = open_mesh(run, devices)
        stack.enter_context(jax.set_mesh(mesh))
        start = init_from_config(run, mesh) if newest is None else init_from_checkpoint(checkpoints)
        data_file = workdir / "data.json"
        saved = read_json(data_file) if newest is not None and data_file.exists() else None
        data, described = run_on_all("data", lambda: open_run_data(run, start, saved))
        assert_same_on_all_processes({"data": described})
        model = make_model(run, start.model)
        optimizer = make_optimizer(run.optimizer, **run.optimizer_options)
        arguments = step_arguments(run, start.model, mesh)
        lease = claim(run, workdir, newest, stack)
        if is_first:
            last_words.lease = lease
            warn(run, start, data)
            with storage_faults():
                write_json(data_file, described)
                write_json(workdir / "config.json", run.to_dict())
        barrier("written")

        # 3. What watches over the run. Its first step is compiled while it is restored and evaluated.
        stack.enter_context(compilation_cache(run.compilation_cache, mesh.devices.flat[0].platform))
        events = stack.enter_context(contextlib.closing(Events(workdir / "events.jsonl", is_first)))
        last_words.events = events
        watchdog = stack.enter_context(
            Watchdog(workdir, jax.process_index(), Limits(step=run.hang_seconds), events.hang)
        )
        watchdog.enter("restore")
        steps: dict = {
            kind: make_train_step(
                model, optimizer, mesh,
                objective=kind[0], content_loss_weight=kind[1], microbatches=run.microbatches,
            )
            for kind in sorted({step_kind(stage) for stage in run.stages})
        }  # fmt: skip
        begin = run.first_step if newest is None else min(newest, run.total_steps - 1)
        kind = step_kind(stage_at(run.stages, begin)[1])
        steps[kind] = compile_in_background(steps[kind], arguments, mesh, stack)
        reset_optimizer = make_reset(optimizer, model, mesh)

        # 4. The state: restored, or made where it will live.
        writer = stack.enter_context(StepWriter(checkpoints, run.keep, events.write, lease.check))
        begin, restored = time.monotonic(), None
        if newest is not None:
            state = restore(writer, arguments[0])
            if state is None:
                raise InputError("the steps that were there are gone", file=checkpoints)
            restored = time.monotonic() - begin
        else:
            state = init_state(
                start.model, optimizer, mesh, seed=run.seed, step=run.first_step, params=start.params
            )
        step, skipped_batches = int(state.step), int(state.numerics.rows_ahead)
        events.beginning(mesh.size, step, run.total_steps, restored)

        # 5. Records, checkpoints, held-out losses, samples.
        records = open_records(run, workdir, events, step, is_first, stack)
        flags, note = ProcessFlags(mesh), records.progress.note
        contexts = {stage.name: trained_context(stage) for stage in run.stages}
        saver = Saver(
            writer, flags, start.tokenizer,
            lambda stage: Meta(
                start.model, source=start.source, stage=stage, context=contexts[stage],
                run_config=run.to_dict(),
            ),
            attempts=run.save_attempts, note=note,
        )  # fmt: skip
        sharding, bos_id = batch_sharding(mesh), start.tokenizer.bos_id
        host, num_hosts = rows_of_process(sharding, run.batch_size)

        def put(batch):
            return device_batch(sharding, num_hosts, batch)

        def batches_from(step, skipped_batches):
            from a3_jax.data import batches, feature_converter  # TensorFlow: only when rows are read

            plan = batches.BatchPlan(
                data.train, run.stages, run.seed, run.batch_size, host, num_hosts, bos_id, skipped_batches
            )
            return feature_converter.stream(plan, step)

        held_out_losses = make_evaluator(run, model, data.heldout, put, sharding, bos_id)

        def evaluate(step, stage, params, to_its_end=False) -> bool:
            """Writes held-out losses; returns False if a process was told to stop before they were done."""
            if held_out_losses is None:
                return True

            def should_stop():
                watchdog.beat()
                return flags.any_now(bool(stop))[0] and not to_its_end

            watchdog.enter("evaluate")
            with events.timed("evaluate", step=step):
                losses = held_out_losses(params, should_stop)
            if losses is not None:
                write_losses(records, step, stage, losses)
            return losses is not None

        table = data.heldout if data.heldout is not None else data.train
        sample = make_sampler(table, start.model, start.tokenizer, records.samples, note, run.seed)
        utilization = make_utilization(run, start.model, mesh)

        # 6. The loop. Step n is dispatched before the metrics of step n - 1 are read, so that the device
        # never waits for the host. Before a checkpoint or an evaluation all metrics are read and on disk.
        stream = batches_from(step, skipped_batches)
        first_due = stage_due(run, step, restored is not None, records.evaluations)
        if first_due:
            evaluate(step, first_due, state.params)
        reader = MetricsReader(records, run, utilization)
        compiled: set[tuple[str, float]] = set()
        while step < run.total_steps:
            # The stage: only the rows and the rate depend on it, and a fresh optimiser if it asks for one.
            _, stage, stage_first = stage_at(run.stages, step)
            if step == stage_first and stage.reset_optimizer:
                state = reset_optimizer(state)

            # Rows and rate are functions of (seed, step).
            done = step + 1
            records.profiler.start_before(done)
            watchdog.enter("data")
            with reader.waiting_for_data():
                batch = put(next(stream))
            rate = learning_rate(
                run.stages, step,
                learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, schedule=run.schedule,
            )  # fmt: skip

            # The step. Nothing here waits for it; its flags are read one step late, like its metrics.
            kind = step_kind(stage)
            watchdog.enter("step" if kind in compiled else "compile")
            begin = time.monotonic()
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, metrics = steps[kind](state, batch, np.float32(rate))
            if kind not in compiled:
                compiled.add(kind)
                reader.leave_out("compile", time.monotonic() - begin, what=f"{stage.objective} step")
                watchdog.enter("step")
            stop.anything_to_save = True
            if is_first:
                lease.check()
            raised = flags.any(bool(stop), saver.has_failed())
            reader.dispatched(done, stage, rate, metrics, raised)

            # What is due after this step. All processes decide alike: they have read the same flags.
            is_last, stage_ends = done == run.total_steps, done == stage_first + stage.steps
            profile_ends = records.profiler.ends_with(done)
            evaluate_now = run.eval_every and (stage_ends or done % run.eval_every == 0)
            sample_now = run.sample_every and (stage_ends or done % run.sample_every == 0)
            save_now = stage_ends or saver.due or (run.checkpoint_every and done % run.checkpoint_every == 0)
            is_told = reader.stop or reader.save_failed
            anything = profile_ends or evaluate_now or sample_now or save_now or is_told
            if anything and reader.skipped < run.max_skipped:
                reader.read_previous()
            if profile_ends:
                records.profiler.stop()

            # Nothing was learned for too long: back to the checkpoint before, and past these rows.
            if reader.skipped >= run.max_skipped:
                watchdog.enter("restore")
                reader.drop_pending()
                if reader.save_failed:
                    saver.count_failure()
                first, last = reader.step - reader.skipped + 1, reader.step
                state = roll_back(first, last, skipped_batches, saver, writer, arguments[0], mesh)
                step, skipped_batches = int(state.step), int(state.numerics.rows_ahead)
                records.cut_back(step)
                events.write("rollback", from_step=last, to_step=step, skipped_steps=last - first + 1)
                stream = batches_from(step, skipped_batches)
                reader = MetricsReader(records, run, utilization)
                continue

            # A failed save is tried again. After a request to stop nothing is done any more but saving.
            stopping = reader.stop and not is_last  # the end is near enough
            save_now = save_now and (stage_ends or not reader.skipped)  # else nothing new was learned
            if reader.save_failed:
                reader.save_failed, save_now = False, True
                saver.count_failure()
            if evaluate_now and not stopping:
                stopping = not evaluate(done, stage.name, state.params, to_its_end=is_last)
            if sample_now and not stopping:
                watchdog.enter("sample")
                with events.timed("sample", step=done):
                    sample(done, state.params)
            if save_now or stopping:
                watchdog.enter("save")
                with events.timed("save", step=done):
                    (saver.finish if stopping else saver.save)(done, stage.name, state)
            if stopping:
                events.write("preempt", step=done)
                raise RunError(EXIT_PREEMPTED, f"stopped by SIGTERM after step {done}, which is saved")
            if anything:
                reader.restart_clock()
            step = done

        # 7. The end: the last step is on disk.
        watchdog.enter("save")
        saver.settle()
        if saver.due:
            saver.finish(step, stage_at(run.stages, step - 1)[1].name, state)
        events.write("finish", step=step)
    return _report_finished(run, checkpoints, newest)


def _report_finished(run: RunConfig, checkpoints, newest: int | None):
    """Prints that a run is finished; returns the path of its last checkpoint."""
    done = max(newest or 0, run.total_steps)
    last = checkpoints / str(done)
    if is_process_zero():
        print(f"finished: {done} of {run.total_steps} steps, {last}")
    return last
