"""One process: told to stop, out of disk, two on one directory."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from a3_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_STORAGE
from a3_jax.pods.local import start_child
from tests.drills import harness

pytestmark = pytest.mark.drill


def test_a_request_to_stop_while_compiling(run, tmp_path):
    """Nothing was done that a restart would do again, so it leaves at once; the next start begins anew."""
    cold = run(overrides=["--config.data="])  # the embedded text, for once
    cold._cache = str(tmp_path / "cold")
    cold.start().wait_for(lambda: cold.events("init"))
    cold.kill(0, signal.SIGTERM)
    assert cold.wait(30) == [EXIT_PREEMPTED], cold.told()
    assert not cold.rows() and not (cold.workdir / "lease.json").exists()
    cold.start().wait_for_step(1)
    second = run(overrides=["--config.data="])
    cold.kill(0, signal.SIGSTOP)  # lest it ends before the second begins
    second.start()
    assert second.wait() == [EXIT_BAD_INPUT], "a second run on one directory"
    cold.kill(0, signal.SIGCONT)
    assert "another run writes here" in second.log().read_text()
    cold.kill(0, signal.SIGTERM)
    assert cold.wait() == [EXIT_PREEMPTED]
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(cold.workdir / name, "a") as torn:
            torn.write('{"time": 1.0, "step": 99, "ev')
    cold.finish()
    assert [row["step"] for row in cold.rows()] == list(range(1, harness.LAST_STEP + 1))
    assert cold.events("finish")


@contextlib.contextmanager
def small_disk(directory):
    """A file system of 1 MB, for one checkpoint of some 700 KB; where none may be mounted, small files."""
    directory.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(directory)], capture_output=True
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk(run):
    """The failed save is told by the next step and doesn't exist; after three the run ends with 77."""
    full = run(overrides=["--config.checkpoint_every=2"])
    with small_disk(full.workdir / "checkpoints") as mounted:
        full.start(drill="" if mounted else "small_files:20000")
        assert full.wait() == [EXIT_STORAGE], full.told()
        failed = full.events("save_failed")
        assert len(failed) == 3 and full.log().read_text().count("a save failed") == 3
        steps = sorted(path.parent.name for path in (full.workdir / "checkpoints").glob("*/manifest.json"))
        assert steps == ["2"] and failed[0]["step"] == 4
        assert [row["step"] for row in full.rows()] == list(range(1, full.rows()[-1]["step"] + 1))
        assert full.rows()[-1]["step"] <= failed[-1]["step"] + 2
    full.finish()
    assert [row["step"] for row in full.rows()] == list(range(1, harness.LAST_STEP + 1))


# `a3 convert`, which takes a minute between its arrays and its manifest.
CONVERT_SLOWLY = """
import sys, time
from a3_jax.checkpoints import a3_format
from a3_jax.cli import console
a3_format.write_manifest = lambda *_: time.sleep(60)
sys.exit(console())
"""


def test_a_request_to_stop_a_conversion(run, tmp_path):
    """Exit status 75, and nothing half-written."""
    short = run(processes=1).finish()
    paths = str(short.workdir), str(tmp_path / "converted")
    command = [sys.executable, "-c", CONVERT_SLOWLY, "convert", *paths]
    with open(short.log(), "ab") as log:
        child = start_child(command, {**os.environ, "JAX_PLATFORMS": "cpu"}, log)
    short.wait_for(lambda: list(tmp_path.glob(".*.tmp*/params")), alive=False)
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    assert child.wait(harness.TIMEOUT) == EXIT_PREEMPTED
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
