"""What a run is made of: mesh, model, tokenizer, parameters, rows, and its first step compiled early."""

import contextlib
import dataclasses
import os
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from a3_jax.checkpoints.a3_format import load_meta, with_manifest
from a3_jax.checkpoints.special_tokens import check_eos_ids
from a3_jax.errors import DamagedCheckpoint, InputError
from a3_jax.model.accelerators import peak_flops
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import train_step_flops
from a3_jax.model.sharding import batch_sharding, make_mesh, number_of_slices
from a3_jax.model.two_stream import TwoStream
from a3_jax.tokenizer import Tokenizer, bytes_tokenizer, from_files, load_tokenizer
from a3_jax.training.config import RunConfig, model_config, with_mask
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.train_state import abstract_state, state_shardings

SLICES_ARE_PROCESSES = "A3_SLICES_ARE_PROCESSES"  # an environment variable


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
    source: dict[str, Any] | None = None


def open_mesh(run: RunConfig, devices=None) -> jax.sharding.Mesh:
    """Makes the mesh of a run, over whose data and fsdp axes the rows of every microbatch divide.

    With A3_SLICES_ARE_PROCESSES=1 in the environment each process counts as a slice, to try several slices
    on CPUs.
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


def init_from_config(run: RunConfig, mesh) -> Start:
    """Begins a new run: with the model of `init_from`, or one whose vocabulary is the tokenizer's."""
    if not run.init_from:
        tokenizer = _open_tokenizer(run, None)
        model = with_mask(run, model_config(run, tokenizer.vocab_size))
        check_eos_ids(tokenizer, tokenizer.eos_ids, model.vocab_size, run.tokenizer or run.data or None)
        return Start(model, tokenizer)
    from a3_jax.checkpoints.loading import open_checkpoint

    checkpoint = open_checkpoint(run.init_from, dtype="float32", seed=run.seed, mesh=mesh)
    tokenizer = _open_tokenizer(run, checkpoint.tokenizer)
    if checkpoint.tokenizer is None or tokenizer.encodes_like(checkpoint.tokenizer):  # its ids mean the same
        tokenizer = tokenizer.with_eos_ids(checkpoint.eos_ids)
    check_context(run, checkpoint.config)
    model = with_mask(run, checkpoint.config)
    check_eos_ids(tokenizer, tokenizer.eos_ids, model.vocab_size, run.tokenizer or run.data or None)
    return Start(model, tokenizer, checkpoint.params, checkpoint.meta.source)


def init_from_checkpoint(checkpoints) -> Start:
    """Continues a run: everything is in its own checkpoints, `init_from` may be gone."""
    from a3_jax.checkpoints.loading import a3_tokenizer

    damages = []
    for step in with_manifest(checkpoints):
        checkpoint = checkpoints / str(step)
        try:
            meta = load_meta(checkpoint)
            tokenizer = a3_tokenizer(checkpoint, meta)
            break
        except DamagedCheckpoint as damage:  # the restore sets it aside; all steps have the same tokenizer
            damages.append(damage)
    else:
        raise damages[0]
    if tokenizer is None:
        raise InputError("has no tokenizer, this run can't go on from it", file=checkpoint)
    return Start(meta.model, tokenizer, source=meta.source)


def check_context(run: RunConfig, model: ModelConfig) -> None:
    """Checks that the rows of a run fit into the context of the model of `init_from`."""
    if run.seq_len > model.max_length:
        message = f"{run.seq_len} is longer than the context of {run.init_from}: {model.max_length}"
        raise InputError(message, field="seq_len")


def _open_tokenizer(run: RunConfig, of_checkpoint: Tokenizer | None) -> Tokenizer:
    """Opens the tokenizer of prepared data, which no other may contradict, or else the one that is named."""
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


def open_run_data(run: RunConfig, start: Start, saved: Mapping[str, Any] | None):
    """Opens the run's tables; returns them and what `data.json` says of them.

    Args:
      run: names the data.
      start: has the tokenizer and the model's vocabulary.
      saved: what `data.json` said when the run began; None for a new run.
    """
    from a3_jax.data.prepared import check_tokenizer, describe, find_prepared, open_tables
    from a3_jax.data.seqio_tasks import Data, open_data

    def check_same(described):
        if saved and saved != described:
            raise InputError("is not the data that this run began with", file=run.data or None, field="data")

    found = find_prepared(run.data)
    if found:
        described = describe(found)
        check_same(described)
        check_tokenizer(found[0], start.tokenizer)
        data = Data(*open_tables(found, run.seq_len))
    else:
        data = open_data(run.data, start.tokenizer, run.seq_len, packing=run.packing, holdout=run.holdout)
        described = {run.data or "embedded": zlib.crc32(data.train.tokens.tobytes())}
        check_same(described)
    largest = max(table.largest_id for table in (data.train, data.heldout) if table is not None)
    if largest >= start.model.vocab_size:
        raise InputError(f"token id {largest} is outside the model's vocabulary of {start.model.vocab_size}",
                         file=run.data or None, field="data")  # fmt: skip
    return data, described


