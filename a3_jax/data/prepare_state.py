"""What a preparation has done so far, so that a killed one goes on, and who is at it.

    DST/progress.json      settings, sources, finished shards, counts, the record to go on with
    DST/pending-N.npz      documents that are read and in no shard yet, of N finished shards
    DST/.lock              held while one works there (local directories)

Both files change after each shard and are gone when all is done.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from a3_jax.data.documents import BadRecord
from a3_jax.data.prepared_manifest import SPLITS, TOKENIZER_DIRECTORY, ShardInfo, parse_shard
from a3_jax.errors import InputError
from a3_jax.paths import as_path, check_parents, read_json

PROGRESS_FILE, LOCK_FILE = "progress.json", ".lock"
_PENDING = re.compile(r"pending-[0-9]+\.npz")
_FIELD_NAME = re.compile(r"[\w.\-\[\] ()]{1,60}")
_MOST_NAMES = 50  # fields that are named: keys may be data

Waiting = dict[str, list[tuple[np.ndarray, np.ndarray | None]]]  # tokens and roles by split


@dataclasses.dataclass
class PrepareProgress:
    """How far a preparation is.

    Attributes:
      settings: what it was told. sources: path, bytes and, so far, documents and records passed over of
        each file.
      heldout_below: documents of a smaller digest are held out.
      next: source and record to go on with.
      splits: finished shards by split. pending: the file with documents that are in none yet.
      counts: documents, heldout_documents, cut, rows, tokens.
      passed_over: records that gave no document, by reason. first: of each reason the first one.
        `sources` say the same of each file, once it has any.
      ignored: documents with a field that nothing reads, by its name.
      largest_id: the largest token id in a finished shard.
    """

    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    heldout_below: int = 0
    next: tuple[int, int] = (0, 0)
    splits: dict[str, list[ShardInfo]] = dataclasses.field(default_factory=lambda: {s: [] for s in SPLITS})
    pending: str | None = None
    counts: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("documents", "heldout_documents", "cut", "rows", "tokens"), 0)
    )
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)
    largest_id: int = 0

    @property
    def num_shards(self) -> int:
        return sum(map(len, self.splits.values()))

    def pass_over(self, record: BadRecord) -> None:
        """Counts a record that gives no document."""
        source = self.sources[record.source]
        of_source = source.setdefault("passed_over", {}), source.setdefault("first_passed_over", {})
        for counts, first in ((self.passed_over, self.first), of_source):
            counts[record.reason] = counts.get(record.reason, 0) + 1
            first.setdefault(record.reason, str(record))

    def ignore(self, names: Sequence[str]) -> None:
        """Counts the fields of a document that nothing reads; beyond `_MOST_NAMES` under one name."""
        for name in names:
            name = name if _FIELD_NAME.fullmatch(name) else ascii(name[:60])
            if name not in self.ignored and len(self.ignored) >= _MOST_NAMES:
                name = "others"
            self.ignored[name] = self.ignored.get(name, 0) + 1

    def check_same(self, settings: Mapping[str, Any], sources: list[dict[str, Any]], directory) -> None:
        """Refuses to go on with other settings or files."""
        told = [
            f"{name} {self.settings.get(name)!r}, now {settings.get(name)!r}"
            for name in dict.fromkeys([*self.settings, *settings])
            if self.settings.get(name) != settings.get(name)
        ]
        before, now = (
            [(each["path"], each["bytes"]) for each in listed] for listed in (self.sources, sources)
        )
        if before != now:
            other = next(
                (ours or theirs for ours, theirs in _side_by_side(now, before) if ours != theirs), ("", 0)
            )
            told.append(f"the files to read, such as {other[0]}")
        if told:
            message = f"was begun with other settings: {'; '.join(told)}; remove it to begin anew"
            raise InputError(message, file=directory)


def read_progress(directory) -> PrepareProgress | None:
    """Returns what an unfinished preparation left; None where there is none."""
    file = as_path(directory) / PROGRESS_FILE
    if not file.exists():
        return None
    fields = read_json(file)
    try:
        fields["splits"] = {
            split: [parse_shard(shard) for shard in fields["splits"][split]] for split in SPLITS
        }
        source, record = fields["next"]
        fields["next"] = int(source), int(record)
        if fields["pending"] is not None and not _PENDING.fullmatch(fields["pending"]):
            raise ValueError(f"{fields['pending']!r} is no file of ours")
        return PrepareProgress(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError("not what `a3 data prepare` writes; remove it to begin anew", file=file) from error


def write_progress(directory, progress: PrepareProgress, waiting: Waiting) -> None:
    """Saves progress and the documents in no shard yet; what was saved before is valid until then.

    Raises:
      OSError: it can't be written.
    """
    before, progress.pending = progress.pending, None
    if any(waiting.values()):
        progress.pending = f"pending-{progress.num_shards}.npz"
        write_whole(as_path(directory) / progress.pending, _packed(waiting))
    text = json.dumps(dataclasses.asdict(progress), indent=2)
    write_whole(as_path(directory) / PROGRESS_FILE, text.encode())
    if before not in (None, progress.pending):
        (as_path(directory) / before).unlink(missing_ok=True)


def read_waiting(directory, progress: PrepareProgress) -> Waiting:
    """Returns the documents that `write_progress` saved."""
    waiting: Waiting = {split: [] for split in SPLITS}
    if progress.pending is None:
        return waiting
    file = as_path(directory) / progress.pending
    try:
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            for split in SPLITS:
                ends = np.cumsum(arrays[f"{split}_lengths"])[:-1]
                tokens = np.split(arrays[f"{split}_tokens"], ends)
                roles = [None] * len(tokens)
                if f"{split}_roles" in arrays:
                    roles = np.split(arrays[f"{split}_roles"], ends)
                waiting[split] = [pair for pair in zip(tokens, roles) if len(pair[0])]
    except (OSError, KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError("is damaged; remove the directory to begin anew", file=file) from error
    return waiting


def forget(directory, *, everything: bool = False) -> None:
    """Removes the files of an unfinished preparation; with `everything` also what stands for its result."""
    names = ["pending-*.npz", PROGRESS_FILE, ".*.tmp"]
    names += ["*.array_record", f"{TOKENIZER_DIRECTORY}/*"] if everything else []
    for name in names:
        for path in as_path(directory).glob(name):
            path.unlink(missing_ok=True)
    if everything and (as_path(directory) / TOKENIZER_DIRECTORY).exists():
        (as_path(directory) / TOKENIZER_DIRECTORY).rmdir()


@contextlib.contextmanager
def alone_in(directory) -> Iterator[None]:
    """Makes a directory if need be, for this process alone; removes one that it made and left empty."""
    if "://" in str(directory):
        yield
        return
    check_parents(directory)
    is_new = not os.path.exists(directory)
    try:
        os.makedirs(directory, exist_ok=True)
        lock = _lock(os.path.join(directory, LOCK_FILE))
    except OSError as error:
        raise InputError(f"can't be written there: {error.strerror}", file=directory) from error
    try:
        yield
    finally:
        os.unlink(os.path.join(directory, LOCK_FILE))
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                os.rmdir(directory)


def write_whole(path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
      OSError: it can't be written.
    """
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):
        path.write_bytes(content)
        return
    temporary = os.path.join(path.parent, f".{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _lock(path: str) -> int:
    """Locks a file and returns its descriptor; locks again if the last holder has just removed it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    return lock
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(
                "another `a3 data prepare` is at work there", file=os.path.dirname(path)
            ) from error
        os.close(lock)


def _packed(waiting: Waiting) -> bytes:
    arrays = {}
    for split, documents in waiting.items():
        arrays[f"{split}_lengths"] = np.array([len(tokens) for tokens, _ in documents], np.int64)
        arrays[f"{split}_tokens"] = np.concatenate([np.zeros(0, np.int32), *(each for each, _ in documents)])
        roles = [roles for _, roles in documents if roles is not None]
        if roles:
            arrays[f"{split}_roles"] = np.concatenate(roles)
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _side_by_side(left: list, right: list):
    length = max(len(left), len(right))
    return zip(*(each + [None] * (length - len(each)) for each in (left, right)))
