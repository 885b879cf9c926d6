"""Conversion of checkpoints between the formats, by chunk."""

import concurrent.futures
import dataclasses
import hashlib
import logging
import re
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from a3_jax.checkpoints.a3_format import META, META_FILE, Meta, finish_checkpoint, load_meta, load_params
from a3_jax.checkpoints.check import Checked, check_conversion, is_checked
from a3_jax.checkpoints.chunk_writer import write_params
from a3_jax.checkpoints.chunks import TensorSource, cast, index_of, placed
from a3_jax.checkpoints.directories import check_free, check_space, new_directory, shared_directory
from a3_jax.checkpoints.hf_export import ExportPlan, plan_hf_export, plan_release_export, with_dtype, write_hf
from a3_jax.checkpoints.hf_format import HFSource, check_source, open_hf
from a3_jax.checkpoints.loading import a3_tokenizer, find_checkpoint, hf_tokenizer, parse_dtype
from a3_jax.checkpoints.manifest import PARAMS, raise_damage, read_manifest
from a3_jax.checkpoints.model_card import run_facts
from a3_jax.checkpoints.safetensors import MAX_SHARD_BYTES
from a3_jax.checkpoints.stored_arrays import check_same_tree, open_array, unreadable
from a3_jax.checks import check_seed
from a3_jax.errors import InputError, nearest
from a3_jax.model.two_stream import abstract_params
from a3_jax.paths import absolute, as_path, read_text
from a3_jax.progress import ProgressLine
from a3_jax.runtime.coordination import gather_and_decide, run_on_all, run_on_process_zero
from a3_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMATS = ("a3", "hf", "release")
_READ_AT_ONCE, _HASH_THREADS = 1 << 22, 2
_SHA256_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


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

    A few chunks are in memory at a time, and towards Hugging Face a leaf of the parameter tree: never the
    model. A Hugging Face model without query vector gets one drawn from `seed`. The way back keeps
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
      The check's summary; None without a check, and in processes other than the first.

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


def open_source(
    path, dtype=None, seed: int = 0, allow_nonfinite: bool = False
) -> tuple[TensorSource, Meta, Tokenizer | None]:
    """Checks what `open_checkpoint` opens, and reads nothing of its parameters yet.

    Args:
      path, dtype, seed: as `open_checkpoint` takes them.
      allow_nonfinite: NaN and infinity are no error.
    """
    directory, is_hf = find_checkpoint(path)
    if not is_hf:
        meta = load_meta(directory)
        if meta.source is not None:
            check_source(meta.source, directory / META / META_FILE)
        return A3Source(directory, dtype, allow_nonfinite), meta, a3_tokenizer(directory, meta)
    model = open_hf(directory)
    model.warn()
    source = HFSource(model, dtype, seed, allow_nonfinite)
    meta = Meta(model.config, source=model.source())
    return source, meta, hf_tokenizer(directory, meta)


class A3Source(TensorSource):
    """An A3 checkpoint, read by chunk: hardly more than a leaf is in memory.

    The zarr chunks of a leaf are as large as what one device held when it was written: often all of it. To
    read a layer, whole ones are decoded, so those of a leaf are kept until other leaves are read.
    """

    def __init__(self, directory, dtype=None, allow_nonfinite: bool = True):
        """Checks a checkpoint before anything of it is used: every file of the parameters by its checksum.

        A fingerprint says nothing more of arrays that are decoded from these files, and to compute one takes
        longer than to read.

        Args:
          directory: the checkpoint.
          dtype: of all leaves; None: as stored.
          allow_nonfinite: reads NaN and infinity too.
        """
        directory = absolute(directory)
        config, manifest = load_meta(directory).model, read_manifest(directory)
        raise_damage(directory, manifest)
        raise_damage(directory, manifest, deep=True, only=f"{PARAMS}/")
        self.stored = manifest.item(PARAMS)
        check_same_tree(self.stored, abstract_params(config), directory / PARAMS)
        self._dtype, self._lock, self._arrays = dtype, threading.Lock(), {}
        dtypes = {
            tuple(name.split("/")): np.dtype(dtype or jnp.dtype(leaf.dtype))
            for name, leaf in self.stored.items()
        }
        super().__init__(directory, config, dtypes, allow_nonfinite)
        order = {path: number for number, path in enumerate(self.leaves)}
        self.chunks = sorted(self.chunks, key=lambda chunk: order[self._table[chunk.name][0].leaf])

    def read(self, chunk):
        for part in self._table[chunk.name]:
            yield placed(part, chunk, self.read_leaf(part.leaf, index_of(part, chunk)))

    def read_leaf(self, path, index=()):
        with self._lock:
            array = self._read(path, index)
        array = cast(array, self._dtype, f"{PARAMS}/{'/'.join(path)}", self.directory)
        return self._check_finite(array, path, None)

    def params(self):
        return load_params(self.directory)

    def _whole_tensor(self, path, layer):
        name = f"{PARAMS}/{'/'.join(path)}"
        return name, self.directory, cast(self._read(path), self._dtype, name, self.directory)

    def _read(self, path, index=()) -> np.ndarray:
        name = "/".join(path)
        if name not in self._arrays:
            self._make_room(name)
            self._arrays[name] = self._open(name)
        try:
            return self._arrays[name][index].read().result()
        except Exception as error:  # tensorstore's errors share no type
            raise unreadable(self.directory / PARAMS, name, error) from error

    def _make_room(self, name: str) -> None:
        """Keeps the leaves in memory together no larger than the largest one: the longest unused go."""
        most = max(leaf.nbytes for leaf in self.stored.values())
        wanted = {**self._arrays, name: None}
        while len(wanted) > 1 and sum(self.stored[it].nbytes for it in wanted) > most:
            oldest = next(iter(wanted))
            del wanted[oldest], self._arrays[oldest]

    def _open(self, name: str):
        """Opens an array with a cache of its own that goes with it."""
        cache = {"cache_pool": {"total_bytes_limit": 2 * self.stored[name].nbytes + (1 << 20)}}
        return open_array(self.directory / PARAMS, name, self.stored[name], ts.Context(cache))


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
            ProgressLine(total // jax.process_count(), unit="bytes") as progress,
        ):
            manifest = write_params(
                temporary, source.leaves, source.chunks, source.read,
                lambda nbytes: progress.add(nbytes, "converted"),
            )  # fmt: skip
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
    meta = job.meta_with(_sha256_of(source.files) if job.sums is None else job.sums)
    facts = None if source.files else run_facts(source.directory, meta.step)
    with new_directory(job.dst) as temporary:
        with ProgressLine(export.nbytes, unit="bytes") as progress:
            write_hf(
                temporary, source.read_leaf, export, meta, job.tokenizer, max_shard_bytes,
                lambda _, nbytes: progress.add(nbytes, "converted"), facts,
            )  # fmt: skip
        if job.check:
            return check_conversion(source.params(), source.config, temporary, job.dtype, job.dst)
    return None


