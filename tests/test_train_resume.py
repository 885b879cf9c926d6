"""A run that is stopped and started again is the run that was never stopped: rows, losses, parameters."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from a3_jax.checkpoints.a3_format import Meta, save_checkpoint
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.errors import InputError
from a3_jax.model.two_stream import init_params
from a3_jax.runtime.compile_cache import compilation_cache
from a3_jax.training import run_log
from a3_jax.training.train import train
from tests.training_fixtures import LINES, tiny_run

pytestmark = pytest.mark.slow

STEPS = 6  # 4 of stage "l2r", 2 of stage "random", whose optimiser begins afresh


def run(workdir, text, **changes):
    config = tiny_run(text, checkpoint_every=3, eval_every=3) | changes
    return train(config, workdir, devices=jax.devices()[:1])


def rows(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def losses(workdir):
    return [(row["step"], row["stage"], row["loss"], row["learning_rate"]) for row in rows(workdir)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Text, and a compilation cache: every run here compiles the same step."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "text.txt").write_text("\n\n".join(LINES))
    with compilation_cache(str(directory / "compiled"), "cpu"):
        yield str(directory / "text.txt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("straight")
    run(workdir, data)
    return workdir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, data):
    """Stopped while step 5 was being written down; checkpoints 3 and 4 (end of a stage) exist."""
    workdir = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        original = run_log.MetricsReader.read_previous

        def stop(reader):
            original(reader)
            if len(rows(workdir)) == 5:
                raise KeyboardInterrupt

        patch.setattr(run_log.MetricsReader, "read_previous", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workdir, data)
    return workdir


def test_a_straight_run(straight):
    """One row a step with all fields, held-out losses at the start, every 3 steps and at a stage's end."""
    metrics = rows(straight)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert [row["stage"] for row in metrics] == ["l2r"] * 4 + ["random"] * 2
    fields = {"step", "stage", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(row.keys() == fields and row["loss"] > 0 and row["grad_norm"] > 0 for row in metrics)
    assert [row["step"] for row in rows(straight, "eval.jsonl")] == [0, 3, 4, 6]
    assert {"l2r", "contiguous", "random", "ar"} <= rows(straight, "eval.jsonl")[0].keys()
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["4", "6"]
    checkpoint = open_checkpoint(straight)
    assert (checkpoint.meta.step, checkpoint.meta.stage) == (STEPS, "random")
    assert checkpoint.tokenizer.vocab_size == checkpoint.config.vocab_size


def test_resumed_equals_straight(straight, interrupted, data, tmp_path):
    """The torn row and the row after the checkpoint are written again, once."""
    workdir = tmp_path / "again"
    shutil.copytree(interrupted, workdir)
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "sta')
    run(workdir, data)
    assert losses(workdir) == losses(straight)
    assert rows(workdir, "eval.jsonl") == rows(straight, "eval.jsonl")
    one, two = (open_checkpoint(place).params for place in (straight, workdir))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_finished_run_says_so(straight, data, capsys):
    before = losses(straight)
    run(straight, data)
    assert capsys.readouterr().out.startswith(f"finished: {STEPS} of {STEPS} steps")
    assert losses(straight) == before


def test_another_config_is_refused_with_the_difference(interrupted, data):
    before = losses(interrupted)
    stages = tiny_run(data)["stages"]
    stages[0]["steps"] += 1
    with pytest.raises(InputError, match=r"config.json: .*learning_rate: 0.01 -> 0.5; seed: 3 -> 4") as error:
        run(interrupted, data, learning_rate=0.5, seed=4)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"stages\[0\].steps: 4 -> 5"):
        run(interrupted, data, stages=stages)
    assert losses(interrupted) == before


def test_added_steps_and_another_log_interval_are_accepted(interrupted, data, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(interrupted, workdir)
    stages = tiny_run(data)["stages"]
    stages[1]["steps"] += 1
    run(workdir, data, stages=stages, log_every=1, checkpoint_every=0, eval_every=0)
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 2))
    assert json.loads((workdir / "config.json").read_text())["stages"][1]["steps"] == 3


def test_init_from_and_start_stage(straight, data, tmp_path):
    """A new run begins with another's parameters, at a later stage's first step."""
    run(tmp_path, data, init_from=str(straight), start_stage="random", model="")
    assert [(row["step"], row["stage"]) for row in rows(tmp_path)] == [(5, "random"), (6, "random")]
    first, last = rows(tmp_path, "eval.jsonl")[0], rows(straight, "eval.jsonl")[-1]
    assert first["step"] == 4
    np.testing.assert_allclose([first[name] for name in ("l2r", "random", "ar")],
                               [last[name] for name in ("l2r", "random", "ar")], rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1.0}, "learning_rat: no such field; did you mean 'learning_rate'?"),
        ({"seq_len": "long"}, "seq_len: must be int"),
        ({"batch_size": 5, "microbatches": 2}, "microbatches: 2 does not divide"),
        ({"model": "llama-32-1b"}, "did you mean 'llama-3.2-1b'"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"mesh": {"data": 3, "fsdp": 1, "tensor": 1}}, "mesh: "),
        ({"data": "/no/such/file.txt"}, "/no/such/file.txt"),
        ({"init_from": "/no/such/checkpoint"}, "/no/such/checkpoint"),
        ({"start_stage": "randm"}, "did you mean 'random'"),
    ],
)
def test_bad_input_leaves_nothing_behind(data, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        run(tmp_path / "new", data, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_ids_outside_the_vocabulary_of_init_from_are_refused(straight, tmp_path):
    """Bytes of letters, for a model that knows 50 ids."""
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    small = dataclasses.replace(open_checkpoint(straight).config, vocab_size=50)
    save_checkpoint(tmp_path / "small", init_params(small, jax.random.key(0)), Meta(small), None)
    with pytest.raises(InputError, match="outside the model's vocabulary of 50"):
        run(tmp_path / "new", str(tmp_path / "text.jsonl"), init_from=str(tmp_path / "small"))


def test_a_finished_run_whose_last_step_is_damaged(straight, data, tmp_path, capsys):
    """The last step is set aside and done again from the one before; with none left the run is refused."""
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    steps = sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    damaged = steps[-1] / "meta" / "a3.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"{", b"[", 1))
    run(workdir, data)
    assert (workdir / "checkpoints" / f"{STEPS}.damaged").is_dir() and "damaged" in capsys.readouterr().err
    assert losses(workdir) == losses(straight)
    for step in workdir.glob("checkpoints/*/manifest.json"):
        step.write_bytes(step.read_bytes()[:-9])
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=rf"checkpoints/{STEPS}/manifest.json: is damaged"):
        run(workdir, data)
    assert (workdir / "metrics.jsonl").read_bytes() == before
