"""Prepared directories as what a run trains on: checked before the first step, then read by row.

config.data = "fineweb-2048"                    one directory
config.data = "fineweb-2048@0.8,code-2048@0.2"  several, drawn at these rates (without: by their rows)
"""

import dataclasses
import os
import sys
from typing import Any

from a3_jax.data.mixing import Joined, Mixture
from a3_jax.data.prepared_manifest import (
    HELDOUT,
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    TRAIN,
    PreparedManifest,
    check_shards,
    is_prepared,
    read_manifest,
)
from a3_jax.data.shards import ShardTable
from a3_jax.errors import InputError
from a3_jax.paths import as_path, is_remote
from a3_jax.tokenizer import Tokenizer, load_tokenizer

_READ_WHOLE = 1 << 30  # bytes; of a larger set only the sizes are checked before the first step


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One directory of a run's data.

    Attributes:
      directory: its path.
      rate: relative rate at which it is drawn; None: by its number of rows.
      manifest: what it says of itself.
    """

    directory: Any
    rate: float | None
    manifest: PreparedManifest


def find_prepared(data: str) -> list[Prepared]:
    """Returns the prepared directories that `config.data` names; empty where it names text files.

    Raises:
      InputError: a directory that is not prepared, a damaged manifest, a rate that is none, a directory
        with several rates, or directories of several tokenizers.
    """
    entries = [_entry(part.strip()) for part in data.split(",")] if data else []
    directories = [path for path, _ in entries if path.is_dir()]
    if not directories:
        return []
    found: list[Prepared] = []
    for path, rate in entries:
        twice = [each for each in found if _is_same(each.directory, path)]
        if twice and (rate, twice[0].rate) != (None, None):
            raise InputError("is named twice: give it one rate", file=path, field="data")
        if twice:
            print(f"warning: {path}: is named more than once, and is read once", file=sys.stderr)
            continue
        if not is_prepared(path):
            message = f"no {MANIFEST_FILE} there: `a3 data prepare` has not made it, or has not ended"
            raise InputError(message, file=path, field="data")
        found.append(Prepared(path, rate, read_manifest(path)))
    for other in found[1:]:
        if other.manifest.tokenizer != found[0].manifest.tokenizer:
            message = f"its tokenizer is not that of {found[0].directory}"
            raise InputError(message, file=other.directory / MANIFEST_FILE, field="tokenizer")
    return found


def prepared_tokenizer(prepared: Prepared, *others: Tokenizer) -> Tokenizer:
    """Returns the tokenizer that made the ids.

    Args:
      others: tokenizers that must give the same ids: of the model that training begins with, say.
    """
    tokenizer = load_tokenizer(prepared.directory / TOKENIZER_DIRECTORY)
    check_tokenizer(prepared, tokenizer)
    if not all(tokenizer.encodes_like(other) for other in others):
        message = "the data was made by another tokenizer than the run's"
        raise InputError(message, file=prepared.directory / MANIFEST_FILE, field="tokenizer")
    return tokenizer


def check_tokenizer(prepared: Prepared, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer other than the manifest's."""
    if tokenizer.fingerprint != prepared.manifest.tokenizer:
        theirs, ours = prepared.manifest.tokenizer[:12], tokenizer.fingerprint[:12]
        message = f"is of another tokenizer: {theirs}, this one is {ours}"
        raise InputError(message, file=prepared.directory / MANIFEST_FILE, field="tokenizer")


def describe(found: list[Prepared]) -> dict[str, Any]:
    """Returns what a run remembers of its data: the manifest's checksum by directory."""
    return {str(each.directory): each.manifest.to_dict()["crc32"] for each in found}


def open_tables(found: list[Prepared], seq_len: int) -> tuple[Any, Any]:
    """Training and held-out rows of the directories.

    Args:
      found: of `find_prepared`, at least one.
      seq_len: T of the run.

    Returns:
      (training rows, held-out rows or None), with `take`; several directories are a `Mixture`.
    """
    for prepared in found:
        _check(prepared, seq_len)
    train = [ShardTable(each.directory, each.manifest, TRAIN) for each in found]
    heldout = [
        ShardTable(each.directory, each.manifest, HELDOUT)
        for each in found
        if each.manifest.splits.get(HELDOUT)
    ]
    if len({each.rate is None for each in found}) > 1:
        raise InputError("give a rate to each directory or to none: DIR@RATE,DIR@RATE", field="data")
    rates = [float(table.num_rows) if each.rate is None else each.rate for each, table in zip(found, train)]
    return (
        train[0] if len(train) == 1 else Mixture(train, rates),
        None if not heldout else heldout[0] if len(heldout) == 1 else Joined(heldout),
    )


def _check(prepared: Prepared, seq_len: int) -> None:
    manifest, directory = prepared.manifest, prepared.directory
    if manifest.seq_len != seq_len:
        message = f"{seq_len}, but the rows in {directory} have {manifest.seq_len} tokens"
        raise InputError(message, field="seq_len")
    if not manifest.splits.get(TRAIN):
        raise InputError("holds no row to train on", file=directory / MANIFEST_FILE, field="splits")
    size = sum(shard.bytes for shard in manifest.shards)
    check_shards(directory, manifest, deep=size < _READ_WHOLE)


def _is_same(directory, other) -> bool:
    """Returns whether two paths mean one directory, by links or otherwise."""
    if is_remote(directory) or is_remote(other):
        return str(directory).rstrip("/") == str(other).rstrip("/")
    return os.path.realpath(directory) == os.path.realpath(other)


def _entry(part: str) -> tuple[Any, float | None]:
    """`DIR@RATE` or `DIR`; a path that exists as it stands is one, whatever its name."""
    path, at, rate = part.rpartition("@")
    if not at or as_path(part).exists():
        return as_path(part), None
    try:
        return as_path(path), float(rate)
    except ValueError as error:
        raise InputError(f"not a rate: {rate!r} in {part!r}", field="data") from error
