"""What a prepared directory says of itself, `DST/manifest.json`, and whether its files still agree.

    DST/manifest.json              written last: a directory without one is not finished
    DST/train-00000.array_record   rows, see `shards`; heldout-00000.array_record beside it
    DST/tokenizer/                 what made the ids

The manifest holds every shard's size and CRC-32, and a CRC-32 of its own text.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from a3_jax.errors import InputError
from a3_jax.paths import POINTER_MESSAGE, as_path, is_pointer, read_beginning, read_json, write_json

FORMAT, FORMAT_VERSION = "a3_data", 1
MANIFEST_FILE, TOKENIZER_DIRECTORY = "manifest.json", "tokenizer"
TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
STORED_DTYPES = ("uint16", "uint32")
_READ_AT_ONCE = 1 << 22  # bytes
_MAX_SEQ_LEN = 1 << 24  # tokens; what a damaged file claims is bounded before it is believed
_SHARD_FILE = re.compile(r"[A-Za-z0-9_-]+\.array_record")  # a file beside the manifest


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """A shard file.

    Attributes:
      file: its name in the directory.
      rows: packed rows. tokens: those that are not padding.
      bytes, crc32: the whole file's size and checksum.
    """

    file: str
    rows: int
    tokens: int
    bytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class PreparedManifest:
    """A prepared directory.

    Attributes:
      seq_len: T, tokens in a row.
      vocab_size: the tokenizer's. largest_id: the largest token id in any row.
      tokenizer: its fingerprint. bos_id, eos_id: its ids, None where it has none.
      token_dtype, segment_dtype: how the rows are stored, "uint16" or "uint32".
      has_roles: whether rows say of each token if it is given, predicted or filler.
      settings: of the preparation. sources: path and size of each file read.
      counts: documents, tokens, rows, padding, and what was passed over by reason.
      splits: shards by split, "train" and, where documents were held out, "heldout".
    """

    seq_len: int
    vocab_size: int
    largest_id: int
    tokenizer: str
    bos_id: int | None
    eos_id: int | None
    token_dtype: str
    segment_dtype: str
    has_roles: bool
    settings: Mapping[str, Any]
    sources: list[dict[str, Any]]
    counts: Mapping[str, Any]
    splits: Mapping[str, list[ShardInfo]]

    def to_dict(self) -> dict[str, Any]:
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return fields | {"crc32": _text_crc32(fields)}

    @property
    def shards(self) -> list[ShardInfo]:
        """All shards, split by split."""
        return [shard for shards in self.splits.values() for shard in shards]


def is_prepared(path) -> bool:
    """Returns whether a path is a directory that `a3 data prepare` has finished."""
    return (as_path(path) / MANIFEST_FILE).exists()


def write_manifest(directory, manifest: PreparedManifest) -> None:
    write_json(as_path(directory) / MANIFEST_FILE, manifest.to_dict())


def read_manifest(directory) -> PreparedManifest:
    """Returns the manifest of a prepared directory."""
    file = as_path(directory) / MANIFEST_FILE
    fields = read_json(file)
    version = fields.get("format_version")
    if fields.get("format") != FORMAT or type(version) is not int:
        raise InputError("not the manifest of prepared data", file=file, field="format")
    if version > FORMAT_VERSION:
        message = f"written by a newer format: version {version}, this a3_jax reads up to {FORMAT_VERSION}"
        raise InputError(message, file=file, field="format_version")
    if fields.pop("crc32", None) != _text_crc32(fields):
        raise InputError("is damaged: its checksum is not that of its text", file=file, field="crc32")
    try:
        fields = {field.name: fields[field.name] for field in dataclasses.fields(PreparedManifest)}
        fields["splits"] = {
            split: [parse_shard(shard) for shard in shards] for split, shards in fields["splits"].items()
        }
        manifest = PreparedManifest(**fields)
        _check_fields(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"is damaged: {type(error).__name__}: {error}", file=file) from error
    return manifest


def parse_shard(fields) -> ShardInfo:
    """Returns a shard as JSON tells it.

    Raises:
      TypeError, ValueError: it is none, or its name is none of a file beside the one that tells it.
    """
    shard = ShardInfo(**fields)
    if not _SHARD_FILE.fullmatch(shard.file):
        raise ValueError(f"{shard.file!r} is no shard of this directory")
    for number in (shard.rows, shard.tokens, shard.bytes, shard.crc32):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{shard.file}: {str(number)[:40]!r} is no count")
    return shard


def _check_fields(manifest: PreparedManifest) -> None:
    """Refuses, by a ValueError, what rows can't be read by."""
    if type(manifest.seq_len) is not int or not 0 < manifest.seq_len <= _MAX_SEQ_LEN:
        raise ValueError(f"seq_len is {str(manifest.seq_len)[:40]}")
    for dtype in (manifest.token_dtype, manifest.segment_dtype):
        if dtype not in STORED_DTYPES:
            raise ValueError(f"rows of {str(dtype)[:40]}")
    kinds = {"vocab_size": int, "largest_id": int, "tokenizer": str, "has_roles": bool,
             "settings": dict, "sources": list, "counts": dict}  # fmt: skip
    for field, kind in kinds.items():
        if type(getattr(manifest, field)) is not kind:
            raise ValueError(f"{field} is no {kind.__name__}")


def check_shards(directory, manifest: PreparedManifest, *, deep: bool) -> None:
    """Compares the files of a directory with its manifest.

    Args:
      deep: checksums too, not sizes alone: every byte is read.
    """
    for complaint in complaints(directory, manifest, deep=deep):
        raise complaint


def complaints(directory, manifest: PreparedManifest, *, deep: bool) -> Iterator[InputError]:
    """Yields every shard that is absent, of another size or, if `deep`, of another checksum."""
    for shard in manifest.shards:
        path = as_path(directory) / shard.file
        if not path.exists():
            yield InputError("the manifest names this shard, but it is not there", file=path)
        elif (size := path.stat().length) != shard.bytes:
            told = f"is damaged: {size} bytes, the manifest says {shard.bytes}"
            yield InputError(POINTER_MESSAGE if is_pointer(read_beginning(path)) else told, file=path)
        elif deep and file_crc32(path) != shard.crc32:
            yield InputError("is damaged: its checksum is not the manifest's", file=path)


def file_crc32(path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with as_path(path).open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _text_crc32(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())
