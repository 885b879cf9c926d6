"""Checkpoints of either format, converted into each other, a piece of a tensor at a time."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from a3_jax.checkpoints.a3_format import Meta, finish_checkpoint, load_params
from a3_jax.checkpoints.check import Checked, check_conversion, is_checked
from a3_jax.checkpoints.chunks import TensorSource
from a3_jax.checkpoints.destination import check_space, shared_directory
from a3_jax.checkpoints.directories import check_free, new_directory
from a3_jax.checkpoints.hf_export import ExportPlan, hf_target, with_dtype, write_hf
from a3_jax.checkpoints.loading import open_source, parse_dtype
from a3_jax.checkpoints.progress import ConversionProgress
from a3_jax.checkpoints.release_format import release_target
from a3_jax.checkpoints.run_facts import run_facts
from a3_jax.checkpoints.safetensors_writer import MAX_SHARD_BYTES
from a3_jax.checkpoints.source_hashes import Hashing, compare_sha256, read_sha256_list, sha256_of
from a3_jax.checkpoints.stored_arrays import write_params
from a3_jax.errors import InputError, check_seed, nearest
from a3_jax.paths import as_path
from a3_jax.runtime.coordination import gather_and_decide, run_on_all, run_on_process_zero
from a3_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

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
    source, meta, tokenizer = run_on_all("convert", lambda: open_source(src, dtype, seed, allow_nonfinite))
    is_hf = bool(source.files)
    if is_hf and tokenizer is not None and tokenizer.vocab_size > source.config.vocab_size:
        message = "%s: its tokenizer has ids up to %d, the embedding has rows for fewer: %d; text that makes "
        message += "such ids is refused where it is used"
        logger.warning(message, source.directory, tokenizer.vocab_size - 1, source.config.vocab_size)
    if check is None and (allow_nonfinite or jax.process_count() > 1):  # one would check, the others wait
        check = False
    export, hf_directory = None, source.directory if is_hf else None
    if to != "a3":
        export = run_on_all("convert", lambda: _plan_export(meta, to, dtype, query_vector))
        hf_directory = as_path(dst)
    checking: bool = run_on_process_zero(
        "convert", lambda: is_checked(check, source.config, hf_directory, dst)
    )
    sums = None if sha256 is None else _compare(source, sha256)
    job = _Conversion(source, meta, tokenizer, dst, dtype, checking, sums)
    if export is None:
        return _to_a3(job, hf_directory)
    checked: list[Checked | None] = []
    run_on_process_zero("convert", lambda: checked.append(_to_hf(job, export, max_shard_bytes)))
    return checked[0] if checked else None


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """What is converted, and where to; `sums`: SHA-256 of the source's files, if they were compared."""

    source: TensorSource
    meta: Meta
    tokenizer: Tokenizer | None
    dst: Any
    dtype: np.dtype | None
    check: bool
    sums: dict[str, str] | None

    def meta_with(self, sums: dict[str, str]) -> Meta:
        """Returns `meta` with the sums of a Hugging Face source's files; those of an A3 source stay."""
        if not sums or self.meta.source is None:
            return self.meta
        return dataclasses.replace(self.meta, source={**self.meta.source, "sha256": sums})


def _to_a3(job: _Conversion, hf_directory) -> Checked | None:
    """Writes an A3 checkpoint; every process reads and writes its share."""
    source = job.source
    total = sum(leaf.nbytes for leaf in source.leaves.values())
    run_on_process_zero("convert", lambda: check_space(job.dst, total))
    checked: list[Checked] = []
    with shared_directory(job.dst) as temporary:
        with (
            Hashing(_share(source) if job.sums is None else ()) as hashing,  # the disk is asked once for both
            ConversionProgress("converted", total // jax.process_count()) as progress,
        ):
            manifest = write_params(temporary, source.leaves, source.chunks, source.read, progress.add)
            found = _merge_sums(run_on_all("convert", hashing.result))

        def finish():
            meta = job.meta_with(found if job.sums is None else job.sums)
            meta = meta if job.dtype is None else with_dtype(meta, job.dtype)
            finish_checkpoint(temporary, manifest, meta, job.tokenizer)
            if job.check:
                params = load_params(temporary)
                checked.append(check_conversion(params, source.config, hf_directory, job.dtype, job.dst))

        run_on_process_zero("convert", finish)
    return checked[0] if checked else None


def _to_hf(job: _Conversion, export: ExportPlan, max_shard_bytes: int) -> Checked | None:
    """Writes a Hugging Face directory; one process does it."""
    source = job.source
    check_space(job.dst, export.nbytes)
    meta = job.meta_with(sha256_of(source.files) if job.sums is None else job.sums)
    facts = None if source.files else run_facts(source.directory, meta.step)
    with new_directory(job.dst) as temporary:
        with ConversionProgress("converted", export.nbytes) as progress:
            write_hf(
                temporary, source.read_leaf, export, meta, job.tokenizer, max_shard_bytes,
                lambda _, nbytes: progress.add(nbytes), facts,
            )  # fmt: skip
        if job.check:
            return check_conversion(source.params(), source.config, temporary, job.dtype, job.dst)
    return None


def _plan_export(meta: Meta, to: str, dtype, query_vector: bool) -> ExportPlan:
    return release_target(meta, dtype) if to == "release" else hf_target(meta, dtype, query_vector)


def _compare(source: TensorSource, sha256) -> dict[str, str]:
    """Returns SHA-256 of all files, which are those of a list. Every process reads its share."""
    wanted = read_sha256_list(sha256)
    if not source.files:
        why = "sums are of a Hugging Face directory; an A3 checkpoint has its own: a3 verify"
        raise InputError(why, field="sha256")
    found = _merge_sums(run_on_all("convert", lambda: sha256_of(_share(source))))
    compare_sha256(source.directory, found, wanted, sha256)
    return found


def _share(source: TensorSource) -> Sequence[Any]:
    """Returns the files that this process hashes."""
    return source.files[jax.process_index() :: jax.process_count()]


def _merge_sums(own: dict[str, str]) -> dict[str, str]:
    return gather_and_decide(
        "convert", own, lambda all_: dict(sorted(item for one in all_ for item in one.items()))
    )
