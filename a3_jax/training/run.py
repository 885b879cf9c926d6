"""Opening a run: config, newest checkpoint, model, data, mesh; then the loop."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from a3_jax.checkpoints.a3_format import (
    Meta,
    StepWriter,
    latest_step,
    load_checkpoint_tokenizer,
    load_meta,
)
from a3_jax.errors import InputError
from a3_jax.model.accelerators import peak_flops
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import train_step_flops
from a3_jax.model.sharding import batch_sharding, make_mesh
from a3_jax.ordering.curriculum import trained_context
from a3_jax.paths import as_path, check_parents, read_json, write_json
from a3_jax.tokenizer import Tokenizer, bytes_tokenizer, from_files, load_tokenizer
from a3_jax.training import loop
from a3_jax.training.compilation import compilation_cache
from a3_jax.training.config import RunConfig, check_unchanged, model_config
from a3_jax.training.evaluate import held_out_losses
from a3_jax.training.metrics import JsonLines, Profiler, TensorBoard, cut_back
from a3_jax.training.optimizer import learning_rate
from a3_jax.training.parts import network_of, optimizer_of
from a3_jax.training.progress import ProgressLine
from a3_jax.training.samples import make_sampler
from a3_jax.training.state import TrainState, abstract_state, init_state, state_shardings
from a3_jax.training.step import LOSSES, make_loss, make_reset, make_train_step

JSON_LINES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins or goes on with.

    Attributes:
      model: the model's config.
      tokenizer: made the data's token ids; goes into every checkpoint.
      params: parameters on the mesh; None: drawn, or restored with the rest of the state.
      source: what a checkpoint remembers of the Hugging Face model it came from.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    params: Any = None
    source: Mapping[str, Any] | None = None


def train(config: Mapping[str, Any], workdir, devices=None):
    """Trains a run to its end, from its start or from its newest checkpoint.

        WORKDIR/config.json      the resolved run; data.json: checksums of its prepared data
        WORKDIR/metrics.jsonl    one object a step; eval.jsonl, samples.jsonl beside it
        WORKDIR/checkpoints/N    an A3 checkpoint after N steps
        WORKDIR/tensorboard      and profile, if steps are to be profiled

    Args:
      config: `ConfigDict` or dictionary with the fields of `RunConfig`.
      workdir: directory of this run alone, local or in a bucket.
      devices: to run on; default all.

    Returns:
      The path of the last checkpoint.

    Raises:
      InputError: a config, data, tokenizer or checkpoint that can't be used, or a directory that
        belongs to a run with another config. Nothing is written then.
    """
    run = RunConfig.from_config(config)
    workdir = as_path(workdir)
    checkpoints = workdir / "checkpoints"
    restored = _find_progress(run, workdir)
    if restored is not None and restored >= run.total_steps:
        print(f"finished: {restored} of {run.total_steps} steps, {checkpoints / str(restored)}")
        return checkpoints / str(restored)

    mesh = open_mesh(run, devices)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        start = _open_start(run, mesh) if restored is None else _reopen_start(checkpoints / str(restored))
        data_file = workdir / "data.json"
        saved = read_json(data_file) if restored is not None and data_file.exists() else None
        data, described = _open_data(run, start, saved)
        first_step = run.first_step if restored is None else restored
        optimizer = optimizer_of(run)
        shardings = state_shardings(start.model, optimizer, mesh)  # the last thing that can be bad input
        _warn(run, start, data)
        write_json(data_file, described)
        write_json(workdir / "config.json", run.to_dict())
        stack.enter_context(compilation_cache(run.compilation_cache, mesh.devices.flat[0].platform))
        writer = stack.enter_context(StepWriter(checkpoints, keep=run.keep))
        if restored is None:
            state = init_state(
                start.model, optimizer, mesh, seed=run.seed, step=first_step, params=start.params
            )
        else:
            state = _restore(writer, restored, abstract_state(start.model, optimizer), shardings)

        logs, samples = _open_logs(run, workdir, first_step, stack)
        functions = _functions(run, start, data, mesh, optimizer, writer, samples, logs.progress.note)
        loop.train(
            state,
            _batches(run, data, first_step, start.tokenizer.bos_id),
            functions,
            logs,
            stages=run.stages,
            first_step=first_step,
            fresh=restored is None,
            intervals=loop.Intervals(run.eval_every, run.sample_every, run.checkpoint_every, run.log_every),
        )
    print(f"finished: {run.total_steps} steps, {checkpoints / str(run.total_steps)}")
    return checkpoints / str(run.total_steps)


def open_mesh(run: RunConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of a run, over whose data and fsdp axes every microbatch's rows divide.

    Raises:
      InputError: sizes that don't fit the devices or the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(run.mesh)
    if sizes.get("data") == 0:
        sizes["data"] = 1 + max(getattr(device, "slice_index", 0) or 0 for device in devices)
    mesh = make_mesh(sizes, devices)
    rows, parts = run.batch_size // run.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(
            f"{run.batch_size} rows in {run.microbatches} microbatches can't be split over {parts} devices",
            field="batch_size",
        )
    return mesh


def _find_progress(run, workdir) -> int | None:
    """The newest step of the run in a directory, None if it is new there."""
    check_parents(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError("is a file, a run's directory is to be there", file=workdir)
    saved, step = workdir / "config.json", latest_step(workdir / "checkpoints")
    if saved.exists():
        check_unchanged(read_json(saved), run, saved)
    elif step is not None:
        raise InputError("holds checkpoints, but no config.json of their run", file=workdir)
    return step


def _open_start(run, mesh) -> Start:
    """A new run: the model of `init_from`, or one whose vocabulary is the tokenizer's."""
    if not run.init_from:
        tokenizer = _open_tokenizer(run, None)
        return Start(model_config(run, tokenizer.vocab_size), tokenizer)
    from a3_jax.checkpoints.conversion import open_checkpoint

    checkpoint = open_checkpoint(run.init_from, dtype="float32", seed=run.seed, mesh=mesh)
    tokenizer = _open_tokenizer(run, checkpoint.tokenizer)
    context = checkpoint.config.max_length
    if run.seq_len > context:
        raise InputError(
            f"{run.seq_len} is longer than the context of {run.init_from}: {context}", field="seq_len"
        )
    return Start(checkpoint.config, tokenizer, checkpoint.params, checkpoint.meta.source)


