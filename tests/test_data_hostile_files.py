"""Files as they come: named twice, under `~`, as Git LFS pointers, padded, with byte order marks."""

import codecs
import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from a3_jax.data.documents import find_files, read_documents
from a3_jax.data.prepared import find_prepared
from a3_jax.errors import InputError
from tests.decoding_cli import assert_refused
from tests.prepare_fixtures import POINTER, json_lines, prepare, texts_of, write_bytes, zstd

ROWS = [f"row {index}" for index in range(3000)]
LINES = json_lines({"text": text} for text in ROWS)


@pytest.mark.parametrize(
    "again", ["{0}/a.jsonl", "{0}/*.jsonl", "{0}/./a.jsonl", "{0}/link.jsonl", "a.jsonl"]
)
def test_a_file_named_twice_is_read_once(tmp_path, capsys, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    source = write_bytes(tmp_path / "a.jsonl", b'{"text": "one"}\n')
    (tmp_path / "link.jsonl").symlink_to(source)
    status, out, told = prepare(capsys, source, again.format(tmp_path), tmp_path / "rows", "--json")
    assert status == 0
    assert json.loads(out)["counts"]["documents"] == 1
    assert len(json.loads(out)["sources"]) == 1
    warnings = [line for line in told if "named more than once" in line]
    assert warnings
    assert all(line.split(": ")[1].endswith(".jsonl") for line in warnings)


def test_different_files_of_one_content_are_both_read(tmp_path, capsys):
    names = [str(write_bytes(tmp_path / name, b'{"text": "one"}\n')) for name in ("a.jsonl", "b.jsonl")]
    assert find_files(names) == names
    assert not capsys.readouterr().err


def test_a_prepared_directory_named_twice(tmp_path, capsys):
    source = write_bytes(tmp_path / "a.jsonl", b'{"text": "one"}\n')
    rows = tmp_path / "rows"
    assert prepare(capsys, source, rows)[0] == 0
    assert len(find_prepared(f"{rows},{tmp_path}/./rows")) == 1
    assert f"warning: {tmp_path}" in capsys.readouterr().err
    with pytest.raises(InputError, match="rows: data: is named twice"):
        find_prepared(f"{rows}@0.5,{rows}@0.25")


@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_a_git_lfs_pointer_is_told_before_any_work(tmp_path, capsys, name, is_packed):
    """Also one that somebody compressed with the files around it."""
    good = write_bytes(tmp_path / "good.jsonl", b'{"text": "one"}\n')
    write_bytes(tmp_path / name, POINTER) if is_packed else (tmp_path / name).write_bytes(POINTER)
    for options in ([], ["--text_column=text"], ["--strict"]):
        outcome = prepare(capsys, good, tmp_path / name, tmp_path / "rows", *options)
        assert_refused(outcome, f"{name}: is a Git LFS pointer", "git lfs pull")
        assert not (tmp_path / "rows").exists()
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        read_documents(str(tmp_path / name))


def test_text_about_git_lfs_is_text(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1 is the first line."
    assert read_documents(str(write_bytes(tmp_path / "a.txt", text.encode()))) == (text,)


FORMS = {
    "long.zst": zstd(LINES, 31), "frames.zst": zstd(LINES[:9]) + zstd(LINES[9:]),
    "sized.zst": zstandard.ZstdCompressor().compress(LINES),
    "skipped.zst": b"\x50\x2a\x4d\x18\x02\0\0\0ab" + zstd(LINES), "padded.zst": zstd(LINES) + bytes(9000),
    "members.gz": gzip.compress(LINES[:9]) + gzip.compress(LINES[9:]),
    "padded.gz": gzip.compress(LINES) + bytes(100_000),
    "padded_between.gz": gzip.compress(LINES[:9]) + bytes(511) + gzip.compress(LINES[9:]),
    "garbage.gz": gzip.compress(LINES) + b"garbage", "garbage.zst": zstd(LINES) + b"garbage",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_compressed_forms_are_read_whole(tmp_path, capsys, form):
    suffix = form.split(".")[1]
    source = tmp_path / f"a.jsonl.{suffix}"
    source.write_bytes(FORMS[form])
    assert read_documents(str(source)) == tuple(ROWS)
    capsys.readouterr()
    status, _, told = prepare(capsys, source, tmp_path / "rows")
    assert status == 0
    assert texts_of(tmp_path / "rows") == sorted(ROWS)
    warned = [line for line in told if f"warning: {source}: bytes after its last" in line]
    assert len(warned) == ("garbage" in form)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "txt.gz"])
@pytest.mark.parametrize("damage", ["cut", "checksum"])
def test_rows_before_the_damage_are_kept(tmp_path, capsys, suffix, damage):
    source = tmp_path / f"a.{suffix}"
    texts = [f"row {index} {os.urandom(40).hex()}" for index in range(4000)]
    content = json_lines({"text": text} for text in texts) if "json" in suffix else "\n".join(texts).encode()
    packed = gzip.compress(content) if suffix.endswith("gz") else zstd(content)
    bad = len(packed) - (8 if suffix.endswith("gz") else 4)  # the checksum's first byte
    source.write_bytes(
        packed[: len(packed) // 2] if damage == "cut"
        else packed[:bad] + bytes([packed[bad] ^ 1]) + packed[bad + 1 :]
    )  # fmt: skip
    status, out, told = prepare(capsys, source, tmp_path / "rows", "--json", seq_len=256)
    assert status == 0
    assert json.loads(out)["counts"]["passed_over"] == {"damaged_file": 1}
    assert told[0].startswith(f"warning: {source}:")
    kept = texts_of(tmp_path / "rows")
    whole = len(texts) - (suffix == "txt.gz")  # whose last line has no end
    assert len(kept) == whole if damage == "checksum" else 1000 < len(kept) < 3000
    assert kept == sorted(texts[: len(kept)])


def test_a_source_that_gave_nothing_fails(tmp_path, capsys):
    good = write_bytes(tmp_path / "good.jsonl", b'{"text": "one"}\n')
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    arguments = [good, tmp_path / "bad.jsonl.gz", tmp_path / "rows"]
    for _ in range(2):  # and when it is there already
        status, _, told = prepare(capsys, *arguments)
        assert status == 1
        assert told[-1].startswith(f"a3 data prepare: {tmp_path}/bad.jsonl.gz: gave no document")
    assert texts_of(tmp_path / "rows") == ["one"]


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "jsonl.gz", "txt.zst"])
def test_byte_order_marks(tmp_path, capsys, suffix):
    text = '{"text": "naïve"}\n' if "json" in suffix else "naïve\n\nnaïve"
    marked = write_bytes(tmp_path / f"a.{suffix}", codecs.BOM_UTF8 + text.encode())
    assert set(read_documents(str(marked))) == {"naïve"}
    if "json" in suffix:  # as `cat` joins two of them
        joined = write_bytes(tmp_path / f"b.{suffix}", 2 * (codecs.BOM_UTF8 + text.encode()))
        assert read_documents(str(joined)) == ("naïve", "naïve")
    for encoding in ("utf-16", "utf-16-be"):
        content = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
        wide = write_bytes(tmp_path / f"wide.{suffix}", content)
        assert_refused(
            prepare(capsys, marked, wide, tmp_path / "rows"), f"wide.{suffix}: begins with", "UTF-16"
        )
        assert not (tmp_path / "rows").exists()


def test_two_columns_of_one_name(tmp_path, capsys):
    column = pyarrow.array(["one"])
    for names, bad in ((["text", "text"], True), (["id", "id", "text"], False)):
        source = tmp_path / f"{len(names)}.parquet"
        pyarrow.parquet.write_table(pyarrow.table([column] * len(names), names=names), source)
        outcome = prepare(capsys, source, tmp_path / f"rows{len(names)}")
        if bad:
            assert_refused(outcome, f"{source}: text: the table has 2 columns of this name")
        else:
            assert outcome[0] == 0
