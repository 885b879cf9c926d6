"""Checks what a run reads, if it can be seen from here: the model, weights and data that its config names."""

import dataclasses

from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.paths import as_path
from a3_jax.training.config import RunConfig, model_config, with_mask


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is known before anything is compiled.

    Attributes:
      model: the config of the run's model.
      notes: what was checked, and what was not, a line each.
    """

    model: ModelConfig
    notes: list[str]


def check_inputs(run: RunConfig) -> Inputs:
    """Returns the run's model; checks weights and data that are here, without reading them whole."""
    model, notes = _model(run)
    return Inputs(with_mask(run, model), [*notes, _check_data(run)])


def _model(run: RunConfig) -> tuple[ModelConfig, list[str]]:
    from a3_jax.training.setup import check_context

    if not run.init_from:
        return _new_model(run)
    if _is_here(run.init_from):
        model, note = _check_checkpoint(run.init_from)
        check_context(run, model)
        return model, [note]
    if not run.model:
        raise InputError(f"{run.init_from} is not here, and config.model is empty", field="init_from")
    return model_config(run), [_missing("init_from", run.init_from, "the model is that of config.model")]


def _new_model(run: RunConfig) -> tuple[ModelConfig, list[str]]:
    """Returns the model of a run that begins from nothing: its vocabulary is its tokenizer's."""
    from a3_jax.training.setup import init_from_config

    instead = "the vocabulary is that of config.model"
    if run.tokenizer not in ("", "bytes") and not _is_here(run.tokenizer):
        return model_config(run), [_missing("tokenizer", run.tokenizer, instead)]
    if run.data and not run.tokenizer and not _is_here(run.data):
        return model_config(run), [_missing("tokenizer", f"that of {run.data}", instead)]
    return init_from_config(run, None).model, []


def _check_checkpoint(path: str) -> tuple[ModelConfig, str]:
    """Its model: manifest, sizes and tree of an A3 checkpoint; headers and shapes of a Hugging Face one."""
    from a3_jax.checkpoints.a3_format import load_meta
    from a3_jax.checkpoints.hf_format import open_hf
    from a3_jax.checkpoints.loading import find_checkpoint
    from a3_jax.checkpoints.manifest import PARAMS, raise_damage, read_manifest
    from a3_jax.checkpoints.stored_arrays import check_same_tree
    from a3_jax.model.two_stream import abstract_params

    directory, is_hf = find_checkpoint(path)
    if is_hf:
        return open_hf(directory).config, f"init_from: {path}: headers and shapes are right"
    meta, manifest = load_meta(directory), read_manifest(directory)
    raise_damage(directory, manifest)
    check_same_tree(manifest.item(PARAMS), abstract_params(meta.model), directory / PARAMS)
    return meta.model, f"init_from: {directory}: manifest, sizes and shapes are right"


def _check_data(run: RunConfig) -> str:
    from a3_jax.data.prepared import find_prepared
    from a3_jax.data.prepared_manifest import check_shards
    from a3_jax.data.sources import find_files

    if not run.data:
        return "data: the embedded corpus"
    if not _is_here(run.data):
        return _missing("data", run.data)
    found = find_prepared(run.data)
    for prepared in found:
        if prepared.manifest.seq_len != run.seq_len:
            rows = f"the rows in {prepared.directory} have {prepared.manifest.seq_len} tokens"
            raise InputError(f"{run.seq_len}, but {rows}", field="seq_len")
        check_shards(prepared.directory, prepared.manifest, deep=False)
    if found:
        return f"data: {run.data}: manifests and sizes of shards are right"
    return f"data: {run.data}: {len(find_files(run.data))} files, not read"


def _is_here(name: str) -> bool:
    """Returns whether a path, or one of a list or pattern of them, can be seen from here."""
    try:
        for part in name.split(","):
            path = as_path(part.strip().rpartition("@")[0] or part.strip())
            if path.exists() or as_path(part.strip()).exists():
                return True
            if "*" in path.name and path.parent.exists() and next(path.parent.glob(path.name), None):
                return True
    except InputError:
        raise
    except Exception:  # a bucket's client raises its own kinds where there is no network
        return False
    return False


def _missing(field: str, name: str, instead: str = "") -> str:
    return f"{field}: not checked: not found here: {name}" + (f"; {instead}" if instead else "")
