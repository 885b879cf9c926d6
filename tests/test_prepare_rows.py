"""How documents become rows: packing, what is held out, BOS and EOS, all tokenizers."""

import json

import numpy as np
import pytest

from a3_jax import progress
from a3_jax.data import documents, reading
from a3_jax.data.prepared_manifest import read_manifest
from a3_jax.tokenizer import bytes_tokenizer, from_files
from tests.decoding_cli import assert_refused
from tests.prepare_fixtures import (
    json_lines,
    prepare,
    rows_of,
    segments_of,
    texts_of,
    write_bytes,
    write_fineweb,
)
from tests.test_tokenizer import AWKWARD_TEXTS, byte_fallback_tokenizer, word_tokenizer

BOS, EOS = bytes_tokenizer().bos_id, bytes_tokenizer().eos_id


def counts_of(directory):
    return read_manifest(directory).counts


def write_texts(path, texts):
    return write_bytes(path, json_lines([{"text": text} for text in texts]))


def write_tokenizer(directory, tokenizer):
    directory.mkdir()
    for name, text in tokenizer.files().items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize("sigma", [0.5, 1])
def test_padding_of_log_normal_lengths(tmp_path, capsys, sigma):
    lengths = np.random.default_rng(0).lognormal(np.log(400), sigma, 1000).astype(int)
    source = write_texts(tmp_path / "a.jsonl", ["x" * max(length, 1) for length in lengths])
    _, out, _ = prepare(capsys, source, tmp_path / "rows", seq_len=2048)
    counts = counts_of(tmp_path / "rows")
    assert counts["tokens"] == lengths.clip(1).sum() + 1000  # an EOS each
    assert counts["padding"] == counts["rows"] * 2048 - counts["tokens"]
    assert counts["padding"] <= 0.01 * counts["rows"] * 2048
    assert f"padding {counts['padding'] / (counts['rows'] * 2048):.2%}" in out


def test_concatenated(tmp_path, capsys):
    texts = ["abc", "defgh", "ij", "klmnopqrst"]
    source = write_texts(tmp_path / "a.jsonl", texts)
    assert prepare(capsys, source, tmp_path / "rows", "--packing=concat", seq_len=8)[0] == 0
    stream = [token for text in texts for token in (*text.encode(), EOS)]
    rows = rows_of(tmp_path / "rows")
    assert rows["tokens"].ravel()[: len(stream)].tolist() == stream
    assert rows["segment_ids"].ravel().tolist() == [1] * 4 + [2] * 4 + [1] * 2 + [2] * 3 + [3] * 3 + [1] * 8
    assert counts_of(tmp_path / "rows")["padding"] == 0


def test_a_row_each(tmp_path, capsys):
    source = write_texts(tmp_path / "a.jsonl", ["abc", "defghijklmn"])
    assert prepare(capsys, source, tmp_path / "rows", "--packing=none", seq_len=8)[0] == 0
    assert [bytes(tokens[:3]) for tokens, _ in segments_of(tmp_path / "rows")] == [b"abc", b"def"]
    assert counts_of(tmp_path / "rows")["cut"] == 1 and counts_of(tmp_path / "rows")["rows"] == 2


def test_long_documents_are_cut_to_chunks(tmp_path, capsys):
    source = write_texts(tmp_path / "a.jsonl", ["abcdefghijklmnop"])
    assert prepare(capsys, source, tmp_path / "rows", seq_len=8)[0] == 0
    assert sorted(map(len, (tokens for tokens, _ in segments_of(tmp_path / "rows")))) == [1, 8, 8]


@pytest.mark.parametrize(("bos", "eos"), [("auto", "auto"), ("yes", "no"), ("no", "yes"), ("yes", "yes")])
def test_bos_and_eos(tmp_path, capsys, bos, eos):
    source = write_texts(tmp_path / "a.jsonl", ["ab", "c"])
    for name, tokenizer in (("bytes", bytes_tokenizer()), ("adds", from_files(byte_fallback_tokenizer()))):
        directory = write_tokenizer(tmp_path / f"{name} tokenizer", tokenizer)
        _, out, _ = prepare(
            capsys, source, tmp_path / name, f"--bos={bos}", f"--eos={eos}", tokenizer=directory
        )
        front = [tokenizer.bos_id] if bos == "yes" or (bos == "auto" and tokenizer.adds_bos) else []
        back = [] if eos == "no" else [tokenizer.eos_id]
        expected = [front + tokenizer.encode(text, "no") + back for text in ("ab", "c")]
        assert [tokens for tokens, _ in segments_of(tmp_path / name)] == expected
        settings = read_manifest(tmp_path / name).settings
        assert (settings["adds_bos"], settings["adds_eos"]) == (bool(front), bool(back))
        told = " and ".join(["BOS"] * bool(front) + ["EOS"] * bool(back))
        assert f"{told} added to each document" in out


