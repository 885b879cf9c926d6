"""A preparation that was stopped goes on, and ends with the bytes of one that was not."""

import json
import os
import subprocess
import sys

import pytest

from a3_jax.data import documents
from a3_jax.data.documents import DocumentSource
from a3_jax.data.prepare_state import alone_in
from a3_jax.data.prepared_manifest import check_shards, read_manifest
from tests.decoding_cli import assert_refused
from tests.prepare_fixtures import files_of, prepare, texts_of, write_bytes, write_fineweb

OPTIONS = ("--shard_tokens=300", "--holdout=6")

# Runs `a3 data prepare` in a process whose Nth call of a function is the last thing it does.
STOPPED = """
import os, resource, sys
from a3_jax import cli
from a3_jax.data import prepare
name, calls, how, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
real = getattr(prepare, name)
def stopping(*args, **kwargs):
    global calls
    calls -= 1
    if how == "before" and not calls:
        os._exit(9)
    if how == "full" and not calls:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as a full disk: what is written fails
    result = real(*args, **kwargs)
    if how == "after" and not calls:
        os._exit(9)
    return result
setattr(prepare, name, stopping)
sys.exit(cli.main(["data", "prepare", *arguments]))
"""


def stop(name, calls, how, *arguments):
    arguments = [*map(str, arguments), "--tokenizer=bytes", "--seq_len=32"]
    return subprocess.run(
        [sys.executable, "-c", STOPPED, name, str(calls), how, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def sources(tmp_path):
    """Three files, with bad records among the good, and texts that come twice."""
    texts = [f"story {index} " + "abc " * (index % 9) for index in range(60)] + ["twice", "twice"]
    return [
        write_fineweb(tmp_path / "a.parquet", texts[:30]),
        write_bytes(tmp_path / "b.jsonl", b'{"text": 3}\n' + b'\n{"text": "in b"}\n{"text": ""}\n'),
        write_fineweb(tmp_path / "c.txt.zst", texts[30:]),
    ]


@pytest.fixture
def undisturbed(sources, tmp_path, capsys):
    assert prepare(capsys, *sources, tmp_path / "whole", *OPTIONS)[0] == 0
    return files_of(tmp_path / "whole")


@pytest.mark.parametrize("options", [OPTIONS, ("--shard_tokens=300", "--holdout=0.2", "--packing=concat")])
@pytest.mark.parametrize(
    ("name", "calls", "how"),
    [
        ("write_shard", 2, "after"),  # the shard is there, progress does not know
        ("write_progress", 1, "after"),
        ("write_progress", 4, "after"),
        ("write_whole", 1, "before"),  # all shards, no tokenizer
        ("write_manifest", 1, "before"),
    ],
)
def test_a_killed_run_goes_on(sources, tmp_path, capsys, options, name, calls, how):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert prepare(capsys, *sources, whole, *options)[0] == 0
    assert stop(name, calls, how, *sources, again, *options).returncode == 9
    assert (again / "progress.json").exists() and not (again / "manifest.json").exists()
    status, _, err = prepare(capsys, *sources, again, *options)
    assert status == 0
    assert files_of(again) == files_of(whole)
    if how == "after" and calls == 4:
        assert any("goes on after 3 finished shards" in line for line in err)


def test_shards_are_several_and_hold_all(undisturbed, sources, tmp_path):
    manifest = read_manifest(tmp_path / "whole")
    assert len(manifest.splits["train"]) > 3
    assert manifest.counts["documents"] == 63 and manifest.counts["heldout_documents"] >= 6
    assert manifest.counts["passed_over"] == {"not_text": 1, "empty": 1}
    assert sum(shard.tokens for shard in manifest.shards) == manifest.counts["tokens"]
    assert sum(shard.rows for shard in manifest.shards) == manifest.counts["rows"]
    assert not [name for name in undisturbed if name.startswith((".", "progress", "pending"))]


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, sources, tmp_path, capsys):
    status, out, _ = prepare(capsys, *sources, tmp_path / "whole", *OPTIONS)
    assert status == 0 and out.startswith("finished: ")
    assert files_of(tmp_path / "whole") == undisturbed


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard_tokens=300", "--holdout=7"), "holdout 6.0, now 7.0"),
        ((*OPTIONS, "--packing=none", "--eos=no"), "eos 'auto', now 'no'"),
        ((*OPTIONS, "--text_column=id"), "text_column 'text', now 'id'"),
    ],
)
def test_other_settings_are_refused(sources, tmp_path, capsys, is_finished, options, message):
    rows = tmp_path / "rows"
    if is_finished:
        prepare(capsys, *sources, rows, *OPTIONS)
    else:
        stop("write_shard", 2, "after", *sources, rows, *OPTIONS)
    before = files_of(rows)
    assert_refused(
        prepare(capsys, *sources, rows, *options), f"{rows}: was begun with other settings", message
    )
    before.pop(".lock", None)
    assert files_of(rows) == before