def warn(run: RunConfig, start: Start, data) -> None:
    """Prints what a user may not expect; called only once nothing can be refused any more."""

    def shape(model: ModelConfig):
        return model.d_model, model.num_layers, model.num_heads, model.num_kv_heads, model.mlp_size

    if run.init_from and run.model and shape(start.model) != shape(model_config(run, start.model.vocab_size)):
        ignored = f"config.model is ignored: the model comes from init_from={run.init_from}"
        print(f"warning: {ignored}", file=sys.stderr)
    if data.heldout is None and run.eval_every:
        print("warning: no held-out documents, so no held-out losses", file=sys.stderr)


def make_model(run: RunConfig, config: ModelConfig) -> TwoStream:
    """Makes the module that a run trains."""
    return TwoStream(config, dtype=run.compute_dtype, remat=run.remat, attention=run.attention)


def device_batch(sharding: jax.sharding.NamedSharding, parts: int, batch) -> dict[str, jax.Array]:
    """Puts this process's rows, one of so many parts of a global batch [B, T], on its devices."""

    def put(rows):
        shape = (rows.shape[0] * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: put(rows) for name, rows in batch.items()}


def make_utilization(run: RunConfig, model: ModelConfig, mesh) -> Callable[[str, float], float] | None:
    """Returns a function (objective, tokens per second) -> model-FLOPs utilisation; None on unknown chips.

    Model FLOPs per second over the chips' dense bfloat16 peak, whatever the run's dtype (PaLM, arXiv
    2204.02311, appendix B). A token costs what it does in one document of `seq_len` tokens, and padding
    doesn't count: rows half empty halve the utilisation, and short documents packed into a row count for
    slightly more attention than they need.
    """
    peak = peak_flops(list(mesh.devices.flat))
    if peak is None:
        return None
    token_flops = {
        objective: train_step_flops(model, run.seq_len, objective=objective).total / run.seq_len
        for objective in {stage.objective for stage in run.stages}
    }
    return lambda objective, tokens_per_second: token_flops[objective] * tokens_per_second / peak


def compile_in_background(
    step: Any, arguments: tuple[Any, ...], mesh: jax.sharding.Mesh, stack: contextlib.ExitStack
) -> Callable:
    """Compiles a step in a thread; returns the step, whose first call waits for that.

    JAX keeps what it has compiled for shapes, and uses it for arrays like them.

    Args:
      step: a jitted function.
      arguments: their shapes, such as `step_arguments`.
      mesh: the step's.
      stack: joins the thread on exit; exiting during compilation crashes.
    """

    def compile_it():
        with contextlib.suppress(Exception), jax.set_mesh(mesh):  # the call fails for the same reason
            step.lower(*arguments).compile()

    thread = threading.Thread(target=compile_it, name="a3 compile", daemon=True)
    thread.start()
    stack.callback(thread.join)

    def call(*values):
        thread.join()
        return step(*values)

    return call


def step_arguments(run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Any, ...]:
    """Returns state, batch and learning rate of a run's step as shapes with their shardings."""
    shape, sharding = (run.batch_size, run.seq_len), batch_sharding(mesh)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    rows: dict = dict.fromkeys(("tokens", "positions", "segment_ids", "ranks"), row)
    rows["weights"] = row.update(dtype=jnp.float32)
    return sharded_state(run, model, mesh), rows, jax.ShapeDtypeStruct((), jnp.float32)


def sharded_state(run: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the run's `TrainState` as shapes with their shardings."""
    optimizer = make_optimizer(run.optimizer, **run.optimizer_options)
    return with_shardings(abstract_state(model, optimizer), state_shardings(model, optimizer, mesh))


def with_shardings(tree, shardings) -> Any:
    """Returns a tree of shapes with the shardings of another tree, which has the same leaves."""
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), tree, shardings)
