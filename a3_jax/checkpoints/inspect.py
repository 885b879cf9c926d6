"""`a3 info` and `a3 verify`.

`describe` says what a checkpoint is, from its descriptions and headers: no parameter is read. `verify` checks
that every byte is what was written.
"""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from a3_jax.checkpoints.a3_format import META, META_FILE, Meta, is_a3, load_meta
from a3_jax.checkpoints.families import tensor_table
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.checkpoints.hf_format import check_source, kept_files, open_hf
from a3_jax.checkpoints.loading import CHECKPOINTS, a3_tokenizer, find_checkpoint, hf_tokenizer
from a3_jax.checkpoints.manifest import (
    ITEMS,
    MANIFEST_FILE,
    PARAMS,
    Leaf,
    Manifest,
    find_damage,
    read_manifest,
    step_of,
)
from a3_jax.checkpoints.safetensors import has_tensors, list_tensors
from a3_jax.checkpoints.special_tokens import one_or_all
from a3_jax.checkpoints.stored_arrays import damaged_leaves, list_arrays, one_line, open_array
from a3_jax.console import print_table
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.ordering.curriculum import Stage, stages_done, stages_from_config
from a3_jax.paths import (
    POINTER_MESSAGE,
    absolute,
    as_path,
    is_pointer,
    read_beginning,
    read_json,
    snapshot_hint,
)
from a3_jax.runtime.lease import is_alive
from a3_jax.tokenizer import Tokenizer, bytes_tokenizer

