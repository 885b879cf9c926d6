"""`a3 info`: what a checkpoint is, from its descriptions and headers. No parameter is read."""

import collections
import hashlib
import json
import math
from typing import Any

from a3_jax.checkpoints.a3_format import META, META_FILE, Meta, load_meta
from a3_jax.checkpoints.export_ids import one_or_all
from a3_jax.checkpoints.families import tensor_table
from a3_jax.checkpoints.hf_format import check_source, open_hf
from a3_jax.checkpoints.loading import a3_tokenizer, find_checkpoint, hf_tokenizer
from a3_jax.checkpoints.manifest import PARAMS, Leaf, read_manifest
from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import stages_done, stages_from_config
from a3_jax.tables import print_table
from a3_jax.tokenizer import Tokenizer, bytes_tokenizer

_PARTS = {
    "embedding": ("embed", "position_embed"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "norms": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm", "final_norm"),
    "head": ("head",),
    "query_vector": ("query_embed",),
}


def describe(path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Args:
      path: an A3 checkpoint, a run's directory (its newest step), or a Hugging Face directory.

    Returns:
      JSON-able, with the same keys for every checkpoint, null where nothing is known:
      path, format: the checkpoint's directory; "a3" or "hf".
      family: the table of its tensors.
      sizes: layers, width, heads, kv_heads, head_size, mlp, context and left_context (tokens, in any
        order and from left to right), vocabulary.
      parameters: numbers by part: embedding, attention, mlp, norms, head (0: tied), query_vector (0: is
        drawn when the model is read), total.
      dtypes: number of parameters by dtype.
      curriculum: step, stage, and stages, a list of name, steps and done (those before a run's
        `start_stage` count as done); null of a model that was not trained here.
      tokenizer: kind ("bytes", or of `tokenizer.json`), size, bos and eos (ids; of several that end a text
        a list); null: token input only.
      fingerprint: of all parameters, 16 hexadecimal digits, equal wherever equal parameters were saved;
        null in a Hugging Face directory.
      source: architecture, name and transformers_version of the `config.json` that it came from,
        init_from of the run, and sha256, the sums of the files that were converted, by name; null where
        none were.
      versions: of the software that wrote it.

    Raises:
      InputError: no checkpoint, or one whose description is damaged.
    """
    directory, is_hf = find_checkpoint(path)
    return _describe_hf(directory) if is_hf else _describe_a3(directory)


def fingerprint(leaves: dict[str, Leaf]) -> str:
    """One fingerprint of arrays of these names, shapes, dtypes and fingerprints: 16 hexadecimal digits."""
    lines = [f"{name} {leaf.dtype} {list(leaf.shape)} {leaf.fingerprint}" for name, leaf in leaves.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def show(report: dict[str, Any]) -> None:
    """Prints a report of `describe` as a table."""
    kind = {"a3": "A3 checkpoint", "hf": "Hugging Face directory"}[report["format"]]
    rows = [(name, _printable(value)) for name, value in _rows(report)]
    print_table(f"{report['path']}: {kind}", rows)


def _describe_a3(directory) -> dict[str, Any]:
    meta, leaves = load_meta(directory), read_manifest(directory).item(PARAMS)
    sizes = [(name.split("/")[-1], math.prod(leaf.shape), leaf.dtype) for name, leaf in leaves.items()]
    if meta.source is not None:
        check_source(meta.source, directory / META / META_FILE)
    hf_config = {} if meta.source is None else meta.source["config"]
    return {
        **_common(directory, "a3", meta.model, sizes, a3_tokenizer(directory, meta)),
        "curriculum": _curriculum(meta, directory),
        "fingerprint": fingerprint(leaves),
        "source": {
            **_source(hf_config, (meta.run_config or {}).get("init_from")),
            "sha256": (meta.source or {}).get("sha256"),
        },
        "versions": meta.versions if isinstance(meta.versions, dict) else {},  # it may come from outside
    }


def _describe_hf(directory) -> dict[str, Any]:
    model = open_hf(directory)
    meta = Meta(model.config, source=model.source())
    sizes = [
        (part.leaf[-1], math.prod(part.leaf_shape), model.stored[name].dtype.name)
        for name, parts in tensor_table(model.config).items()
        for part in parts
        if name in model.stored
    ]
    return {
        **_common(directory, "hf", model.config, sizes, hf_tokenizer(directory, meta)),
        "curriculum": None,
        "fingerprint": None,
        "source": _source(model.hf_config, None),
        "versions": {},
    }


def _common(directory, kind, config, sizes, tokenizer) -> dict[str, Any]:
    """The keys that need no more than the model's config and (leaf, number, dtype) of each tensor."""
    parameters = dict.fromkeys((*_PARTS, "total"), 0)
    dtypes: dict[str, int] = collections.Counter()
    for leaf, number, dtype in sizes:
        of_leaf = leaf.removesuffix("_bias")
        parameters[next(part for part, names in _PARTS.items() if of_leaf in names)] += number
        parameters["total"] += number
        dtypes[dtype] += number
    return {
        "path": str(directory),
        "format": kind,
        "family": config.family,
        "sizes": {
            "layers": config.num_layers,
            "width": config.d_model,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_size": config.head_size,
            "mlp": config.mlp_size,
            "context": config.context_length(),
            "left_context": config.context_length(left_to_right=True),
            "vocabulary": config.vocab_size,
        },
        "parameters": parameters,
        "dtypes": dict(sorted(dtypes.items())),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    kind = "bytes"
    if not tokenizer.encodes_like(bytes_tokenizer()):
        kind = json.loads(tokenizer.files()["tokenizer.json"])["model"].get("type")
    bos, eos = tokenizer.bos_id, one_or_all(tokenizer.eos_ids)
    return {"kind": kind, "size": tokenizer.vocab_size, "bos": bos, "eos": eos}


def _curriculum(meta: Meta, directory) -> dict[str, Any] | None:
    if meta.step is None:
        return None
    config = meta.run_config or {}
    try:
        stages = stages_from_config(config["stages"]) if "stages" in config else ()
    except InputError as error:
        file = directory / META / META_FILE
        raise InputError(error.message, file=file, field=f"run_config.{error.field}") from error
    told = [
        {"name": stage.name, "steps": stage.steps, "done": done}
        for stage, done in zip(stages, stages_done(stages, meta.step))
    ]
    return {"step": meta.step, "stage": meta.stage, "stages": told}


def _source(hf_config, init_from) -> dict[str, Any]:
    names = hf_config.get("architectures")
    return {
        "architecture": names[0] if isinstance(names, list) and names else None,
        "name": hf_config.get("_name_or_path") or None,
        "transformers_version": hf_config.get("transformers_version"),
        "init_from": init_from or None,
        "sha256": None,
    }


def _rows(report):
    """(name, value) for people; what is not known is left out."""
    sizes, numbers, source = report["sizes"], report["parameters"], report["source"]
    yield "family", report["family"]
    yield "layers", f"{sizes['layers']}"
    yield "width", f"{sizes['width']:,}, MLP {sizes['mlp']:,}"
    yield "heads", f"{sizes['heads']} of {sizes['head_size']}, {sizes['kv_heads']} of keys and values"
    left = f", {sizes['left_context']:,} from left to right"
    yield "context", f"{sizes['context']:,}{left if sizes['left_context'] != sizes['context'] else ''}"
    yield "vocabulary", f"{sizes['vocabulary']:,}"
    yield "parameters", f"{numbers['total']:,}"
    without = {"head": "tied to the embedding", "query_vector": "none: drawn when the model is read"}
    for part in _PARTS:
        number = f"{numbers[part]:,}" if numbers[part] else without.get(part, "0")
        yield f"  {part.replace('_', ' ')}", number
    yield "dtype", ", ".join(f"{name} ({number:,})" for name, number in report["dtypes"].items())
    yield from _curriculum_rows(report["curriculum"])
    if (tokenizer := report["tokenizer"]) is None:
        yield "tokenizer", "none: token input only"
    else:
        told = {name: str(tokenizer[name]).strip("[]") for name in ("bos", "eos")}
        ids = [f", {name.upper()} {told[name]}" for name in told if tokenizer[name] is not None]
        yield "tokenizer", f"{tokenizer['kind'] or 'unknown'}, {tokenizer['size']:,} tokens{''.join(ids)}"
    yield "fingerprint", report["fingerprint"] or "none: Hugging Face directories have no manifest"
    told = {name.replace("_", " "): value for name, value in source.items() if name != "sha256" and value}
    if told:
        yield "came from", ", ".join(f"{name} {value}" for name, value in told.items())
    for file, sum_ in (source["sha256"] or {}).items():
        yield "  sha256", f"{sum_}  {file}"
    if report["versions"]:
        yield "written by", ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def _curriculum_rows(curriculum):
    if curriculum is None:
        yield "curriculum", "none"
        return
    yield "curriculum", f"step {curriculum['step']:,}, stage {curriculum['stage']}"
    for stage in curriculum["stages"]:
        yield f"  {stage['name']}", f"{stage['done']:,} of {stage['steps']:,} steps"


def _printable(text: str) -> str:
    """Names come from outside: nothing in them may steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
