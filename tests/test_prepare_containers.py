"""Documents come out of every kind of file as they went in."""

import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from a3_jax import cli
from a3_jax.data import documents
from a3_jax.data.documents import read_documents
from tests.decoding_cli import assert_refused
from tests.fake_bucket import make_bucket
from tests.prepare_fixtures import json_lines, prepare, texts_of, write_bytes, write_fineweb

TEXTS = ["one\ntwo", "🙂 naïve", "third  document", "a\u2028b", "<s> typed", "last"]
KINDS = [
    "a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.txt.zst",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_container(tmp_path, capsys, name):
    source = write_fineweb(tmp_path / name, TEXTS)
    status, out, _ = prepare(capsys, source, tmp_path / "rows")
    assert status == 0
    assert texts_of(tmp_path / "rows") == sorted(TEXTS)
    assert "documents  6" in out


@pytest.mark.parametrize("name", KINDS)
def test_small_runs_read_the_same(tmp_path, name):
    assert read_documents(str(write_fineweb(tmp_path / name, TEXTS))) == tuple(TEXTS)


def test_lines_of_plain_text_without_blank_lines(tmp_path, capsys):
    source = write_bytes(tmp_path / "a.txt", b"one\r\ntwo\n\n\n")
    assert prepare(capsys, source, tmp_path / "rows")[0] == 0
    assert texts_of(tmp_path / "rows") == ["one", "two"]


def test_globs_and_several_sources(tmp_path, capsys):
    for index, text in enumerate(TEXTS[:4]):
        write_fineweb(tmp_path / f"part-{index}.jsonl", [text])
    other = write_fineweb(tmp_path / "other.parquet", TEXTS[4:])
    status, out, _ = prepare(capsys, f"{tmp_path}/part-*.jsonl", other, tmp_path / "rows", "--json")
    assert status == 0
    assert texts_of(tmp_path / "rows") == sorted(TEXTS)
    sources = json.loads(out)["sources"]
    assert [source["documents"] for source in sources] == [1, 1, 1, 1, 2]
    assert [source["bytes"] for source in sources[4:]] == [other.stat().st_size]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()])
def test_text_columns_of_other_types(tmp_path, capsys, kind):
    column = pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"content": column}), tmp_path / "a.parquet")
    status, _, _ = prepare(capsys, tmp_path / "a.parquet", tmp_path / "rows", "--text_column=content")
    assert status == 0
    assert texts_of(tmp_path / "rows") == sorted(TEXTS)


def test_a_text_column_by_name(tmp_path, capsys):
    source = write_bytes(tmp_path / "a.jsonl", json_lines([{"body": "right", "text": "wrong"}]))
    assert prepare(capsys, source, tmp_path / "rows", "--text_column=body")[0] == 0
    assert texts_of(tmp_path / "rows") == ["right"]


def test_a_table_without_the_column_is_refused_before_any_work(tmp_path, capsys):
    good = write_fineweb(tmp_path / "a.jsonl", TEXTS)
    bad = write_fineweb(tmp_path / "b.parquet", TEXTS)
    outcome = prepare(capsys, good, bad, tmp_path / "rows", "--text_column=txt")
    assert_refused(outcome, "b.parquet: txt: no such column; did you mean 'text'?")
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl"], "give the files to read and the directory to write"),
        (["absent.jsonl", "rows"], "absent.jsonl: data: no such file"),
        (["*.csv", "rows"], "*.csv: data: no file matches"),
        (["a.csv", "rows"], "a.csv: data: not a .txt or .jsonl file"),
        (
            ["a.jsonl", "rows", "--packing=tight"],
            "packing: must be one of first_fit, concat, none, got 'tight'",
        ),
        (["a.jsonl", "rows", "--holdout=1.5"], "holdout: must be a share below 1 or a number"),
        (["a.jsonl", "rows", "--holdout=nan"], "holdout: must be a share below 1 or a number"),
        (["a.jsonl", "rows", "--holdout=inf"], "holdout: must be a share below 1 or a number"),
        (["a.jsonl", "rows", "--shard_tokens=0"], "shard_tokens: must be a whole number, at least 1, got 0"),
        (["a.jsonl", "rows", "--bos=maybe"], "bos: must be one of auto, yes, no, got 'maybe'"),
        (["a.jsonl", "rows", "--eos=maybe"], "eos: must be one of auto, yes, no, got 'maybe'"),
        (["a.jsonl", "rows", "--chat_template=t"], "t: no such file"),
        (["a.jsonl", "rows", "--pakcing=none"], "did you mean '--packing'?"),
        (["a.jsonl", "full"], "full: is not empty (file), and holds no prepared data"),
        (["a.jsonl", "a.jsonl/rows"], "is no directory"),
        (["full", "--verify"], "full: no manifest.json there"),
    ],
)
def test_bad_usage(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_fineweb(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(prepare(capsys, *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_is_needed(tmp_path, capsys):
    source = write_fineweb(tmp_path / "a.jsonl", TEXTS)
    assert cli.main(["data", "prepare", str(source), str(tmp_path / "rows")]) == 2
    assert "--tokenizer: is needed" in capsys.readouterr().err


def test_prepare_loads_neither_tensorflow_nor_jax(tmp_path):
    source = write_fineweb(tmp_path / "a.parquet", TEXTS)
    code = (
        "import sys; from a3_jax.cli import main; status = main(sys.argv[1:]);"
        "bad = {'tensorflow', 'seqio', 'jax', 'torch'} & set(sys.modules); assert not bad, bad;"
        "sys.exit(status)"
    )
    arguments = ["data", "prepare", str(source), str(tmp_path / "rows"), "--tokenizer=bytes"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=120)


class _Bare:
    """An open file with as little as TensorFlow's have."""

    def __init__(self, path):
        file = io.BytesIO(path.read_bytes())
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_no_python_files(tmp_path, monkeypatch, name):
    """As in buckets: etils gives what its backend has."""
    path = write_fineweb(tmp_path / name, TEXTS)
    monkeypatch.setattr(documents, "_open", lambda _: io.BufferedReader(documents._RawFile(_Bare(path)), 64))
    assert read_documents(str(path)) == tuple(TEXTS)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return make_bucket(tmp_path, monkeypatch)


def test_buckets(bucket, capsys):
    write_fineweb(bucket / "a.parquet", TEXTS[:2])
    write_fineweb(bucket / "b.jsonl.zst", TEXTS[2:4])
    write_fineweb(bucket / "c.txt", TEXTS[4:])
    status, _, err = prepare(
        capsys, "gs://bucket/*.*", "gs://bucket/rows", "--shard_tokens=10", "--holdout=1"
    )
    assert status == 0, err
    assert sorted(texts_of(bucket / "rows") + texts_of(bucket / "rows", "heldout")) == sorted(TEXTS)
    assert not list((bucket / "rows").glob("p*"))
    again = prepare(capsys, "gs://bucket/*.*", "gs://bucket/rows", "--shard_tokens=10", "--holdout=1")
    assert again[1].startswith("finished: ")
    assert prepare(capsys, "gs://bucket/rows", "--verify")[0] == 0


@pytest.mark.parametrize("arguments", [["data"], ["data", "prepare"]])
def test_help_has_examples(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    assert "\nexamples:\n  a3 data prepare" in capsys.readouterr().out
