"""Training on prepared directories: the same command goes on, and data that changed is refused."""

import json
import re
import shutil

import jax
import pytest

from a3_jax.checkpoints.a3_format import load_checkpoint_tokenizer
from a3_jax.cli import main
from a3_jax.errors import InputError
from a3_jax.tokenizer import bytes_tokenizer
from a3_jax.training import train as training
from tests.checkpoint_fixtures import reseal
from tests.prepared_fixtures import make_prepared, rows
from tests.training_fixtures import tiny_run


@pytest.fixture
def directory(tmp_path):
    return make_prepared(tmp_path / "data", rows(13, seq_len=24), heldout=rows(3, seq_len=24, first=50))


def train(config, workdir):
    """On one device, for which a step compiles faster than for eight."""
    return training.train(config, workdir, devices=jax.devices()[:1])


def run(data, **changes):
    return tiny_run(data, tokenizer="", batch_size=8, **changes)


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_its_tokenizer_and_vocabulary_are_the_runs(directory, tmp_path):
    checkpoint = train(run(directory, eval_every=6), tmp_path / "run")
    assert load_checkpoint_tokenizer(checkpoint).fingerprint == bytes_tokenizer().fingerprint
    evaluations = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
    assert all(json.loads(line)["random"] > 0 for line in evaluations) and len(evaluations) == 3
    described = json.loads((tmp_path / "run" / "data.json").read_text())
    assert list(described) == [directory]


def test_it_goes_on_with_the_same_losses(directory, tmp_path):
    """Stopped after its second step, by steps that are added later."""
    stage = run(directory)["stages"][0]
    for name, steps in (("parts", 2), ("parts", 4), ("whole", 4)):
        one_stage = [stage | {"steps": steps}]
        train(run(directory, stages=one_stage, schedule="constant"), tmp_path / name)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4


def test_other_data_in_its_place_is_refused(directory, tmp_path):
    train(run(directory, stages=[{"name": "l2r", "steps": 1}]), tmp_path / "run")
    shutil.rmtree(directory)
    make_prepared(tmp_path / "data", rows(14, seq_len=24))
    with pytest.raises(InputError, match="not the data that this run began with"):
        train(run(directory, stages=[{"name": "l2r", "steps": 2}]), tmp_path / "run")


def test_without_held_out_rows_one_warning(tmp_path, capsys):
    directory = make_prepared(tmp_path / "data", rows(13, seq_len=24))
    train(run(directory, eval_every=2, stages=[{"name": "l2r", "steps": 2}]), tmp_path / "run")
    assert capsys.readouterr().err.count("warning: no held-out documents") == 1
    assert not (tmp_path / "run" / "eval.jsonl").read_text()


def test_another_tokenizer_is_refused(directory, tmp_path):
    """Of the config, or of the model that training begins with."""
    from tests.test_tokenizer import byte_fallback_tokenizer

    other = tmp_path / "tokenizer"
    other.mkdir()
    for name, text in byte_fallback_tokenizer().items():
        (other / name).write_text(text)
    with pytest.raises(InputError, match=r"manifest.json: tokenizer: the data was made by another"):
        train(tiny_run(directory, tokenizer=str(other), batch_size=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_without_an_embedding_for_an_id(directory, tmp_path):
    small = {"name": "l2r", "steps": 1}
    text = tmp_path / "a.txt"
    text.write_text("a b c\n\nb c d\n")
    checkpoint = train(
        tiny_run(str(text), batch_size=8, model=tiny_run("")["model"] | {"vocab_size": 258}, stages=[small]),
        tmp_path / "x",
    )
    shutil.rmtree(checkpoint / "tokenizer")
    reseal(checkpoint)  # token ids only: nothing but the vocabulary can be compared
    wide = make_prepared(tmp_path / "wide", rows(5, seq_len=24), largest_id=300)
    with pytest.raises(InputError, match="token id 300 is outside the model's vocabulary of 258"):
        train(run(wide, init_from=str(checkpoint), stages=[small]), tmp_path / "run")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "train-00001.array_record").write_bytes(b""), "00001.array_record: is damaged"),
        (lambda data: (data / "manifest.json").unlink(), "no manifest.json there"),
        (lambda data: (data / "tokenizer" / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)  # fmt: skip
def test_damage_is_one_line_before_anything_is_written(directory, tmp_path, capsys, damage, message):
    damage(tmp_path / "data")
    arguments = [
        "train",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path}/run",
        f"--config.data={directory}",
    ]
    assert main([*arguments, "--config.seq_len=24", "--config.batch_size=8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


class TestShow:
    def test_picture(self, directory, capsys):
        assert main(["data", "show", directory, "--stage=contiguous4", "--n=2", "--tokens=6"]) == 0
        out = capsys.readouterr().out
        assert out.count("document 1 of 2, 6 of its 21 tokens; 1 of 24 columns without a token") == 2
        marks = re.findall(r"[█▒·]{6}", out)
        first = ["▒▒▒▒··"] * 4 + ["████▒▒"] * 2
        assert marks == first * 2

    def test_json_has_whole_rows(self, directory, capsys):
        assert main(["data", "show", directory, "--stage=random4", "--n=1", "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        row = json.loads(line)
        assert len(row["tokens"]) == 24 and set(row["weights"]) == {0.0, 1.0}
        assert {"ranks", "start", "content_limit", "query_limit"} <= row.keys()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--stage=randm4"], "did you mean 'random4'?"),
            (["--n=0"], "--n: must be a whole number, at least 1"),
            (["--split=test"], "--split: must be one of train, heldout"),
            (["--stage=random", "--config=absent.py"], "no such config file"),
        ],
    )
    def test_bad_input(self, directory, capsys, arguments, message):
        assert main(["data", "show", directory, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
