"""Whether every byte of a checkpoint is what was written."""

import dataclasses
from typing import Any

import numpy as np

from a3_jax.checkpoints.a3_format import is_a3
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.checkpoints.loading import CHECKPOINTS
from a3_jax.checkpoints.manifest import ITEMS, MANIFEST_FILE, Manifest, find_damage, read_manifest, step_of
from a3_jax.checkpoints.safetensors_io import has_tensors, list_tensors
from a3_jax.checkpoints.stored_arrays import damaged_leaves, list_arrays, one_line, open_array
from a3_jax.errors import InputError
from a3_jax.paths import absolute, as_path, read_json, snapshot_hint
from a3_jax.runtime.lease import is_alive

AT_ONCE = 1 << 30  # bytes of arrays
COMMIT_FILE = "commit_success.txt"  # orbax had written all
LEASE_FILE = "lease.json"  # of a run's directory, while the run lives


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one checkpoint.

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
    """Reads a checkpoint, all steps of a run, or the headers of a Hugging Face directory.

    Raises:
      InputError: it is none of them.
    """
    path = as_path(path)
    if not path.is_dir():
        raise InputError("no such checkpoint directory", file=path)
    if _is_checkpoint(path):
        return [verify_a3(path)]
    steps = [step for place in (path / CHECKPOINTS, path) for step in _steps(place)]
    if steps:
        is_written = any(_is_held(place) for place in (path, path.parent))
        return [_verify_step(step, is_written and step == steps[-1]) for step in steps]
    if has_tensors(path) or (path / CONFIG_FILE).exists():
        return [verify_hf(path)]
    message = "no checkpoint: neither A3, nor Hugging Face, nor a run that has one"
    raise InputError(message + snapshot_hint(path), file=path)


def verify_a3(directory) -> Verdict:
    """Every file by its checksum, every array by its fingerprint."""
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
    """Headers and lengths of the safetensors files: more can't be known without a manifest."""
    note = "no manifest: headers and lengths are checked, the tensors' values can't be"
    try:
        tensors = list_tensors(directory)
    except InputError as error:
        return Verdict(directory, "hf", [error], note=note)
    files = {tensor.file for tensor in tensors.values()}
    size = sum(as_path(file).stat().length for file in files)
    return Verdict(directory, "hf", [], len(files), len(tensors), size, note)


def _is_checkpoint(path) -> bool:
    return is_a3(path) or (path / MANIFEST_FILE).exists()


def _steps(place) -> list[Any]:
    if not place.is_dir():
        return []
    steps = ((step_of(path), path) for path in place.iterdir())
    return [path for _, path in sorted(pair for pair in steps if pair[0] is not None)]


def _is_held(workdir) -> bool:
    """Whether a run lives that writes in a directory: a lease alone may be one that kill -9 left behind."""
    try:
        lease = read_json(workdir / LEASE_FILE)
    except InputError:
        return False
    return is_alive(lease)


def _verify_step(directory, may_be_written: bool) -> Verdict:
    """A step of a run; without manifest it is damaged if orbax had ended and no run is about to write one."""
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
