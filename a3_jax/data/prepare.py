"""`a3 data prepare`: files of text to packed rows on disk.

    read, parse (a thread ahead) -> tokenise (in parallel) -> collect `shard_tokens` -> pack -> a shard

A shard is made of the next documents in order and of nothing else, so that a run that was killed and
goes on writes the same bytes as one that was not. What `progress.json` says is done is done.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from a3_jax.checks import number, one_of, whole_number
from a3_jax.data.documents import DAMAGED, TEXT_FIELD, BadRecord, DocumentSource, find_files
from a3_jax.data.encoding import Document, Encoded, Encoder, embedding_rows
from a3_jax.data.prepare_state import (
    LOCK_FILE,
    PrepareProgress,
    alone_in,
    forget,
    read_progress,
    read_waiting,
    write_progress,
    write_whole,
)
from a3_jax.data.prepared_manifest import (
    HELDOUT,
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_DIRECTORY,
    TRAIN,
    PreparedManifest,
    complaints,
    is_prepared,
    read_manifest,
    write_manifest,
)
from a3_jax.data.reading import CHATS, DIGESTS, TEXT, Reading, Smallest, encoded, parser, prefetched
from a3_jax.data.shards import segment_dtype, token_dtype, write_shard
from a3_jax.data.table import PACKINGS, long_first_fit, pack
from a3_jax.data.templates import chat_template
from a3_jax.errors import EXIT_FAILED, InputError, RunError
from a3_jax.paths import absolute, as_path
from a3_jax.progress import ProgressLine
from a3_jax.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """What a preparation is told; `a3 data prepare --help` says what each does."""

    tokenizer: str
    seq_len: int = 2048
    text_column: str | None = None
    bos: str = "auto"
    eos: str = "auto"
    packing: str = "first_fit"
    holdout: float = 0
    shard_tokens: int = 1 << 24
    filler: int = 32
    chat_template: str | None = None
    strict: bool = False
    max_passed_over: float = 0.5

    def __post_init__(self):
        for name, least in (("seq_len", 1), ("shard_tokens", 1), ("filler", 0)):
            whole_number(name, getattr(self, name), least)
        one_of("packing", self.packing, PACKINGS)
        if not self.holdout >= 0 or (self.holdout >= 1 and not float(self.holdout).is_integer()):
            message = f"must be a share below 1 or a number of documents, got {self.holdout}"
            raise InputError(message, field="holdout")
        number("max_passed_over", self.max_passed_over, 0, 1)


def prepare(data: Sequence[str], directory, options: Options) -> tuple[PreparedManifest, bool]:
    """Prepares a directory, goes on with it, or finds it done.

    Args:
      data: files and globs.
      directory: to write, local or in a bucket: absent, empty, or of the same preparation.
      options: what to make.

    Returns:
      Its manifest, and whether it was there already.

    Raises:
      InputError: as `sources.find_files`; bad options; a directory of something else, or at which another
        process is at work; with `strict` the first bad record; no document at all.
      RunError: a larger share of a source than `max_passed_over` fails for one reason.
      OSError: the directory can't be written. Finished shards stay, and the same call goes on there.
    """
    directory = absolute(directory)
    sources = [DocumentSource(name, index) for index, name in enumerate(find_files(data))]
    job = _Job(sources, options)
    with alone_in(directory):
        listed = [{"path": str(absolute(each.name)), "bytes": each.size, "documents": 0} for each in sources]
        if is_prepared(directory):
            manifest = read_manifest(directory)
            made = PrepareProgress({**manifest.settings}, manifest.sources)
            made.check_same(job.settings, listed, directory)
            return manifest, True
        progress = read_progress(directory)
        if progress is None:
            _check_free(directory)
            progress = PrepareProgress(job.settings, listed)
        progress.check_same(job.settings, listed, directory)
        try:
            return job.run(directory, progress), False
        except (InputError, RunError):
            if not progress.splits[TRAIN]:
                forget(directory, everything=True)
            raise


def damage(directory) -> list[InputError]:
    """Returns what is wrong with a prepared directory: every byte of it is read."""
    if not is_prepared(directory):
        raise InputError(f"no {MANIFEST_FILE} there: nothing that is finished", file=directory)
    try:
        manifest = read_manifest(directory)
    except InputError as error:
        return [error]
    found = list(complaints(directory, manifest, deep=True))
    folder = as_path(directory) / TOKENIZER_DIRECTORY
    try:
        if load_tokenizer(folder).fingerprint != manifest.tokenizer:
            found.append(InputError("is damaged: not the manifest's tokenizer", file=folder))
    except InputError as error:
        found.append(error)
    return found


class _Job:
    """One preparation: what to read, and what to make of it."""

    def __init__(self, sources: list[DocumentSource], options: Options):
        self._sources, self._options = sources, options
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._reading = Reading(sources, options.text_column)
        self._kind = self._reading.kind
        template = None
        if self._kind == CHATS or options.chat_template:
            template = chat_template(self._tokenizer, options.chat_template)
        bos = "no" if template is not None and options.bos == "auto" else options.bos  # it writes its own
        rows = embedding_rows(options.tokenizer)
        self._encoder = Encoder(
            self._tokenizer,
            bos=bos,
            eos=options.eos,
            seq_len=options.seq_len,
            filler=options.filler,
            rows=rows if rows and rows < self._tokenizer.vocab_size else None,
        )
        self._check(template)
        self._parse = parser(self._kind, options.text_column, template, self._tokenizer)
        self.settings = self._settings(template)

    def _check(self, template) -> None:
        options = self._options
        if self._kind == CHATS and template is None:
            raise InputError(
                "messages need a chat template, and the tokenizer has none", field="chat_template"
            )
        if self._kind == TEXT and template is not None:
            raise InputError("is of messages and of prompts, the sources hold text", field="chat_template")
        if self._kind != TEXT and options.packing == "concat":
            raise InputError("would cut dialogs anywhere: take first_fit or none", field="packing")
        if self._kind != TEXT and options.eos == "auto" and not self._tokenizer.eos_ids:
            raise InputError("the tokenizer has none to end a response; 'no' goes without", field="eos")

    def _settings(self, template) -> dict[str, Any]:
        options = self._options
        settings = {
            "tokenizer": self._tokenizer.fingerprint, "seq_len": options.seq_len, "kind": self._kind,
            "bos": options.bos, "adds_bos": bool(self._encoder.bos),
            "eos": options.eos, "adds_eos": bool(self._encoder.eos),
            "packing": options.packing, "holdout": options.holdout, "shard_tokens": options.shard_tokens,
        }  # fmt: skip
        if self._encoder.rows:
            settings["embedding_rows"] = self._encoder.rows
        if self._kind == TEXT:
            return settings | {"text_column": options.text_column or TEXT_FIELD}
        digest = template and hashlib.sha256(template.text.encode("utf-8", "surrogatepass")).hexdigest()
        if len(self._tokenizer.eos_ids) > 1:  # each of them ends a response
            settings |= {"eos_ids": list(self._tokenizer.eos_ids)}
        return settings | {"filler": options.filler, "chat_template": digest}

    def run(self, directory, progress: PrepareProgress) -> PreparedManifest:
        """Everything from `progress.next` on."""
        if not progress.num_shards and progress.next == (0, 0) and not progress.heldout_below:
            progress.heldout_below = self._heldout_below()
            write_progress(directory, progress, {split: [] for split in SPLITS})
        collected = _Collected(directory, self._options, progress, self._tokenizer)
        line = ProgressLine(self._reading.size, unit="bytes")
        try:
            if progress.num_shards:
                line.note(f"goes on after {progress.num_shards} finished shards")
            batches = self._reading.batches(self._parse, progress.next)
            with contextlib.closing(encoded(batches, self._encoder)) as made:
                for items, bytes_read in made:
                    for item in items:
                        if isinstance(item, BadRecord):
                            item.file = item.file or self._sources[item.source].name
                            if item.reason == DAMAGED and not self._options.strict:
                                line.note(f"warning: {item}")
                        collected.take(item)
                    tokens = progress.counts["tokens"] + sum(collected.tokens.values())
                    line.update(bytes_read, "tokenising", tokens=tokens)
        finally:
            line.close()
        return collected.finish(self._tokenizer, self._kind != TEXT)

    def _heldout_below(self) -> int:
        """Returns the digest below which documents are held out; a number of them takes a pass over all."""
        holdout = self._options.holdout
        if holdout < 1:
            return int(holdout * DIGESTS)
        line = ProgressLine(self._reading.size, unit="bytes")
        smallest = Smallest(int(holdout) + 1)
        try:
            for batch, bytes_read in prefetched(self._reading.batches(self._parse)):
                for item in batch:
                    if isinstance(item, Document):
                        smallest.add(item.digest)
                line.update(bytes_read, "choosing what to hold out")
        finally:
            line.close()
        return max(smallest.values(), default=0)  # the largest of them stays: at least one to train on


class _Collected:
    """Documents on their way into shards."""

    def __init__(self, directory, options: Options, progress: PrepareProgress, tokenizer: Tokenizer):
        self._directory, self._options, self._progress = directory, options, progress
        self._vocab_size = tokenizer.vocab_size
        self._waiting = read_waiting(directory, progress)
        self.tokens = {
            split: sum(len(tokens) for tokens, _ in waiting) for split, waiting in self._waiting.items()
        }

    def take(self, item: Encoded | BadRecord) -> None:
        """Counts a document and keeps it, or writes the shard that it fills."""
        progress = self._progress
        if isinstance(item, BadRecord):
            if self._options.strict:
                raise item
            progress.pass_over(item)
            return
        is_heldout = item.document.digest < progress.heldout_below
        split = HELDOUT if is_heldout else TRAIN
        progress.ignore(item.document.ignored)
        tokens, roles = item.tokens, item.roles
        is_cut = item.is_cut
        if self._options.packing == "none" and len(tokens) > self._options.seq_len:
            tokens, is_cut = tokens[: self._options.seq_len], True
        self._waiting[split].append((tokens, roles))
        self.tokens[split] += len(tokens)
        progress.counts["documents"] += 1
        progress.counts["heldout_documents"] += is_heldout
        progress.counts["cut"] += is_cut
        progress.sources[item.document.source]["documents"] += 1
        if self.tokens[split] >= self._options.shard_tokens:
            self._write(split)
            progress.next = (item.document.source, item.document.number + 1)
            write_progress(self._directory, progress, self._waiting)

    def finish(self, tokenizer: Tokenizer, has_roles: bool) -> PreparedManifest:
        """Writes what is left, the tokenizer and, last, the manifest."""
        progress = self._progress
        self._check_passed_over()
        for split in SPLITS:
            if self._waiting[split]:
                self._write(split)
        if not progress.splits[TRAIN]:
            message = "no document to train on" + "".join(f"; {first}" for first in progress.first.values())
            raise InputError(message, file=self._directory)
        for name, text in tokenizer.files().items():
            content = text.encode("utf-8", "surrogatepass")
            write_whole(as_path(self._directory) / TOKENIZER_DIRECTORY / name, content)
        manifest = self._manifest(tokenizer, has_roles)
        _publish(self._directory, manifest)
        forget(self._directory)
        return manifest

    def _check_passed_over(self) -> None:
        """Stops where a source is not what the options take it for: most of it fails for one reason."""
        for source in self._progress.sources:
            counts = dict(source.get("passed_over", {}))
            counts.pop(DAMAGED, None)  # no record
            total = source["documents"] + sum(counts.values())
            reason = max(counts, key=lambda reason: counts[reason], default="")
            if reason and counts[reason] > self._options.max_passed_over * total:
                first = source["first_passed_over"][reason]
                message = (
                    f"{source['path']}: {counts[reason]:,} of {total:,} records fail for one reason, "
                    f"{reason}; the first: {first}; mend them, or go on without with --max_passed_over=1"
                )
                raise RunError(EXIT_FAILED, " ".join(message.split()))

    def _manifest(self, tokenizer: Tokenizer, has_roles: bool) -> PreparedManifest:
        progress, counts, seq_len = self._progress, self._progress.counts, self._options.seq_len
        told = {
            "padding": counts["rows"] * seq_len - counts["tokens"],
            "passed_over": progress.passed_over,
            "first_passed_over": progress.first,
        }
        told |= {"ignored_fields": progress.ignored} if progress.ignored else {}
        return PreparedManifest(
            seq_len=seq_len,
            vocab_size=tokenizer.vocab_size,
            largest_id=progress.largest_id,
            tokenizer=tokenizer.fingerprint,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            token_dtype=token_dtype(tokenizer.vocab_size),
            segment_dtype=segment_dtype(seq_len),
            has_roles=has_roles,
            settings=progress.settings,
            sources=progress.sources,
            counts=counts | told,
            splits={split: shards for split, shards in progress.splits.items() if shards},
        )

    def _write(self, split: str) -> None:
        """A shard of the documents that wait in a split."""
        progress, options = self._progress, self._options
        tokens, roles = zip(*self._waiting[split])
        has_roles = roles[0] is not None
        table = pack(
            tokens,
            options.seq_len,
            options.packing,
            roles if has_roles else None,
            first_fit_by=long_first_fit,
        )
        path = as_path(self._directory) / f"{split}-{len(progress.splits[split]):05d}.array_record"
        try:
            shard = write_shard(
                path, table, tokens=token_dtype(self._vocab_size), segments=segment_dtype(options.seq_len)
            )
        except OSError as error:
            raise OSError(f"{path}: {error.strerror or error}") from error
        progress.splits[split].append(shard)
        progress.counts["rows"] += table.num_rows
        progress.counts["tokens"] += table.num_tokens
        progress.largest_id = max(progress.largest_id, table.largest_id)
        self._waiting[split], self.tokens[split] = [], 0


def _check_free(directory) -> None:
    """Refuses a directory with files of others."""
    if not as_path(directory).exists():
        return
    names = [path.name for path in as_path(directory).iterdir()]
    names = [name for name in names if name != LOCK_FILE and not name.endswith(".tmp")]
    if names:
        raise InputError(f"is not empty ({names[0]}), and holds no prepared data", file=directory)


def _publish(directory, manifest: PreparedManifest) -> None:
    try:
        write_manifest(directory, manifest)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise OSError(str(error)) from error
        raise
