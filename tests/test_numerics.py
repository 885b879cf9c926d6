"""A step without a finite loss and gradient changes nothing, is counted, and too many of them end a run."""

import json

import jax
import numpy as np
import pytest

from a3_jax import cli
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.data import feature_converter
from a3_jax.errors import EXIT_NUMERICS, RunError
from a3_jax.runtime.compile_cache import compilation_cache
from a3_jax.training import run_log
from a3_jax.training.step import make_train_step
from a3_jax.training.train import train
from tests.training_fixtures import LINES, one_device, sorted_rows, tiny_run, tiny_state


def poisoned(rows, places):
    weights = rows["weights"].copy()
    weights[places] = np.nan
    return rows | {"weights": weights}


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("objective", ["any_order", "ar"])
@pytest.mark.parametrize(("microbatches", "places"), [(1, slice(0, 1)), (2, slice(1, 2))])
def test_a_bad_step_changes_no_bit(objective, microbatches, places):
    """Of parameters and optimiser state; one bad microbatch among good ones is enough."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        model, optimizer, state = tiny_state(mesh)
        step = make_train_step(model, optimizer, mesh, objective=objective, microbatches=microbatches)
        rows, rate = sorted_rows(0, batch=4, length=8), np.float32(1e-2)
        state, metrics = step(state, rows, rate)
        before = copied(state)
        assert metrics["skipped"] == 0 and np.abs(before.opt_state[1].mu["final_norm"]).max() > 0
        for count in (1, 2):
            state, metrics = step(state, poisoned(rows, places), rate)
            assert metrics["skipped"] == count and not np.isfinite(metrics["loss"])
            assert_equal(copied((state.params, state.opt_state)), (before.params, before.opt_state))
        after = copied(state)
        assert (after.step, after.numerics.in_a_row, after.numerics.skipped) == (3, 2, 2)
        state, metrics = step(state, rows, rate)
        assert metrics["skipped"] == 0 and state.numerics.in_a_row == 0 and state.numerics.skipped == 2
        moved = jax.tree.map(lambda new, old: np.abs(np.array(new) - old).max(), state.params, before.params)
        assert max(jax.tree.leaves(moved)) > 0, "a good step still learns"


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_with_nothing_to_predict_changes_no_bit(microbatches):
    """Momentum and weight decay would; it is no step without a finite loss either."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        model, optimizer, state = tiny_state(mesh, weight_decay=0.1)
        step = make_train_step(model, optimizer, mesh, objective="any_order", microbatches=microbatches)
        rows, rate = sorted_rows(0, batch=4, length=8), np.float32(1e-2)
        state, _ = step(state, rows, rate)
        before = copied(state)
        state, metrics = step(state, rows | {"weights": np.zeros_like(rows["weights"])}, rate)
        assert (metrics["predicted"], metrics["grad_norm"], metrics["skipped"]) == (0, 0, 0)
        after = copied(state)
        assert_equal((after.params, after.opt_state), (before.params, before.opt_state))
        assert (after.step, after.numerics.skipped) == (2, 0)


class Poison:
    """Rows whose weights are no numbers, by the number of the batch from 1, counted over all rows ever."""

    def __init__(self, monkeypatch, numbers):
        self.numbers, self.seen, stream = set(numbers), [], feature_converter.stream

        def poisonous(plan, first_step):
            for number, rows in enumerate(
                stream(plan, first_step), start=first_step + plan.skipped_batches + 1
            ):
                self.seen.append(number)
                yield poisoned(rows, slice(0, 1)) if number in self.numbers else rows

        monkeypatch.setattr(feature_converter, "stream", poisonous)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text, and a compilation cache: every run here compiles the same step."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "text.txt").write_text("\n\n".join(LINES))
    with compilation_cache(str(directory / "compiled"), "cpu"):
        yield str(directory / "text.txt")


def run(workdir, text, steps=10, **changes):
    stages = [{"name": "l2r", "steps": steps}]
    config = tiny_run(text, stages=stages, checkpoint_every=2, max_skipped=3, keep=9) | changes
    return train(config, workdir, devices=jax.devices()[:1])


