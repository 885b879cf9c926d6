"""Paths and files as people give them: `~`, Git LFS pointers, byte order marks, the Hub's cache, seeds."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from a3_jax import cli
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.loading import find_checkpoint, open_checkpoint
from a3_jax.checks import MAX_SEED
from a3_jax.data.dialogs import chat_template
from a3_jax.decoding.generation import generate
from a3_jax.decoding.scoring import score
from a3_jax.errors import InputError
from a3_jax.paths import as_path, read_json, read_text
from a3_jax.tokenizer import bytes_tokenizer, load_tokenizer
from a3_jax.training.config import RunConfig, read_run_config
from tests.decoding_cli import assert_refused, read_lines, run, write_lines
from tests.prepare_fixtures import POINTER
from tests.tiny_hf import write_tiny_llama

ROOT = pathlib.Path(__file__).parent.parent
MARK = b"\xef\xbb\xbf"
LINE = '{"tokens": [1, 2]}'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama") / "hf"
    write_tiny_llama(directory, query_embed=True)
    return directory


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory, and another place to be."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())  # no directory called ~


def test_home_directories_on_the_command_line(llama, home, capsys):
    (home / "hf").symlink_to(llama)
    write_lines(home / "in.jsonl", LINE)
    assert cli.main(["convert", "~/hf", "~/new/a3"]) == 0
    assert f"wrote {home}/new/a3" in capsys.readouterr().out
    for command in ("score", "generate"):
        assert run(capsys, command, "~/new/a3", "~/in.jsonl", f"~/{command}.jsonl")[0] == 0
        assert read_lines(home / f"{command}.jsonl")
    write_lines(home / "a.jsonl", '{"text": "one"}')
    source = ["~/a.jsonl", "~/*.jsonl", "~/rows", "--tokenizer=~/new/a3/tokenizer", "--seq_len=8",
              "--max_passed_over=1"]  # fmt: skip
    assert cli.main(["data", "prepare", *source, "--text_column=text"]) == 1  # the others hold no text
    assert (home / "rows" / "manifest.json").exists()
    assert cli.main(["info", "--json", "~/new/a3"]) == 0


def test_home_directories_in_a_config(home):
    given = ["--config.data=~/a@0.5,~/b@0.5", "--config.init_from=~/hf", "--config.tokenizer=~/t",
             "--config.compilation_cache=~/c"]  # fmt: skip
    (home / "tiny.py").symlink_to(ROOT / "configs" / "tiny.py")
    run_config = RunConfig.from_config(read_run_config("~/tiny.py", given))
    assert run_config.to_dict()["data"] == f"{home}/a@0.5,{home}/b@0.5"
    found = (run_config.init_from, run_config.tokenizer, run_config.compilation_cache)
    assert found == tuple(f"{home}/{name}" for name in ("hf", "t", "c"))


def test_home_directories_of_functions(llama, home):
    (home / "hf").symlink_to(llama)
    convert("~/hf", pathlib.Path("~/a3"))
    assert str(find_checkpoint("~/a3")[0]) == f"{home}/a3"
    assert load_tokenizer("~/hf").vocab_size


def test_paths_that_are_no_home(home):
    assert str(as_path("gs://bucket/~/x")) == "gs://bucket/~/x"
    assert str(as_path("a/~/x")) == "a/~/x"
    assert str(as_path("~backup.txt")) == "~backup.txt"
    assert str(as_path("~root/x")) == os.path.expanduser("~root/x")
    with pytest.raises(InputError, match="there is no user 'nobody_of_that_name'"):
        as_path("~nobody_of_that_name/x")


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model",
     "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.json", "README.md"],
)  # fmt: skip
def test_git_lfs_pointers_in_a_model(tmp_path, capsys, name):
    write_tiny_llama(tmp_path / "hf", query_embed=True)
    if name.endswith("index.json"):
        (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / name).write_bytes(POINTER)
    lines = write_lines(tmp_path / "in.jsonl", LINE)
    for arguments in (["convert", tmp_path / "hf", tmp_path / "a3"], ["score", tmp_path / "hf", lines, "-"]):
        assert_refused(run(capsys, *arguments), f"hf/{name}: is a Git LFS pointer", "git lfs pull")
    assert not (tmp_path / "a3").exists()
    assert cli.main(["verify", str(tmp_path / "hf")]) == 1
    assert f"hf/{name}: is a Git LFS pointer" in capsys.readouterr().out


def test_git_lfs_pointers_elsewhere(llama, tmp_path, capsys):
    pointer = tmp_path / "pointer"
    pointer.write_bytes(POINTER)
    for arguments in (
        ["score", llama, pointer, "-"],
        ["train", f"--config={pointer}", f"--workdir={tmp_path}/run"],
        ["launch", "tpu-vm", f"--spec={pointer}"],
        ["convert", llama, tmp_path / "a3", f"--sha256={pointer}"],
    ):
        assert_refused(run(capsys, *arguments), f"{pointer}: is a Git LFS pointer")


def test_git_lfs_pointers_in_what_we_wrote(llama, tmp_path, capsys):
    convert(llama, tmp_path / "a3")
    files = [path for path in (tmp_path / "a3").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    lines = write_lines(tmp_path / "in.jsonl", LINE)
    for file in (
        largest,
        tmp_path / "a3" / "manifest.json",
        tmp_path / "a3" / "tokenizer" / "tokenizer.json",
    ):
        content = file.read_bytes()
        file.write_bytes(POINTER)
        told = f"{file}: is a Git LFS pointer"
        assert_refused(run(capsys, "score", tmp_path / "a3", lines, "-"), told)
        assert_refused(run(capsys, "convert", tmp_path / "a3", tmp_path / "hf", "--to=hf"), told)
        assert cli.main(["verify", str(tmp_path / "a3")]) == 1
        assert told in capsys.readouterr().out
        file.write_bytes(content)
    assert not (tmp_path / "hf").exists()
    text = write_lines(tmp_path / "text.jsonl", '{"text": "one"}')
    assert cli.main(["data", "prepare", str(text), str(tmp_path / "rows"), "--tokenizer=bytes"]) == 0
    (shard,) = (tmp_path / "rows").glob("*.array_record")
    shard.write_bytes(POINTER)
    arguments = ["train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run", "--config.seq_len=2048"]
    capsys.readouterr()
    outcome = run(capsys, *arguments, f"--config.data={tmp_path}/rows")
    assert_refused(outcome, f"{shard}: is a Git LFS pointer")


def test_byte_order_marks(tmp_path, capsys, monkeypatch):
    write_tiny_llama(tmp_path / "hf", query_embed=True)
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [257, 3]}')
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "hf" / name).write_bytes(MARK + (tmp_path / "hf" / name).read_bytes())
    convert(tmp_path / "hf", tmp_path / "a3")
    convert(tmp_path / "a3", tmp_path / "back", to="hf")  # for readers that know no marks
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_bytes().decode("utf-8"))
    assert load_tokenizer(tmp_path / "back").eos_ids == load_tokenizer(tmp_path / "hf").eos_ids == (257, 3)
    lines = tmp_path / "in.jsonl"
    lines.write_bytes(MARK + f"{LINE}\n".encode() + MARK + LINE.encode())
    for command in ("score", "generate"):
        assert run(capsys, command, tmp_path / "hf", lines, tmp_path / "out.jsonl")[0] == 0
        assert len(read_lines(tmp_path / "out.jsonl")) == 2
        stdin = {"stdin": f"\ufeff{LINE}", "monkeypatch": monkeypatch}
        assert len(run(capsys, command, tmp_path / "hf", "-", "-", **stdin)[1]) == 1
    (tmp_path / "chat.jinja").write_bytes(MARK + b"{{ messages }}")
    assert chat_template(bytes_tokenizer(), tmp_path / "chat.jinja").text == "{{ messages }}"
    lines.write_text(LINE, encoding="utf-16")
    assert_refused(run(capsys, "score", tmp_path / "hf", lines, "-"), f"{lines}: begins with", "UTF-16")


def test_a_key_given_twice(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(InputError, match=r"config.json: b: the key is given twice"):
        read_json(tmp_path / "config.json")


def make_cache(root, llama):
    """The Hub's cache with one model of two snapshots, of which main is the second."""
    repository = root / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("bbbb")
    for name in ("aaaa", "bbbb"):
        (repository / "snapshots" / name).mkdir(parents=True)
        for file in llama.iterdir():
            (repository / "snapshots" / name / file.name).symlink_to(file)
    return repository


