"""Input that is well formed and still can't be meant: one line, exit status 2, and nothing left behind."""

import json
import os
import subprocess
import sys

import pytest

from a3_jax import cli
from a3_jax.checkpoints.conversion import convert
from tests.decoding_cli import assert_refused, read_lines, run, write_lines
from tests.tiny_hf import write_tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama") / "hf"
    write_tiny_llama(directory, query_embed=True)
    return directory


def test_a_damaged_checkpoint_is_one_line_in_a_process_of_its_own(llama, tmp_path):
    """Reads still in flight must not print their tracebacks when the process ends."""
    convert(llama, tmp_path / "a3")
    files = [path for path in (tmp_path / "a3" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()  # as long as before: found when it is read, not by its size
    largest.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    lines = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]})
    arguments = ["score", tmp_path / "a3", lines, tmp_path / "out.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "a3_jax.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"{largest}: is damaged" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["file/out.jsonl", "file/below/out.jsonl", "x" * 300])
def test_an_output_that_cannot_be_is_refused_before_any_work(llama, tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    lines = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]})
    assert_refused(run(capsys, "score", llama, lines, tmp_path / name), name[-20:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in.jsonl"]


def test_long_names_and_links_are_written_as_they_are(llama, tmp_path, capsys):
    lines = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]})
    long = tmp_path / ("y" * 245)
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    for output in (long, tmp_path / "link.jsonl"):
        assert run(capsys, "score", llama, lines, output)[0] == 0
    assert read_lines(long) == read_lines(tmp_path / "real.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink()


def test_a_bad_byte_is_named_by_its_line(llama, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(b'{"tokens": [1]}\n{"tokens": [\xff]}\n')
    outcome = run(capsys, "score", llama, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert_refused(outcome, "in.jsonl:2", "not UTF-8 text (byte 13 of the line)")


def test_a_step_larger_than_any_text_fills_it_at_once(llama, tmp_path, capsys):
    lines = write_lines(tmp_path / "in.jsonl", {"tokens": [1, None, None, 4]})
    status, out, _ = run(
        capsys, "generate", llama, lines, "-", "--strategy=dynamic", "--step_size=1000000000000"
    )
    assert status == 0
    assert out[0]["forwards"] == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", "nan"), ("learning_rate", "inf"), ("weight_decay", "nan"), ("b2", "1.0"),
        ("holdout", "nan"), ("seed", str(2**63)), ("seed", "-1"), ("tokenizer", "byte"),
    ],
)  # fmt: skip
def test_numbers_that_train_nothing_are_refused(tmp_path, capsys, field, value):
    workdir = tmp_path / "run"
    arguments = ["train", "--config=configs/tiny.py", f"--workdir={workdir}", f"--config.{field}={value}"]
    assert_refused(run(capsys, *arguments), value if field == "tokenizer" else field)
    assert not workdir.exists()


def test_a_run_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    outcome = run(capsys, "train", "--config=configs/tiny.py", f"--workdir={tmp_path / 'file' / 'run'}")
    assert_refused(outcome, "is no directory")


def test_an_explicit_dtype_is_kept_on_the_way_back(llama, tmp_path):
    convert(llama, tmp_path / "a3", dtype="bfloat16")
    convert(tmp_path / "a3", tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    half, full = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "hf", llama))
    assert half < 0.7 * full


def test_the_current_directory_can_be_filled(llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(llama, ".")
    assert (tmp_path / "here" / "meta" / "a3.json").exists()
    os.chdir(tmp_path)


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_that_make_no_key_are_refused(llama, tmp_path, capsys, seed):
    assert_refused(run(capsys, "convert", llama, tmp_path / "a3", f"--seed={seed}"), "seed", seed)
    assert not (tmp_path / "a3").exists()


def test_every_command_has_help(capsys):
    for command in ("quickstart", "convert", "train", "generate", "score"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert "\nexample" in capsys.readouterr().out
