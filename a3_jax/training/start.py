"""What a run begins or goes on with: model, tokenizer, parameters, rows."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

from a3_jax.checkpoints.a3_format import load_meta, with_manifest
from a3_jax.checkpoints.manifest import DamagedCheckpoint
from a3_jax.checkpoints.special_tokens import check_eos_ids
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.tokenizer import Tokenizer, bytes_tokenizer, from_files, load_tokenizer
from a3_jax.training.config import model_config, with_mask


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


def open_start(run, mesh) -> Start:
    """A new run: the model of `init_from`, or one whose vocabulary is the tokenizer's."""
    if not run.init_from:
        tokenizer = _open_tokenizer(run, None)
        model = with_mask(run, model_config(run, tokenizer.vocab_size))
        check_eos_ids(tokenizer, tokenizer.eos_ids, model.vocab_size, run.tokenizer or run.data or None)
        return Start(model, tokenizer)
    from a3_jax.checkpoints.opening import open_checkpoint

    checkpoint = open_checkpoint(run.init_from, dtype="float32", seed=run.seed, mesh=mesh)
    tokenizer = _open_tokenizer(run, checkpoint.tokenizer)
    if checkpoint.tokenizer is None or tokenizer.encodes_like(checkpoint.tokenizer):  # its ids mean the same
        tokenizer = tokenizer.with_eos_ids(checkpoint.eos_ids)
    context = checkpoint.config.max_length
    if run.seq_len > context:
        raise InputError(
            f"{run.seq_len} is longer than the context of {run.init_from}: {context}", field="seq_len"
        )
    model = with_mask(run, checkpoint.config)
    check_eos_ids(tokenizer, tokenizer.eos_ids, model.vocab_size, run.tokenizer or run.data or None)
    return Start(model, tokenizer, checkpoint.params, checkpoint.meta.source)


def reopen_start(checkpoints) -> Start:
    """A run that goes on: everything is in its own checkpoints, `init_from` may be gone."""
    from a3_jax.checkpoints.opening import a3_tokenizer

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


def open_run_data(run, start, saved):
    """The run's tables, and what `data.json` says of them.

    Args:
      saved: what it said when the run began, None for a new run.

    Raises:
      InputError: data that can't be used, is no longer the same, or has ids without an embedding.
    """
    from a3_jax.data.prepared import check_tokenizer, describe, find_prepared, open_tables
    from a3_jax.data.tasks import Data, open_data

    found = find_prepared(run.data)
    described = describe(found)
    if found:
        _check_same(run, saved, described)
        check_tokenizer(found[0], start.tokenizer)
        data = Data(*open_tables(found, run.seq_len))
    else:
        data = open_data(run.data, start.tokenizer, run.seq_len, packing=run.packing, holdout=run.holdout)
        described = {run.data or "embedded": zlib.crc32(data.train.tokens.tobytes())}
        _check_same(run, saved, described)
    largest = max(table.largest_id for table in (data.train, data.heldout) if table is not None)
    if largest >= start.model.vocab_size:
        raise InputError(f"token id {largest} is outside the model's vocabulary of {start.model.vocab_size}",
                         file=run.data or None, field="data")  # fmt: skip
    return data, described


def _check_same(run, saved, described) -> None:
    if saved and saved != described:
        raise InputError("is not the data that this run began with", file=run.data or None, field="data")
