"""Two processes with one run: the same steps for both, and nobody waits for one that failed."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.drill


def test_two_processes_see_the_same(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run = tmp_path / "checkpoints"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint_process_child", port, str(number), str(run)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""},
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=150) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], (
        outputs[1][1][-2000:] + outputs[0][1][-2000:]
    )
    first, second = (
        [json.loads(line) for line in out.splitlines() if line.startswith('["')] for out, _ in outputs
    )
    assert first == second
    full = "step 4 could not be saved: OSError: [Errno 28] No space left on device"
    assert first == [
        ["saved", None], ["saved", None], ["saved", None], ["again", False], ["restored", 3],
        ["full", full], ["full in orbax", full], ["steps", [2, 3]], ["saved", None],
        ["restored", 3],  # 4 is damaged
        ["saved", None],
        ["restored", 3],  # 5 is in one process's eyes
        ["steps", [3]],
    ]  # fmt: skip
    assert sorted(path.name for path in run.iterdir()) == ["3", "4.damaged", "5.damaged"]
    told = [line for line in outputs[0][1].splitlines() if line.startswith("a3:")]
    assert len(told) == 2 and "seen by one alone" in told[1]
    assert "a3:" not in outputs[1][1]
