"""Two processes: one dies, is told to stop, hangs, differs. Nothing is lost, no number changes."""

import pathlib
import shutil
import signal
import time

import pytest

from a3_jax.checkpoints.manifest import read_manifest
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_HUNG, EXIT_PREEMPTED
from tests.drills.harness import LAST_STEP

pytestmark = pytest.mark.drill


def fingerprints(run):
    """Of every leaf of the last checkpoint: equal only where every bit is."""
    manifest = read_manifest(run.workdir / "checkpoints" / str(LAST_STEP))
    return {name: leaf.fingerprint for name, leaf in manifest.leaves.items()}


def losses(run):
    return [(row["step"], row["loss"]) for row in run.rows()]


def assert_same_run(run, undisturbed):
    assert fingerprints(run) == fingerprints(undisturbed)
    assert losses(run) == losses(undisturbed), "one row a step, the same numbers"


@pytest.mark.parametrize("victim", [1, 0], ids=["peer", "coordinator"])
def test_a_killed_process(run, undisturbed, victim):
    """Its peer leaves within 30 s with 75; the run goes on to the same parameters, bit for bit."""
    disturbed = run(processes=2)
    disturbed.start(drill="slow_rows").wait_for_step(6).wait_for(lambda: disturbed.events("saved"))
    disturbed.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    statuses = disturbed.wait()
    assert time.monotonic() - begin < 30, disturbed.told()
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == EXIT_PREEMPTED, disturbed.told()
    disturbed.finish()
    assert disturbed.events("restore")[0]["step"] >= 4
    assert_same_run(disturbed, undisturbed)


@pytest.mark.parametrize("told", [0, 1])
def test_a_request_to_stop(run, undisturbed, told):
    """SIGTERM to one process: both save the same step, exit with 75 and go on at the next one."""
    disturbed = run(processes=2)
    disturbed.start().wait_for_step(5)
    disturbed.kill(told, signal.SIGTERM)
    assert disturbed.wait() == [EXIT_PREEMPTED] * 2, disturbed.told()
    (stopped,) = disturbed.events("preempt")
    assert (disturbed.workdir / "checkpoints" / str(stopped["step"]) / "manifest.json").exists()
    assert disturbed.rows()[-1]["step"] == stopped["step"]
    disturbed.finish()
    assert disturbed.events("init")[-1]["first_step"] == stopped["step"]
    assert_same_run(disturbed, undisturbed)


def test_a_request_to_stop_during_an_evaluation(run):
    """The evaluation is given up, the step saved; the run goes on with the evaluation that is missing."""
    disturbed = run(processes=2, overrides=["--config.eval_every=6", "--config.sample_every=8"])
    disturbed.start(drill="slow_eval").wait_for_step(6)
    disturbed.kill(1, signal.SIGTERM)
    assert disturbed.wait() == [EXIT_PREEMPTED] * 2, disturbed.told()
    (stopped,) = disturbed.events("preempt")
    assert stopped["step"] == 6 and [row["step"] for row in disturbed.rows("eval.jsonl")] == [0]
    disturbed.finish()
    assert [row["step"] for row in disturbed.rows("eval.jsonl")] == [0, 6, 8, 12, 16]
    assert [row["step"] for row in disturbed.rows()] == list(range(1, LAST_STEP + 1))
    assert {row["step"] for row in disturbed.rows("samples.jsonl")} == {8, 16}


def test_a_stuck_and_a_stopped_peer(run):
    """The one that waits writes down where its threads stand and exits with 76, whatever holds the other."""
    for fault in ("stuck", "stopped"):
        disturbed = run(fault, processes=2, overrides=["--config.hang_seconds=10"])
        disturbed.start(drills={1: "stuck:7"} if fault == "stuck" else {})
        disturbed.wait_for_step(5)
        if fault == "stopped":
            disturbed.kill(1, signal.SIGSTOP)
        assert disturbed.children[0].wait(120) == EXIT_HUNG, disturbed.told()
        (hang,) = disturbed.events("hang")
        assert hang["phase"] == "step" and 10 <= hang["seconds"] < 60
        assert "train.py" in pathlib.Path(hang["file"]).read_text()
        disturbed.end()


def test_a_flag_that_differs(run):
    """Both refuse before the first step, and say what differs; nothing is written."""
    differing = run(processes=2)
    differing.start(overrides_of={1: ["--config.learning_rate=0.02"]})
    assert differing.wait() == [EXIT_BAD_INPUT] * 2, differing.told()
    for process in (0, 1):
        last = differing.log(process).read_text().splitlines()[-1]
        assert last.startswith("a3: ") and "config.learning_rate: 0.01 -> 0.02" in last
    assert [path.name for path in differing.workdir.iterdir()] == ["logs"]


@pytest.mark.parametrize(("processes", "devices"), [(4, 1), (2, 1)])
def test_going_on_with_other_processes(run, undisturbed, processes, devices):
    """The checkpoint of 2 x 2 is restored leaf for leaf, the same rows give the same losses to 1e-6."""
    other = run(processes=processes, devices=devices)
    shutil.copytree(undisturbed.workdir, other.workdir)
    shutil.rmtree(other.workdir / "checkpoints" / str(LAST_STEP))
    other.finish()
    first = other.events("init")[-1]["first_step"]
    assert first == LAST_STEP - 4
    ours, theirs = dict(losses(other)), dict(losses(undisturbed))
    assert ours.keys() == theirs.keys()
    assert abs(ours[first + 1] - theirs[first + 1]) < 1e-6 * theirs[first + 1] + 1e-6
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-3