def test_other_files_are_refused(undisturbed, sources, tmp_path, capsys):
    sources[1].write_bytes(b'{"text": "longer than it was", "id": "padding padding padding padding"}\n' * 9)
    assert_refused(prepare(capsys, *sources, tmp_path / "whole", *OPTIONS), "the files to read", "b.jsonl")
    assert_refused(prepare(capsys, *sources[:2], tmp_path / "whole", *OPTIONS), "the files to read")


def test_two_at_once(sources, tmp_path, capsys):
    rows = tmp_path / "rows"
    with alone_in(rows):
        outcome = prepare(capsys, *sources, rows, *OPTIONS)
        assert_refused(outcome, "rows: another `a3 data prepare` is at work there")
        assert os.listdir(rows) == [".lock"]
    assert not rows.exists()
    rows.mkdir()
    (rows / ".lock").touch()  # left by a process that was killed
    assert prepare(capsys, *sources, rows, *OPTIONS)[0] == 0
    assert not (rows / ".lock").exists()


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.zst", "a.txt", "a.txt.gz"])
def test_records_from_any_one_on(tmp_path, monkeypatch, name, is_whole):
    """Reading from a record on gives what reading all gives there, damage at the end too."""
    monkeypatch.setattr(documents, "_BLOCK", 64)
    path = write_fineweb(tmp_path / name, [f"story {index}\nof two lines" for index in range(13)])
    if not is_whole:
        path.write_bytes(path.read_bytes()[:-20])
    read = [(number, str(record)) for number, record in DocumentSource(str(path)).records(["text"])]
    for first in range(read[-1][0] + 1):
        rest = [
            (number, str(record)) for number, record in DocumentSource(str(path)).records(["text"], first)
        ]
        assert rest == [one for one in read if one[0] >= first]


def test_a_full_disk(undisturbed, sources, tmp_path, capsys):
    rows = tmp_path / "rows"
    done = stop("write_shard", 3, "full", *sources, rows, *OPTIONS)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "array_record: can't be written" in done.stderr and "the same command goes on there" in done.stderr
    progress = json.loads((rows / "progress.json").read_text())
    finished = [shard["file"] for shards in progress["splits"].values() for shard in shards]
    assert len(finished) == 2
    for name in finished:
        assert (rows / name).read_bytes() == undisturbed[name]
    assert not list(rows.glob(".*.tmp"))
    assert prepare(capsys, *sources, rows, *OPTIONS)[0] == 0
    assert files_of(rows) == undisturbed


@pytest.mark.parametrize("name", ["write_progress", "write_manifest"])
def test_a_disk_full_of_small_files(undisturbed, sources, tmp_path, capsys, name):
    rows = tmp_path / "rows"
    done = stop(name, 2 if name == "write_progress" else 1, "full", *sources, rows, *OPTIONS)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert prepare(capsys, *sources, rows, *OPTIONS)[0] == 0
    assert files_of(rows) == undisturbed


def test_strict_keeps_finished_shards(tmp_path, capsys):
    lines = [json.dumps({"text": f"story {index}"}).encode() for index in range(99)] + [b"bad"]
    source = write_bytes(tmp_path / "a.jsonl", b"\n".join(lines))
    rows = tmp_path / "rows"
    assert_refused(prepare(capsys, source, rows, "--strict", *OPTIONS[:1]), f"{source}:100: not JSON")
    assert (rows / "progress.json").exists()
    assert prepare(capsys, source, rows, *OPTIONS[:1])[0] == 0
    assert len(texts_of(rows)) == 99


def test_verify(undisturbed, sources, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert prepare(capsys, whole, "--verify")[0] == 0
    manifest = read_manifest(whole)
    check_shards(whole, manifest, deep=True)
    for name in [*undisturbed]:
        content = bytearray(undisturbed[name])
        content[len(content) // 2] ^= 1
        (whole / name).write_bytes(content)
        status, out, err = prepare(capsys, whole, "--verify")
        assert status == 1 and not out, name
        if not name.startswith("tokenizer"):
            assert any(name in line for line in err), (name, err)
        (whole / name).write_bytes(undisturbed[name])
    (whole / "train-00001.array_record").unlink()
    status, _, err = prepare(capsys, *sources, whole, *OPTIONS, "--verify")
    assert status == 1 and "train-00001.array_record" in err[-1]