def test_the_cache_of_the_hub(llama, tmp_path, capsys):
    repository = make_cache(tmp_path, llama)
    snapshot = repository / "snapshots" / "bbbb"
    for place in (repository, repository / "snapshots", tmp_path / "hub", tmp_path):
        outcome = run(capsys, "convert", place, tmp_path / "a3")
        assert_refused(outcome, f"{place}: no checkpoint", f"it is the Hub's cache, name {snapshot}")
        assert_refused(run(capsys, "verify", place), f"the Hub's cache, name {snapshot}")
        with pytest.raises(InputError, match=f"no tokenizer.json .* name {snapshot}"):
            load_tokenizer(place)
    assert find_checkpoint(snapshot) == (snapshot, True)
    with pytest.raises(InputError, match=r"run's directory$"):
        find_checkpoint(tmp_path.parent)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 2**63, True, 1.0])
def test_seeds_are_refused_alike(llama, tmp_path, capsys, seed):
    told = f"seed: must be from 0 to {MAX_SEED}, got {seed!r}"
    item = {"tokens": [1, 2], "order": "random", "seed": seed}
    for call in (
        lambda: score(open_checkpoint(llama), [item]),
        lambda: generate(open_checkpoint(llama), [{"tokens": [1, None]}], seed=seed),
        lambda: convert(llama, tmp_path / "a3", seed=seed),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert told in str(caught.value)
    if type(seed) is int:
        lines = write_lines(tmp_path / "in.jsonl", {"tokens": [1, None]})
        assert_refused(
            run(capsys, "generate", llama, lines, "-", f"--seed={seed}"), told.replace("seed: ", "")
        )
        with pytest.raises(InputError) as caught:
            RunConfig.from_config(read_run_config("configs/tiny.py", [f"--config.seed={seed}"]))
        assert told in str(caught.value)


def rows_of_text(tmp_path, capsys):
    text = write_lines(tmp_path / "text.jsonl", '{"text": "one two three"}')
    arguments = [str(text), str(tmp_path / "rows"), "--tokenizer=bytes", "--seq_len=16"]
    assert cli.main(["data", "prepare", *arguments]) == 0
    capsys.readouterr()
    return tmp_path / "rows"


@pytest.mark.parametrize("seed", [MAX_SEED + 1, 2**63, 10**30, -1])
def test_seeds_are_refused_by_every_command(llama, tmp_path, capsys, seed):
    rows, run_in = rows_of_text(tmp_path, capsys), f"--workdir={tmp_path}/run"
    for command in (
        ["convert", llama, tmp_path / "a3", f"--seed={seed}"],
        ["data", "show", rows, f"--seed={seed}"],
        ["eval", llama, "--tasks=piqa", f"--data_dir={tmp_path}", f"--seed={seed}"],
        ["eval", llama, "--tasks=lm_eval:arc_easy", f"--data_dir={tmp_path}", f"--seed={seed}"],
        ["train", "--config=configs/tiny.py", run_in, f"--config.data={rows}", f"--config.seed={seed}"],
    ):
        assert_refused(run(capsys, *command), "seed: ", f"must be from 0 to {MAX_SEED}, got {seed}")
    assert not (tmp_path / "a3").exists() and not (tmp_path / "run").exists()


def test_the_largest_seed_is_taken_by_all(llama, tmp_path, capsys):
    assert score(open_checkpoint(llama), [{"tokens": [1, 2], "order": "random", "seed": MAX_SEED}])
    assert generate(open_checkpoint(llama), [{"tokens": [1, None]}], seed=MAX_SEED, temperature=1.0)
    convert(llama, tmp_path / "a3", seed=MAX_SEED)
    rows = rows_of_text(tmp_path, capsys)
    assert cli.main(["data", "show", str(rows), "--stage=random4", f"--seed={MAX_SEED}"]) == 0


def test_python_m_a3_jax_is_a3(tmp_path, capsys):
    for arguments, status in ((["--help"], 0), (["info", str(tmp_path)], 2), (["info", "--jsn"], 2), ([], 2)):
        done = [
            subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
            for module in ("a3_jax", "a3_jax.cli")
        ]
        assert [each.returncode for each in done] == [status, status]
        assert (done[0].stdout, done[0].stderr) == (done[1].stdout, done[1].stderr)
    for arguments in (
        ["score", "--help"],
        ["data", "prepare", "--help"],
        ["convert", "a", "b"],
        ["eval", "x"],
    ):
        done = subprocess.run([sys.executable, "-m", "a3_jax", *arguments], capture_output=True, text=True)
        with contextlib.suppress(SystemExit):
            assert cli.main(arguments) == done.returncode
        told = capsys.readouterr()
        assert (done.stdout, done.stderr) == (told.out, told.err) and done.stdout + done.stderr
    assert "usage: a3 " in subprocess.run(
        [sys.executable, "-m", "a3_jax", "--help"], capture_output=True, text=True
    ).stdout  # fmt: skip


def test_a_mark_in_the_middle_of_a_text_stays(tmp_path):
    (tmp_path / "a").write_bytes(MARK + b"a" + MARK)
    assert read_text(tmp_path / "a") == "a\ufeff"
    assert json.loads(read_text(tmp_path / "a").replace("a\ufeff", "1")) == 1
