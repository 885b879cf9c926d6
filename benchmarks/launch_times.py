"""`a3 bench launch`: how soon two processes under `a3 launch local` train, and train again after a kill.

Each has two virtual CPU devices. As on a pod, all starts but the first find compiled programs.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from a3_jax.errors import InputError
from benchmarks.measurement import MeasurementError, Row, note

LONGEST = 600.0  # seconds to wait for anything
SAVE_EVERY = 5  # steps
METRICS = "first_step_time", "kill_to_next_step_time", "later_first_step_time"


def measure(settings) -> list[Row]:
    """Measures seconds from the command to the first step, from `kill -9` of a process to the next step, and
    from the command to the first step of another run, which finds the programs of this one."""
    if not settings.config:
        raise InputError("is needed", field="--config")
    setting, found = {"config": settings.config, "processes": 2, "devices": 2}, []
    for number in range(settings.repeats):
        found.append(_measure_once(settings))
        times = ", ".join(f"{seconds:.1f} s" for seconds in found[-1])
        note(f"launch: {number + 1} of {settings.repeats}: {', '.join(METRICS)}: {times}")
    return [Row(name, "s", setting, times) for name, times in zip(METRICS, zip(*found), strict=True)]


def _measure_once(settings) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as directory:
        root, began = pathlib.Path(directory), time.time()
        with _launched(settings, root / "run") as wait_for:
            step, _, start = wait_for("step"), wait_for("saved"), wait_for("init")
            killed = time.time()
            os.kill(start["pid"], signal.SIGKILL)
            again = wait_for("step", attempt=2)
        began_later = time.time()
        with _launched(settings, root / "later") as wait_for:
            other = wait_for("step")
        return step["time"] - began, again["time"] - killed, other["time"] - began_later


@contextlib.contextmanager
def _launched(settings, workdir):
    """Launches the run; yields a function that waits for the first event of a name in an attempt."""
    command = [sys.executable, "-m", "a3_jax.cli", "launch", "local", "--processes=2", "--devices=2"]
    command += [f"--config={settings.config}", f"--workdir={workdir}", *settings.overrides,
                f"--config.checkpoint_every={SAVE_EVERY}"]  # fmt: skip
    environment = {**os.environ, "A3_COMPILATION_CACHE": str(workdir.parent / "programs")}
    file, log = workdir / "events.jsonl", workdir.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)

    def wait_for(name: str, attempt: int = 1) -> dict:
        end = time.monotonic() + LONGEST
        while time.monotonic() < end:
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("\n")]
            found = [each for each in events if each["event"] == name and each["attempt"] >= attempt]
            if found:
                return found[0]
            if process.poll() is not None:
                status = f"launch: exit status {process.returncode}"
                raise MeasurementError(status, log.read_text(errors="replace"))
            time.sleep(0.05)
        raise MeasurementError(f"launch: nothing happened in {LONGEST:.0f} s")

    try:
        yield wait_for
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
