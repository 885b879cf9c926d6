"""Small files of every kind, and what a prepared directory holds."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from a3_jax import cli
from a3_jax.data.prepared_manifest import read_manifest
from a3_jax.data.shards import ShardTable
from a3_jax.tokenizer import bytes_tokenizer

# What a clone without Git LFS has in place of a file.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
# As Hugging Face gives them for FineWeb's parquet files.
FINEWEB_TYPES = {
    "text": pyarrow.string(), "id": pyarrow.string(), "dump": pyarrow.string(), "url": pyarrow.string(),
    "date": pyarrow.string(), "file_path": pyarrow.string(), "language": pyarrow.string(),
    "language_score": pyarrow.float64(), "token_count": pyarrow.int64(),
}  # fmt: skip


def zstd(content, window_log=0):
    """One frame as `zstd` writes it from a pipe, without the content's size."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_checksum=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


def fineweb_rows(texts):
    return [
        {
            "text": text, "id": f"<urn:uuid:{index}>", "dump": "CC-MAIN-2013-20", "url": f"http://x.org/{index}",
            "date": "2013-05-18T05:48:59Z", "file_path": "s3://commoncrawl/x.warc.gz", "language": "en",
            "language_score": 0.9, "token_count": 7,
        }
        for index, text in enumerate(texts)
    ]  # fmt: skip


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_fineweb(path, texts):
    """Texts as a file of the kind that the name's end says."""
    if path.name.endswith(".parquet"):
        table = pyarrow.Table.from_pylist(fineweb_rows(texts), schema=pyarrow.schema(FINEWEB_TYPES))
        pyarrow.parquet.write_table(table, path, row_group_size=max(1, len(texts) // 3))
        return path
    content = "\n\n".join(texts).encode() if ".txt" in path.name else json_lines(fineweb_rows(texts))
    return write_bytes(path, content)


def write_bytes(path, content):
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    elif path.name.endswith(".zst"):
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


def prepare(capsys, *arguments, tokenizer="bytes", seq_len=32):
    """(exit status, standard output, lines on standard error) of `a3 data prepare`."""
    arguments = [str(argument) for argument in arguments]
    arguments += [f"--tokenizer={tokenizer}", f"--seq_len={seq_len}"]
    status = cli.main(["data", "prepare", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


def rows_of(directory, split="train"):
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        return None
    table = ShardTable(directory, manifest, split)
    return table.take(np.arange(table.num_rows))


def segments_of(directory, split="train"):
    """(tokens, roles or None) of every segment, in order."""
    rows = rows_of(directory, split)
    if rows is None:
        return []
    found = []
    for row, segments in enumerate(rows["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            roles = rows["roles"][row][here].tolist() if "roles" in rows else None
            assert rows["positions"][row][here].tolist() == list(range(here.sum()))
            found.append((rows["tokens"][row][here].tolist(), roles))
    return found


def texts_of(directory, split="train", tokenizer=None):
    """Decoded segments, sorted."""
    tokenizer = tokenizer or bytes_tokenizer()
    return sorted(tokenizer.decode(tokens) for tokens, _ in segments_of(directory, split))


def files_of(directory):
    """Every file below a directory with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