def test_a_tokenizer_without_eos(tmp_path, capsys):
    directory = write_tokenizer(tmp_path / "words", word_tokenizer())
    source = write_texts(tmp_path / "a.jsonl", ["zero one"])
    assert_refused(
        prepare(capsys, source, tmp_path / "rows", "--eos=yes", tokenizer=directory), "eos: the tok"
    )
    _, out, _ = prepare(capsys, source, tmp_path / "rows", tokenizer=directory)
    assert "neither BOS nor EOS added" in out
    assert segments_of(tmp_path / "rows") == [([0, 1], None)]  # a real token 0


@pytest.mark.parametrize(
    "tokenizer",
    [bytes_tokenizer(), from_files(byte_fallback_tokenizer())],
    ids=["bytes", "byte fallback, pad = EOS"],
)
def test_awkward_texts(tmp_path, capsys, tokenizer):
    source = write_texts(tmp_path / "a.jsonl", AWKWARD_TEXTS)
    directory = write_tokenizer(tmp_path / "tokenizer", tokenizer)
    _, out, _ = prepare(capsys, source, tmp_path / "rows", "--json", tokenizer=directory, seq_len=128)
    manifest = json.loads(out)
    kept = [text for text in AWKWARD_TEXTS if text.strip()]
    assert texts_of(tmp_path / "rows", tokenizer=tokenizer) == sorted(kept)
    assert manifest["counts"]["passed_over"] == {"empty": len(AWKWARD_TEXTS) - len(kept)}
    assert manifest["tokenizer"] == tokenizer.fingerprint
    assert (manifest["bos_id"], manifest["eos_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert manifest["largest_id"] == tokenizer.eos_id < manifest["vocab_size"]
    for name, text in tokenizer.files().items():
        assert (tmp_path / "rows" / "tokenizer" / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("holdout", [7, 0.25])
def test_held_out_texts_are_nowhere_else(tmp_path, capsys, holdout):
    texts = [f"story {index}" for index in range(80)]
    source = write_texts(tmp_path / "a.jsonl", [*texts, *texts[::2]])
    assert prepare(capsys, source, tmp_path / "rows", f"--holdout={holdout}")[0] == 0
    train, heldout = texts_of(tmp_path / "rows"), texts_of(tmp_path / "rows", "heldout")
    assert sorted(train + heldout) == sorted([*texts, *texts[::2]])
    assert not set(train) & set(heldout)
    if holdout == 7:
        assert len(set(heldout)) == 7
    else:
        assert 8 <= len(set(heldout)) <= 32
    other = write_texts(tmp_path / "b.jsonl", texts[::-1])  # which they are depends on the text alone
    assert prepare(capsys, other, tmp_path / "other", f"--holdout={holdout}")[0] == 0
    assert set(texts_of(tmp_path / "other", "heldout")) == set(heldout)


def test_one_document_is_always_left(tmp_path, capsys):
    source = write_fineweb(tmp_path / "a.parquet", ["one", "two", "two"])
    assert prepare(capsys, source, tmp_path / "rows", "--holdout=9")[0] == 0
    assert len(set(texts_of(tmp_path / "rows"))) == len(set(texts_of(tmp_path / "rows", "heldout"))) == 1


def test_nothing_is_held_out_unless_told(tmp_path, capsys):
    source = write_fineweb(tmp_path / "a.parquet", ["one", "two", "two"])
    prepare(capsys, source, tmp_path / "rows")
    assert list(read_manifest(tmp_path / "rows").splits) == ["train"]


def test_progress_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    monkeypatch.setattr(reading, "_BATCH_RECORDS", 10)
    monkeypatch.setattr(documents, "_BLOCK", 100)
    source = write_texts(tmp_path / "a.jsonl", [f"story {index}" for index in range(100)])
    _, _, err = prepare(capsys, source, tmp_path / "rows", "--holdout=3")
    assert any("choosing what to hold out" in line for line in err)
    lines = [line for line in err if "tokenising" in line]
    assert len(lines) == 10
    assert lines[-1].startswith("100 %") and "MB/s" in lines[-1] and lines[-1].endswith("left")
    assert "tokens/s" in lines[-1]