def _warn(run, start, data) -> None:
    """What a user may not expect; only once nothing can be refused any more."""

    def shape(model: ModelConfig):
        return model.d_model, model.num_layers, model.num_heads, model.num_kv_heads, model.mlp_size

    if run.init_from and run.model and shape(start.model) != shape(model_config(run, start.model.vocab_size)):
        print(f"warning: config.model gives way to the model of {run.init_from}", file=sys.stderr)
    if data.heldout is None and run.eval_every:
        print("warning: no held-out documents, so no held-out losses", file=sys.stderr)


def _reopen_start(checkpoint) -> Start:
    """A run that goes on: everything is in its own checkpoint, `init_from` may be gone."""
    meta, tokenizer = load_meta(checkpoint), load_checkpoint_tokenizer(checkpoint)
    if tokenizer is None:
        raise InputError("has no tokenizer, this run can't go on from it", file=checkpoint)
    return Start(meta.model, tokenizer, source=meta.source)


def _open_tokenizer(run, of_checkpoint) -> Tokenizer:
    """The run's tokenizer: that of prepared data, which no other may contradict, or the one that is named."""
    from a3_jax.data.prepared import find_prepared, prepared_tokenizer

    found = find_prepared(run.data)
    if found:
        named = [load_tokenizer(run.tokenizer)] if run.tokenizer else []
        return prepared_tokenizer(found[0], *named, *([of_checkpoint] if of_checkpoint else []))
    if run.tokenizer:
        return load_tokenizer(run.tokenizer)
    if of_checkpoint is not None:
        return of_checkpoint
    if run.data:
        return bytes_tokenizer()
    from a3_jax.data.embedded import tokenizer_json

    return from_files({"tokenizer.json": tokenizer_json()})


def _open_data(run, start, saved):
    """The run's tables, and what `data.json` says of them.

    Args:
      saved: what it said when the run began, None for a new run.

    Raises:
      InputError: data that can't be used, is no longer the same, or has ids without an embedding.
    """
    from a3_jax.data.prepared import check_tokenizer, describe, find_prepared, open_tables
    from a3_jax.data.tasks import Data, open_data

    found = find_prepared(run.data)
    if saved is not None and saved != describe(found):
        raise InputError("is not the data that this run began with", file=run.data, field="data")
    if found:
        check_tokenizer(found[0], start.tokenizer)
        data = Data(*open_tables(found, run.seq_len))
    else:
        data = open_data(run.data, start.tokenizer, run.seq_len, packing=run.packing, holdout=run.holdout)
    largest = max(table.largest_id for table in (data.train, data.heldout) if table is not None)
    if largest >= start.model.vocab_size:
        raise InputError(f"token id {largest} is outside the model's vocabulary of {start.model.vocab_size}",
                         file=run.data or None, field="data")  # fmt: skip
    return data, describe(found)


