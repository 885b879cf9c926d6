"""Checkpoints of either format, converted into each other, a piece of a tensor at a time."""

import dataclasses

import jax

from a3_jax.checkpoints.a3_format import Meta, load_params
from a3_jax.checkpoints.check import Checked, check_conversion, is_checked
from a3_jax.checkpoints.conversion_sources import Source, open_source
from a3_jax.checkpoints.destination import check_space, shared_directory
from a3_jax.checkpoints.directories import check_free, new_directory
from a3_jax.checkpoints.hf_export import Target, hf_target, with_dtype, write_hf
from a3_jax.checkpoints.loading import parse_dtype
from a3_jax.checkpoints.progress import Progress
from a3_jax.checkpoints.release_format import release_target
from a3_jax.checkpoints.safetensors_writer import MAX_SHARD_BYTES
from a3_jax.checkpoints.source_hashes import Hashing, compare_sha256, read_sha256_list, sha256_of
from a3_jax.checkpoints.streaming import finish_checkpoint, write_params
from a3_jax.checks import check_seed
from a3_jax.errors import InputError, nearest
from a3_jax.paths import as_path
from a3_jax.runtime.coordination import gather_and_decide, run_on_all, run_on_process_zero

FORMATS = ("a3", "hf", "release")


def convert(
    src,
    dst,
    to: str = "a3",
    dtype=None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    query_vector: bool = True,
    check: bool | None = False,
    allow_nonfinite: bool = False,
    sha256=None,
) -> Checked | None:
    """Writes a checkpoint in the other format, or the same one in another dtype.

    Some pieces of tensors are in memory at a time, and towards Hugging Face a leaf of the parameter tree:
    never the model. A Hugging Face model without query vector gets one drawn from `seed`. The way back keeps
    the source's tensor names, dtypes, architecture and other files, and adds the vector. In a run of several
    processes all make the call; to A3 each reads and writes its share.

    Args:
      src: anything that `open_checkpoint` opens.
      dst: a directory that is absent or empty; it appears whole or not at all.
      to: "a3", "hf", or "release", Hugging Face's files with the names of the authors' class.
      dtype: "float32", "bfloat16" or "float16", kept on the way back; None: the source's.
      max_shard_bytes: of the safetensors files.
      query_vector: False writes a Hugging Face directory without it: the plain left-to-right model.
      check: compare what was written with `transformers` before `dst` appears; None: where that is
        installed, half of the free memory holds the model twice in float32, one process converts, and values
        have to be finite.
      allow_nonfinite: convert parameters that are NaN or infinite too.
      sha256: a file as sha256sum prints it, with which every file of a Hugging Face source is compared
        before anything is written. Without, the sums are recorded all the same.

    Returns:
      What the check found; None without, and in processes other than the first.

    Raises:
      InputError: a source that can't be converted, a `dst` that is in use, a disk that is too small, or a
        check that can't be made.
      RunError: the check failed; there is no `dst`.
    """
    if to not in FORMATS:
        raise InputError(f"must be one of {', '.join(FORMATS)}, got {to!r}{nearest(to, FORMATS)}", field="to")
    check_seed(seed)
    dtype = parse_dtype(dtype)
    run_on_all("convert", lambda: check_free(dst))
    source = run_on_all("convert", lambda: open_source(src, dtype, seed, allow_nonfinite))
    if check is None and (allow_nonfinite or jax.process_count() > 1):  # one would check, the others wait
        check = False
    target, hf_directory = None, source.hf_directory
    if to != "a3":
        target = run_on_all("convert", lambda: _target(source.meta, to, dtype, query_vector))
        hf_directory = as_path(dst)
    checking: bool = run_on_process_zero(
        "convert", lambda: is_checked(check, source.config, hf_directory, dst)
    )
    sums = None if sha256 is None else _compared(source, sha256)
    if target is None:
        return _to_a3(source, dst, dtype, checking, sums)
    checked: list[Checked | None] = []
    run_on_process_zero(
        "convert", lambda: checked.append(_to_hf(source, dst, target, dtype, max_shard_bytes, checking, sums))
    )
    return checked[0] if checked else None


def _to_a3(source: Source, dst, dtype, check: bool, sums) -> Checked | None:
    """Every process reads and writes its share."""
    total = sum(leaf.nbytes for leaf in source.leaves.values())
    run_on_process_zero("convert", lambda: check_space(dst, total))
    checked: list[Checked] = []
    with shared_directory(dst) as temporary:
        with (
            Hashing(_share(source) if sums is None else ()) as hashing,  # the disk is asked once for both
            Progress("converted", total // jax.process_count()) as progress,
        ):
            manifest = write_params(temporary, source.leaves, source.pieces, source.read, progress.add)
            found = _merged(run_on_all("convert", hashing.result))

        def finish():
            meta = _with_sums(source.meta, found if sums is None else sums)
            meta = meta if dtype is None else with_dtype(meta, dtype)
            finish_checkpoint(temporary, manifest, meta, source.tokenizer)
            if check:
                params = load_params(temporary)
                checked.append(check_conversion(params, source.config, source.hf_directory, dtype, dst))

        run_on_process_zero("convert", finish)
    return checked[0] if checked else None


def _to_hf(source: Source, dst, target: Target, dtype, max_shard_bytes, check: bool, sums) -> Checked | None:
    """One process does it."""
    check_space(dst, target.nbytes)
    meta = _with_sums(source.meta, sha256_of(source.files) if sums is None else sums)
    with new_directory(dst) as temporary:
        with Progress("converted", target.nbytes) as progress:
            write_hf(
                temporary, source.read_leaf, target, meta, source.tokenizer, max_shard_bytes,
                lambda _, nbytes: progress.add(nbytes), source.facts(),
            )  # fmt: skip
        if check:
            return check_conversion(source.params(), source.config, temporary, dtype, dst)
    return None


def _target(meta: Meta, to: str, dtype, query_vector: bool) -> Target:
    return release_target(meta, dtype) if to == "release" else hf_target(meta, dtype, query_vector)


def _compared(source: Source, sha256) -> dict[str, str]:
    """SHA-256 of all files, those of a list. Every process reads its share."""
    wanted = read_sha256_list(sha256)
    if not source.files:
        why = "sums are of a Hugging Face directory; an A3 checkpoint has its own: a3 verify"
        raise InputError(why, field="sha256")
    found = _merged(run_on_all("convert", lambda: sha256_of(_share(source))))
    compare_sha256(source.directory, found, wanted, sha256)
    return found


def _share(source: Source):
    """The files that this process hashes."""
    return source.files[jax.process_index() :: jax.process_count()]


def _merged(own: dict[str, str]) -> dict[str, str]:
    return gather_and_decide(
        "convert", own, lambda all_: dict(sorted(item for one in all_ for item in one.items()))
    )


def _with_sums(meta: Meta, sums: dict[str, str]) -> Meta:
    """`meta` with the sums of what a Hugging Face source consists of; those of an A3 source stay."""
    if not sums or meta.source is None:
        return meta
    return dataclasses.replace(meta, source={**meta.source, "sha256": sums})