def _plan_export(meta: Meta, to: str, dtype, query_vector: bool) -> ExportPlan:
    return plan_release_export(meta, dtype) if to == "release" else plan_hf_export(meta, dtype, query_vector)


def _compare(source: TensorSource, sha256) -> dict[str, str]:
    """Returns SHA-256 of all files, after finding each in a list. Every process reads its share."""
    wanted = _read_sha256_list(sha256)
    if not source.files:
        why = "sums are of a Hugging Face directory; an A3 checkpoint has its own: a3 verify"
        raise InputError(why, field="sha256")
    found = _merge_sums(run_on_all("convert", lambda: _sha256_of(_share(source))))
    for name, digits in found.items():
        if name not in wanted:
            raise InputError(f"is not listed in {sha256}", file=as_path(source.directory) / name)
        if wanted[name] != digits:
            why = f"its SHA-256 is {digits}, {sha256} says {wanted[name]}"
            raise InputError(why, file=as_path(source.directory) / name)
    return found


def _share(source: TensorSource) -> Sequence[Any]:
    """Returns the files that this process hashes."""
    return source.files[jax.process_index() :: jax.process_count()]


def _merge_sums(own: dict[str, str]) -> dict[str, str]:
    return gather_and_decide(
        "convert", own, lambda all_: dict(sorted(item for one in all_ for item in one.items()))
    )


class Hashing:
    """SHA-256 of files, computed in threads beside other work; a context manager.

    Args:
      files: in the order in which they will be read otherwise.
    """

    def __init__(self, files: Sequence[Any]):
        self._stopped = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(_HASH_THREADS, "a3_sha256")
        self._sums = {as_path(file).name: self._pool.submit(self._sha256, file) for file in files}

    def result(self) -> dict[str, str]:
        """Waits for all files, and returns name -> 64 hexadecimal digits."""
        return {name: sum_.result() for name, sum_ in self._sums.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _sha256(self, file) -> str:
        digest = hashlib.sha256()
        try:
            with as_path(file).open("rb") as stream:
                while not self._stopped.is_set() and (piece := stream.read(_READ_AT_ONCE)):
                    digest.update(piece)
        except OSError as error:
            raise InputError(f"can't be read: {error.strerror or error}", file=file) from error
        return digest.hexdigest()


def _sha256_of(files: Sequence[Any]) -> dict[str, str]:
    """Returns `Hashing.result` of files, with no other work beside it."""
    with Hashing(files) as hashing:
        return hashing.result()


def _read_sha256_list(file) -> dict[str, str]:
    """Reads what `sha256sum FILE...` printed, by the last part of each name."""
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SHA256_LINE.fullmatch(line.rstrip())
        if match is None:
            why = "not a line of sha256sum: 64 hexadecimal digits, two spaces, a name"
            raise InputError(why, file=file, line=number)
        digits, name = match[1].lower(), match[2].rsplit("/", 1)[-1]
        if sums.setdefault(name, digits) != digits:
            raise InputError(f"{name} has another sum in an earlier line", file=file, line=number)
    return sums