def rows(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def events(workdir, name):
    return [row for row in rows(workdir, "events.jsonl") if row["event"] == name]


@pytest.mark.slow
def test_single_bad_steps_are_skipped(tmp_path, text, monkeypatch):
    Poison(monkeypatch, {3, 4, 6})
    run(tmp_path / "run", text)
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == list(range(1, 11))
    assert [row["step"] for row in metrics if row.get("skipped")] == [3, 4, 6]
    assert [row["step"] for row in metrics if row["loss"] is None] == [3, 4, 6]
    assert not events(tmp_path / "run", "rollback")


@pytest.mark.slow
def test_too_many_roll_back_once_and_pass_over_the_rows(tmp_path, text, monkeypatch):
    """Three in a row: back to the checkpoint before the first of them, on with the rows after the last.

    The steps that follow are those of a run on these rows: the same losses, one row a step, and a
    second start finds nothing left to do.
    """
    poison = Poison(monkeypatch, {6, 7, 8})
    run(tmp_path / "run", text)
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["from_step"], rollback["to_step"], rollback["skipped_steps"]) == (8, 4, 3)
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == list(range(1, 11))
    assert not any(row.get("skipped") or row["loss"] is None for row in metrics)
    assert poison.seen == [*range(1, 9), *range(9, 15)], "step 5 is done again with the rows of batch 9"
    poison.numbers.clear()
    assert run(tmp_path / "run", text) == tmp_path / "run" / "checkpoints" / "10"


@pytest.mark.slow
def test_killed_after_a_roll_back_it_goes_on_alike(tmp_path, text, monkeypatch):
    """What was passed over is part of the saved state."""
    Poison(monkeypatch, {6, 7, 8})
    run(tmp_path / "straight", text)
    read_previous = run_log.MetricsReader.read_previous

    def read_or_die(self):
        read_previous(self)
        if self.step == 7 and not self.skipped:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_log.MetricsReader, "read_previous", read_or_die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", text)
    run(tmp_path / "killed", text)
    assert [row["loss"] for row in rows(tmp_path / "killed")] == [
        row["loss"] for row in rows(tmp_path / "straight")
    ]
    assert len(events(tmp_path / "killed", "rollback")) == 1


@pytest.mark.slow
def test_what_is_never_a_number_ends_the_run(tmp_path, text, monkeypatch):
    """With 79, at once where there is no checkpoint to go back to, else after one roll-back; none is bad."""
    Poison(monkeypatch, range(1, 99))
    with pytest.raises(RunError, match=r"steps 1 to 3 .*no checkpoint before") as error:
        run(tmp_path / "first", text)
    assert error.value.status == EXIT_NUMERICS
    monkeypatch.undo()
    Poison(monkeypatch, range(6, 99))
    with pytest.raises(RunError, match="rolled back once already") as error:
        run(tmp_path / "later", text)
    assert error.value.status == EXIT_NUMERICS
    assert events(tmp_path / "later", "failed")
    for step in (tmp_path / "later" / "checkpoints").iterdir():
        params = open_checkpoint(step).params
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_stage_with_nothing_to_predict(tmp_path, capsys):
    """Documents of one token have no next one: null in place of a loss, a warning, and the run goes on."""
    (tmp_path / "letters.txt").write_text("\n\n".join("abcdefghijklmnopqrstuvwxyz"))
    stages = [{"name": "next", "objective": "ar", "steps": 3}, {"name": "l2r", "steps": 2}]
    workdir = tmp_path / "run"
    run(workdir, str(tmp_path / "letters.txt"), stages=stages, eval_every=2, max_skipped=2, log_every=1)
    written = "".join(
        (workdir / name).read_text() for name in ("metrics.jsonl", "eval.jsonl", "events.jsonl")
    )
    assert "NaN" not in written
    metrics = rows(workdir)
    assert [row["loss"] is None for row in metrics] == [True] * 3 + [False] * 2
    assert not any("skipped" in row for row in metrics)
    assert all(row["ar"] is None and row["l2r"] > 0 for row in rows(workdir, "eval.jsonl"))
    told = capsys.readouterr().err
    assert told.count("warning: step 1 of stage 'next' has nothing to predict") == 1
    assert "warning: the held-out rows have nothing to predict, so no loss: ar\n" in told
    assert "nan" not in told
    assert "step 2/5  next  nothing to predict  rate" in told
    for command in ("status", "goodput"):
        assert cli.main([command, str(workdir)]) == 0


def test_a_status_without_a_loss(tmp_path, capsys):
    """The last step's row may have none."""
    (tmp_path / "events.jsonl").write_text(
        '{"time": 1.0, "event": "init", "seconds": 1.0, "first_step": 0}\n'
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "next", "loss": null}\n')
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "nan" not in capsys.readouterr().out.lower()