AT_ONCE = 1 << 30  # bytes of arrays
COMMIT_FILE = "commit_success.txt"  # orbax had written all
LEASE_FILE = "lease.json"  # of a run's directory, while the run lives
_PARTS = {
    "embedding": ("embed", "position_embed"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "norms": ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm", "final_norm"),
    "head": ("head",),
    "query_vector": ("query_embed",),
}


def describe(path) -> dict[str, Any]:
    """Describes a checkpoint, without reading its parameters.

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
    """
    directory, is_hf = find_checkpoint(path)
    return _describe_hf(directory) if is_hf else _describe_a3(directory)


def fingerprint(leaves: dict[str, Leaf]) -> str:
    """Returns one fingerprint, 16 hexadecimal digits, for arrays of these names and properties."""
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
    """Returns the keys that follow from the model's config and (leaf, number, dtype) of each tensor."""
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
        "sizes": sizes_of(config),
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
    stages = [
        {"name": stage.name, "steps": stage.steps, "done": done}
        for stage, done in recorded_stages(meta, directory / META / META_FILE)
    ]
    return {"step": meta.step, "stage": meta.stage, "stages": stages}


def recorded_stages(meta: Meta, file=None) -> list[tuple[Stage, int]]:
    """Returns the stages of the run that saved a checkpoint, each with its steps that were done.

    Args:
      meta: the checkpoint's; without a step or stages there are none.
      file: names it in errors.
    """
    config = meta.run_config or {}
    if meta.step is None or "stages" not in config:
        return []
    try:
        stages = stages_from_config(config["stages"])
    except InputError as error:
        raise InputError(error.message, file=file, field=f"run_config.{error.field}") from error
    return list(zip(stages, stages_done(stages, meta.step)))


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes of a model, by their names in a report."""
    return {
        "layers": config.num_layers,
        "width": config.d_model,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_size": config.head_size,
        "mlp": config.mlp_size,
        "context": config.context_length(),
        "left_context": config.context_length(left_to_right=True),
        "vocabulary": config.vocab_size,
    }


def _source(hf_config, init_from) -> dict[str, Any]:
    names = hf_config.get("architectures")
    return {
        "architecture": names[0] if isinstance(names, list) and names else None,
        "name": hf_config.get("_name_or_path") or None,
        "transformers_version": hf_config.get("transformers_version"),
        "init_from": init_from or None,
        "sha256": None,
    }


def size_rows(sizes: dict[str, int], unit: str = "") -> Iterator[tuple[str, str]]:
    """Yields (name, value) of `sizes_of` for people; `unit` is of the context."""
    yield "layers", f"{sizes['layers']}"
    yield "width", f"{sizes['width']:,}, MLP {sizes['mlp']:,}"
    yield "heads", f"{sizes['heads']} of {sizes['head_size']}, {sizes['kv_heads']} of keys and values"
    left = f", {sizes['left_context']:,} from left to right"
    yield "context", f"{sizes['context']:,}{unit}{left if sizes['left_context'] != sizes['context'] else ''}"
    yield "vocabulary", f"{sizes['vocabulary']:,}"


def _rows(report) -> Iterator[tuple[str, str]]:
    """Yields (name, value) for people, without what is not known."""
    numbers, source = report["parameters"], report["source"]
    yield "family", report["family"]
    yield from size_rows(report["sizes"])
    yield "parameters", f"{numbers['total']:,}"
    without = {"head": "tied to the embedding", "query_vector": "none: drawn when the model is read"}
    for part in _PARTS:
        number = f"{numbers[part]:,}" if numbers[part] else without.get(part, "0")
        yield f"  {part.replace('_', ' ')}", number
    yield "dtype", ", ".join(f"{name} ({number:,})" for name, number in report["dtypes"].items())
    if (curriculum := report["curriculum"]) is None:
        yield "curriculum", "none"
    else:
        yield "curriculum", f"step {curriculum['step']:,}, stage {curriculum['stage']}"
        for stage in curriculum["stages"]:
            yield f"  {stage['name']}", f"{stage['done']:,} of {stage['steps']:,} steps"
    if (tokenizer := report["tokenizer"]) is None:
        yield "tokenizer", "none: token input only"
    else:
        ids = [
            f", {name.upper()} {str(tokenizer[name]).strip('[]')}"
            for name in ("bos", "eos")
            if tokenizer[name] is not None
        ]
        yield "tokenizer", f"{tokenizer['kind'] or 'unknown'}, {tokenizer['size']:,} tokens{''.join(ids)}"
    yield "fingerprint", report["fingerprint"] or "none: Hugging Face directories have no manifest"
    origin = {name.replace("_", " "): value for name, value in source.items() if name != "sha256" and value}
    if origin:
        yield "came from", ", ".join(f"{name} {value}" for name, value in origin.items())
    for file, sum_ in (source["sha256"] or {}).items():
        yield "  sha256", f"{sum_}  {file}"
    if report["versions"]:
        yield "written by", ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def _printable(text: str) -> str:
    """Names come from outside: nothing in them may steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of verifying one checkpoint.

    Attributes:
      path: its directory. kind: "a3" or "hf".
      problems: `InputError`s, one a damaged or missing file or leaf.
      files, leaves: how many were looked at (tensors, in a Hugging Face directory).
      bytes: of the files.
      note: what could not be checked, or is worth knowing; empty: nothing.
    """

    path: Any
    kind: str
    problems: list[InputError]
    files: int = 0
    leaves: int = 0
    bytes: int = 0
    note: str = ""


def verify(path) -> list[Verdict]:
    """Reads a checkpoint, all steps of a run, or the headers of a Hugging Face directory."""
    path = as_path(path)
    if not path.is_dir():
        raise InputError("no such checkpoint directory", file=path)
    if _is_checkpoint(path):
        return [verify_a3(path)]
    steps = [step for folder in (path / CHECKPOINTS, path) for step in _steps(folder)]
    if steps:
        is_written = any(_is_held(folder) for folder in (path, path.parent))
        return [_verify_step(step, is_written and step == steps[-1]) for step in steps]
    if has_tensors(path) or (path / CONFIG_FILE).exists():
        return [verify_hf(path)]
    message = "no checkpoint: neither A3, nor Hugging Face, nor a run that has one"
    raise InputError(message + snapshot_hint(path), file=path)


def verify_a3(directory) -> Verdict:
    """Checks every file by its checksum, every array by its fingerprint."""
    directory = absolute(directory)
    try:
        manifest = read_manifest(directory)
    except InputError as error:
        return Verdict(directory, "a3", [error])
    problems: list[InputError] = [*find_damage(directory, manifest, deep=True)]
    for item in ITEMS:
        if manifest.item(item):
            problems += _verify_item(directory, manifest, item, known=bool(problems))
    size = sum(file.bytes for file in manifest.files.values())
    return Verdict(directory, "a3", problems, len(manifest.files), len(manifest.leaves), size)


def verify_hf(directory) -> Verdict:
    """Checks headers and lengths of the safetensors files: without a manifest no more can be known.

    Of the files beside them it reports those that are Git LFS pointers.
    """
    note = "no manifest: headers and lengths are checked, the tensors' values can't be"
    beside = [file for file in (as_path(directory) / CONFIG_FILE,) if file.exists()]
    pointers = [
        InputError(POINTER_MESSAGE, file=file)
        for file in (*beside, *kept_files(directory))
        if is_pointer(read_beginning(file))
    ]
    try:
        tensors = list_tensors(directory)
    except InputError as error:
        return Verdict(directory, "hf", [*pointers, error], note=note)
    files = {tensor.file for tensor in tensors.values()}
    size = sum(as_path(file).stat().length for file in files)
    return Verdict(directory, "hf", pointers, len(files), len(tensors), size, note)


def _is_checkpoint(path) -> bool:
    return is_a3(path) or (path / MANIFEST_FILE).exists()


def _steps(folder) -> list[Any]:
    if not folder.is_dir():
        return []
    steps = ((step_of(path), path) for path in folder.iterdir())
    return [path for _, path in sorted(pair for pair in steps if pair[0] is not None)]


def _is_held(workdir) -> bool:
    """Returns whether a living run writes in a directory: a lease alone may be left over from kill -9."""
    try:
        lease = read_json(workdir / LEASE_FILE)
    except InputError:
        return False
    return is_alive(lease)


def _verify_step(directory, may_be_written: bool) -> Verdict:
    """Checks a step; without manifest it is damaged if orbax had ended and no run is about to write one."""
    ended = (directory / COMMIT_FILE).exists() and not may_be_written
    if not (directory / MANIFEST_FILE).exists() and not ended:
        return Verdict(directory, "a3", [], note="unfinished: being written, or left by an interrupted save")
    return verify_a3(directory)


def _verify_item(directory, manifest: Manifest, item: str, known: bool) -> list[InputError]:
    """Reads the arrays of an item, `AT_ONCE` bytes at a time.

    Args:
      known: a file is damaged, so what can't be read needs no other explanation.
    """

    def unreadable(error: BaseException, field: str) -> InputError:
        reason = "a file is damaged" if known else one_line(error)
        return InputError(f"can't be read: {reason}", file=directory, field=field)

    stored = manifest.item(item)
    try:
        there = list_arrays(directory / item)
    except Exception as error:  # they share no type
        return [unreadable(error, item)]
    problems: list[InputError] = [
        InputError("is missing", file=directory, field=f"{item}/{name}")
        for name in stored
        if name not in there
    ]
    groups: list[list[str]] = [[]]
    for name in (name for name in there if name in stored):
        if groups[-1] and sum(stored[it].nbytes for it in (*groups[-1], name)) > AT_ONCE:
            groups.append([])
        groups[-1].append(name)
    for group in groups:
        reads, arrays = {}, {}
        for name in group:
            try:
                reads[name] = open_array(directory / item, name, stored[name]).read()
            except InputError as error:
                problems.append(unreadable(error.__cause__ or error, f"{item}/{name}"))
        for name, read in reads.items():
            try:
                arrays[name] = np.asarray(read.result())
            except Exception as error:
                problems.append(unreadable(error, f"{item}/{name}"))
        problems += damaged_leaves(directory, manifest, item, arrays)
    return problems