def _batches(run, data, first_step, bos_id) -> Iterator[Mapping[str, Any]]:
    """This process's rows of each step's batch, from `first_step` on."""
    from a3_jax.data.batches import stream

    return stream(
        data.train, run.stages, run.seed, run.batch_size, first_step,
        host=jax.process_index(), num_hosts=jax.process_count(), bos_id=bos_id,
    )  # fmt: skip


def _restore(writer, step, abstract, shardings) -> TrainState:
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    params, rest = writer.restore(step, target.params, {"step": target.step, "opt_state": target.opt_state})
    return TrainState(step=rest["step"], params=params, opt_state=rest["opt_state"])


def _open_logs(run, workdir, first_step, stack):
    """Where rows go, cut back to the step that the run goes on from; closed with the stack."""
    opened = []
    for name in JSON_LINES:
        cut_back(workdir / name, first_step)
        opened.append(stack.enter_context(contextlib.closing(JsonLines(workdir / name))))
    metrics, evaluations, samples = opened
    tensorboard = stack.enter_context(contextlib.closing(TensorBoard(workdir / "tensorboard")))
    progress = ProgressLine(first_step, run.total_steps, run.log_every)
    stack.enter_context(contextlib.closing(progress))
    profiler = Profiler(workdir / "profile", run.profile_steps, progress.note)
    stack.enter_context(contextlib.closing(profiler))
    return loop.Logs(metrics, evaluations, tensorboard, progress, profiler), samples


def _functions(run, start, data, mesh, optimizer, writer, samples, note) -> loop.Functions:
    """The compiled functions of a run, and those that write."""
    model = network_of(run, start.model)
    place = functools.partial(_place, batch_sharding(mesh))
    table = data.heldout if data.heldout is not None else data.train
    make_step = functools.partial(make_train_step, model, optimizer, mesh, microbatches=run.microbatches)
    contexts = {stage.name: trained_context(stage) for stage in run.stages}

    def save(step, stage, state):
        meta = Meta(start.model, source=start.source, step=step, stage=stage, context=contexts[stage],
                    run_config=run.to_dict())  # fmt: skip
        train_state = {"step": state.step, "opt_state": state.opt_state}
        writer.save(step, state.params, train_state, meta, start.tokenizer)

    return loop.Functions(
        step={
            (objective, weight): make_step(objective=objective, content_loss_weight=weight)
            for objective, weight in sorted({loop.step_kind(stage) for stage in run.stages})
        },
        reset_optimizer=make_reset(optimizer, model, mesh),
        learning_rate=lambda step: learning_rate(
            run.stages, step,
            learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, schedule=run.schedule,
        ),
        place=place,
        evaluate=_evaluation(run, model, data.heldout, place, start.tokenizer.bos_id),
        sample=make_sampler(table, start.model, start.tokenizer, samples, note, run.seed),
        save=save,
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


def _evaluation(run, model, heldout, place, bos_id):
    """A function of parameters: held-out losses; None without rows. What a stage gives is not scored."""
    if heldout is None:
        return None
    from a3_jax.data.batches import eval_batch

    bos_given = any(stage.bos_given for stage in run.stages)
    contexts = {order.context for stage in run.stages for order in stage.orders}
    context = contexts.pop() if len(contexts) == 1 else "flat"

    def batches(objective, order, group_size):
        rows = eval_batch(
            heldout, order, group_size, run.seed, run.batch_size // run.microbatches, run.eval_batches,
            host=jax.process_index(), num_hosts=jax.process_count(),
            objective=objective, context=context, bos_given=bos_given, bos_id=bos_id,
        )  # fmt: skip
        return map(place, rows)

    losses = {objective: make_loss(model, objective=objective) for objective in LOSSES}
    return lambda params: held_out_losses(losses, params, batches)


def _place(sharding, batch):
    """This process's rows as part of the global batch [B, T], on its devices."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
