"""kill -9 at any moment of a save: the step before is there, leftovers don't count, it can be saved again."""

import subprocess
import sys

import pytest

from a3_jax.checkpoints.a3_format import list_steps
from a3_jax.checkpoints.inspect import verify
from a3_jax.checkpoints.manifest import MANIFEST_FILE
from a3_jax.checkpoints.step_writer import StepWriter
from tests.checkpoint_fixtures import restore_newest, save
from tests.checkpoint_kill_child import MOMENTS

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The first one lived, the others died."""
    place = tmp_path_factory.mktemp("killed")
    paths = [place / str(number) for number in range(1 + len(MOMENTS))]
    command = [sys.executable, "-m", "tests.checkpoint_kill_child", place / "compiled", *paths]
    subprocess.run(command, check=True, timeout=500)
    return paths


def test_the_moments_are_different_ones(runs):
    assert len(MOMENTS) >= 20
    assert list_steps(runs[0]) == [1, 2]
    unfinished = [len(list((run / "2").rglob("*"))) for run in runs[1:] if 2 not in list_steps(run)]
    assert len(unfinished) >= 10 and len(set(unfinished)) >= 4
    assert any(2 in list_steps(run) for run in runs[1:])


@pytest.mark.parametrize("number", range(1, 1 + len(MOMENTS)))
def test_killed_while_saving(runs, number, capsys):
    run = runs[number]
    steps = list_steps(run)
    assert [step for step in steps if step > 0] in ([1], [1, 2])
    assert not any(verdict.problems for verdict in verify(run) if (verdict.path / MANIFEST_FILE).exists())
    with StepWriter(run, keep=2) as writer:
        assert restore_newest(writer) == steps[-1]
        assert capsys.readouterr().err == ""
        assert save(writer, 2) == (2 not in steps)
        assert save(writer, 3)
        writer.wait()
        assert sorted(path.name for path in run.iterdir()) == ["2", "3"]
        assert restore_newest(writer) == 3
        assert restore_newest(writer, at_most=2) == 2
