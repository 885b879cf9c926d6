"""What can't be used is passed over, counted and told by file and line; `--strict` stops at it."""

import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from a3_jax.checkpoints.conversion import convert
from a3_jax.data import documents
from a3_jax.tokenizer import bytes_tokenizer
from tests.decoding_cli import assert_refused, run
from tests.prepare_fixtures import json_lines, prepare, texts_of, write_bytes, write_fineweb
from tests.test_tokenizer import word_tokenizer
from tests.tiny_hf import write_tiny_llama

GOOD = b'{"text": "good"}\n'
FAULTS = {
    "not_utf8": (b'{"text": "b\xffd"}', "not UTF-8 text (byte 12 of the line)"),
    "not_json": (b'{"text": "cut', "not JSON"),
    "not_object": (b'["text"]', "expected a JSON object, got list"),
    "missing": (b'{"texts": "typo"}', "text: is missing"),
    "not_text": (b'{"text": 5}', "text: must be a text, got int"),
    "empty": (b'{"text": " \\n"}', "text: holds no text"),
    "surrogate": (b'{"text": "\\ud800"}', "text: holds half of a surrogate pair"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_bad_lines(tmp_path, capsys, reason):
    line, message = FAULTS[reason]
    source = write_bytes(tmp_path / "a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD + line + b"\n")
    status, out, _ = prepare(capsys, source, tmp_path / "rows", "--json")
    counts = json.loads(out)["counts"]
    assert status == 0
    assert counts["passed_over"] == {reason: 2}
    assert counts["documents"] == 2
    assert counts["first_passed_over"][reason].startswith(f"{source}:3: {message}")
    assert texts_of(tmp_path / "rows") == ["good", "good"]
    outcome = prepare(capsys, source, tmp_path / "strict", "--strict")
    assert_refused(outcome, f"{source}:3: {message}")
    assert not (tmp_path / "strict").exists()


def test_the_summary_names_them(tmp_path, capsys):
    source = write_bytes(tmp_path / "a.jsonl", GOOD + b"\n".join(line for line, _ in FAULTS.values()))
    _, out, _ = prepare(capsys, source, tmp_path / "rows")
    for reason, (_, message) in FAULTS.items():
        assert f"passed over 1 {reason}, first {source}:" in out
        assert message in out


def test_null_and_bad_bytes_in_a_table(tmp_path, capsys):
    values = pyarrow.array([b"good", None, b"b\xffd", b"", b"good"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 5, values.buffers())
    for name, column in (("strings", texts), ("bytes", values)):
        source = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), source)
        _, out, _ = prepare(capsys, source, tmp_path / name, "--json")
        counts = json.loads(out)["counts"]
        assert counts["passed_over"] == {"not_text": 1, "not_utf8": 1, "empty": 1}
        assert f"{source}:3" in counts["first_passed_over"]["not_utf8"]
        assert counts["documents"] == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_record_too_long(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(documents, "MAX_BYTES", 5000)
    monkeypatch.setattr(documents, "_BLOCK", 1024)
    source = write_fineweb(tmp_path / name, ["good", "x" * 9000, "fine"])
    _, out, _ = prepare(capsys, source, tmp_path / "rows", "--json")
    assert json.loads(out)["counts"]["passed_over"] == {"too_long": 1}
    assert texts_of(tmp_path / "rows") == ["fine", "good"]
    assert_refused(prepare(capsys, source, tmp_path / "strict", "--strict"), f"{source}:", "is longer than")


@pytest.mark.slow
def test_a_line_of_50_megabytes_is_never_held(tmp_path, capsys, monkeypatch):
    source = write_bytes(tmp_path / "a.jsonl", GOOD + b'{"text": "' + b"x" * 50_000_000 + b'"}\n' + GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "MAX_BYTES", 1 << 20)
        tracemalloc.start()
        lines = [line for line in documents.DocumentSource(str(source))._lines() if line is not None]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(lines) == 2 and peak < 10_000_000
    _, out, _ = prepare(capsys, source, tmp_path / "rows", "--json")
    assert json.loads(out)["counts"]["first_passed_over"] == {
        "too_long": f"{source}:2: is longer than 32 MiB"
    }


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_a_file_cut_short(tmp_path, capsys, name):
    whole = write_fineweb(tmp_path / name, [f"{index:x}" * 40 for index in range(1000)])
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    other = write_bytes(tmp_path / "b.jsonl", GOOD)
    status, out, told = prepare(capsys, whole, other, tmp_path / "rows", "--json")
    counts = json.loads(out)["counts"]
    assert status == (1 if name == "a.parquet" else 0)  # whose columns are listed at its end
    assert f"warning: {whole}:" in told[0]
    assert (f"{whole}: gave no document" in told[-1]) == (status == 1)
    assert counts["passed_over"]["damaged_file"] == 1
    assert counts["first_passed_over"]["damaged_file"].startswith(f"{whole}:")
    assert "good" in texts_of(tmp_path / "rows")
    assert_refused(
        prepare(capsys, whole, other, tmp_path / "strict", "--strict"), f"{whole}:", "can't be read"
    )


@pytest.mark.parametrize("reason", FAULTS)
def test_a_file_of_bad_lines(tmp_path, capsys, reason):
    """More than half of them bad for one reason: exit status 1, and nothing is left."""
    source = write_bytes(tmp_path / "a.jsonl", GOOD + b"\n".join([FAULTS[reason][0]] * 2))
    status, out, err = prepare(capsys, source, tmp_path / "rows")
    assert (status, out, len(err)) == (1, "", 1)
    assert f"{source}: 2 of 3 records fail for one reason, {reason}; the first: {source}:2: " in err[0]
    assert not (tmp_path / "rows").exists()
    assert prepare(capsys, source, tmp_path / "rows", "--max_passed_over=0.7")[0] == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.zst"])
def test_nothing_to_train_on(tmp_path, capsys, name):
    source = write_bytes(tmp_path / name, b"\n")
    assert_refused(prepare(capsys, source, tmp_path / "rows"), "rows: no document to train on")
    assert not (tmp_path / "rows").exists()


def test_text_that_the_tokenizer_lacks(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text(word_tokenizer().files()["tokenizer.json"])
    source = write_fineweb(tmp_path / "a.jsonl", ["zero one", "three", "two"])
    _, out, _ = prepare(capsys, source, tmp_path / "rows", "--json", tokenizer=tmp_path / "tokenizer.json")
    counts = json.loads(out)["counts"]
    assert counts["documents"] == 2 and counts["passed_over"] == {"not_encodable": 1}
    assert counts["first_passed_over"]["not_encodable"].startswith(f"{source}:2: the tokenizer can't encode")


def narrow_model(directory):
    """A checkpoint of 260 embeddings with a tokenizer that makes the id 260 of "<image>"."""
    write_tiny_llama(directory, query_embed=True, vocab_size=260)
    tokenizer = tokenizers.Tokenizer.from_str(bytes_tokenizer().files()["tokenizer.json"])
    tokenizer.add_tokens(["<one>", "<two>", "<image>"])
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    return directory


@pytest.mark.parametrize("place", ["hf", "a3/tokenizer"])
def test_tokens_without_an_embedding(tmp_path, capsys, place):
    convert(narrow_model(tmp_path / "hf"), tmp_path / "a3")
    chat = {"prompt": "what is", "response": "an <image>"}
    for name, record in (("text", {"text": "an <image>"}), ("chat", chat)):
        good = {"text": "good"} if name == "text" else {"prompt": "so", "response": "<two>"}
        source = write_bytes(tmp_path / f"{name}.jsonl", json_lines([good, record, good]))
        told = f"{source}:2: token id 260 ('<image>') is outside the model's vocabulary of 260"
        arguments = [capsys, source, tmp_path / f"{name}-rows"]
        assert_refused(prepare(*arguments, "--strict", tokenizer=tmp_path / place), told)
        status, out, _ = prepare(*arguments, "--json", tokenizer=tmp_path / place)
        manifest = json.loads(out)
        assert (status, manifest["counts"]["passed_over"]) == (0, {"outside_vocabulary": 1})
        assert manifest["largest_id"] < 260 and manifest["settings"]["embedding_rows"] == 260


def test_training_refuses_tokens_without_an_embedding(tmp_path, capsys):
    """Rows that a tokenizer alone made, and text that the run itself encodes."""
    hf = narrow_model(tmp_path / "hf")
    source = write_bytes(tmp_path / "a.jsonl", json_lines([{"text": "an <image>"}] * 3))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.json").write_bytes((hf / "tokenizer.json").read_bytes())
    assert prepare(capsys, source, tmp_path / "rows", tokenizer=tmp_path / "alone")[0] == 0
    for data in (tmp_path / "rows", source):
        arguments = [f"--config.data={data}", f"--config.init_from={hf}", "--config.seq_len=32"]
        arguments += [f"--config.tokenizer={hf}"] if data == source else []
        outcome = run(capsys, "train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run", *arguments)
        assert_refused(outcome, f"{data}: data: token id 260 is outside the model's vocabulary of 260")
        assert not (tmp_path / "run").exists()
