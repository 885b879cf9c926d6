"""Real runs under `a3 launch local`: one that can go on does, one that can't is ended with what is known."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from a3_jax.checkpoints.manifest import find_damage, read_manifest
from a3_jax.cli import main
from a3_jax.errors import EXIT_NO_PROGRESS, EXIT_OK
from tests.drills.harness import CONFIG, LAST_STEP, TIMEOUT, rows_beside

pytestmark = pytest.mark.drill

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # devices: its own
BATCH_SIZE = 8  # of the drills' config


@contextlib.contextmanager
def launched(workdir, cache, drill, *flags):
    """The supervisor as a process; standard error goes to a file beside the run."""
    env = {
        **os.environ,
        "XLA_FLAGS": XLA_FLAGS,
        "A3_COMPILATION_CACHE": str(cache),
        "A3_DRILL": drill,
    }
    command = [sys.executable, "-m", "a3_jax.cli", "launch", "local", f"--config={CONFIG}"]
    command += [f"--config.data={rows_beside(cache)}"]
    root = pathlib.Path(__file__).parents[2]
    with open(f"{workdir}.err", "wb") as errors:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *flags], cwd=root, env=env, stderr=errors
        )
    try:
        yield process
    finally:
        process.terminate()  # its children with it
        process.wait(60)


def told(workdir):
    return pathlib.Path(f"{workdir}.err").read_text()


def printed(command, workdir, capsys):
    """What `a3 COMMAND RUN --json` says."""
    capsys.readouterr()
    assert main([command, str(workdir), "--json"]) == EXIT_OK
    return json.loads(capsys.readouterr().out)


def rows(workdir, name):
    file = workdir / name
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_a_row_that_kills(tmp_path, cache, capsys):
    """78 after as many restarts without a new checkpoint as are allowed; the step and its rows are named."""
    workdir = tmp_path / "run"
    with launched(workdir, cache, "poison:6", "--max_restarts=1") as supervisor:
        assert supervisor.wait(2 * TIMEOUT) == EXIT_NO_PROGRESS, told(workdir)

    report = json.loads((workdir / "no_progress.json").read_text())
    # The first attempt saved step 4; the two that began there came no further.
    assert report["newest_checkpoint"] == 4
    assert (report["restarts"], report["restarts_without_progress"]) == (2, 1)
    assert report["exit_statuses"] == [[-signal.SIGKILL]] * 3
    first, last = 5 * BATCH_SIZE, 6 * BATCH_SIZE - 1
    assert {"step": 6, "first_example": first, "last_example": last} in report["in_flight"]
    assert f"step 6 has the examples {first} to {last}" in told(workdir)
    assert told(workdir).splitlines()[-1].startswith(f"a3: {workdir}: no progress: ")

    checkpoint = workdir / "checkpoints" / "4"
    assert not find_damage(checkpoint, read_manifest(checkpoint), deep=True)
    status = printed("status", workdir, capsys)
    assert status["checkpoint"] == 4 and status["damaged_checkpoints"] == [] and status["restarts"] == 2
    assert status["state"] == "stopped"


def test_a_process_killed_under_the_supervisor(tmp_path, cache, capsys):
    """The launch goes on by itself to the end, and what it wrote tells of it."""
    workdir = tmp_path / "run"
    # Slow saves: the one of step 8 waits for that of step 4, so there is time to kill in between.
    with launched(workdir, cache, "slow_save:2", "--processes=2") as supervisor:
        end = time.monotonic() + TIMEOUT
        while not any(row["event"] == "step" and row["step"] >= 5 for row in rows(workdir, "events.jsonl")):
            assert supervisor.poll() is None and time.monotonic() < end, told(workdir)
            time.sleep(0.05)
        (began,) = [row for row in rows(workdir, "events.jsonl") if row["event"] == "init"]
        os.kill(began["pid"], signal.SIGKILL)
        assert supervisor.wait(2 * TIMEOUT) == EXIT_OK, told(workdir)

    assert "process 0 was ended by SIGKILL; all start again" in told(workdir)
    assert [row["step"] for row in rows(workdir, "metrics.jsonl")] == list(range(1, LAST_STEP + 1))
    status = printed("status", workdir, capsys)
    assert (status["state"], status["step"], status["checkpoint"]) == ("finished", LAST_STEP, LAST_STEP)
    assert (status["attempts"], status["restarts"]) == (2, 1)
    goodput = printed("goodput", workdir, capsys)
    shares = sum(goodput["seconds"].values()) / goodput["wall_seconds"]
    assert abs(shares - 1) < 1e-6 and 0 < goodput["goodput"] < 1
    assert goodput["seconds"]["down"] > 0 and goodput["steps"] == LAST_STEP and goodput["restarts"] == 1
