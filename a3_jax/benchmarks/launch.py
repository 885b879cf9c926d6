"""`a3 bench launch`: how soon two processes under `a3 launch local` train, and train again after a kill.

Each has two virtual CPU devices. Compiled programs are kept from the first start to the second, as they are
on a pod; the first start finds none.
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
from collections.abc import Callable

from a3_jax.benchmarks.measurement import MeasurementError, Row, note
from a3_jax.benchmarks.settings import Settings
from a3_jax.errors import InputError

_LONGEST = 600.0  # seconds, of anything
_SAVE_EVERY = 5  # steps


def measure(settings: Settings) -> list[Row]:
    """Seconds from the command to the first step, and from `kill -9` of a process to the next step.

    Raises:
      InputError: no config.
      MeasurementError: the launch ended, or nothing happened for ten minutes.
    """
    if not settings.config:
        raise InputError("is needed", field="--config")
    setting = {"config": settings.config, "processes": 2, "devices": 2}
    found = []
    for number in range(settings.repeats):
        found.append(_measure_once(settings))
        first, again = found[-1]
        note(f"launch: {number + 1} of {settings.repeats}: first step {first:.1f} s, again {again:.1f} s")
    first, again = zip(*found, strict=True)
    return [
        Row("first_step_time", "s", setting, first),
        Row("kill_to_next_step_time", "s", setting, again),
    ]


def _measure_once(settings) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as directory:
        workdir = pathlib.Path(directory) / "run"
        command = [sys.executable, "-m", "a3_jax.cli", "launch", "local", "--processes=2", "--devices=2"]
        command += [f"--config={settings.config}", f"--workdir={workdir}", *settings.overrides]
        command += [f"--config.checkpoint_every={_SAVE_EVERY}"]
        began = time.time()
        with _supervisor(command, f"{directory}/told") as ended:
            step = _wait(workdir, ended, lambda events: _first(events, "step"))
            started = _wait(workdir, ended, lambda events: _first(events, "saved") and _first(events, "init"))
            killed = time.time()
            os.kill(started["pid"], signal.SIGKILL)
            again = _wait(workdir, ended, lambda events: _first(_of_last_attempt(events), "step"))
        return step["time"] - began, again["time"] - killed


@contextlib.contextmanager
def _supervisor(command, told):
    """The launch as a process; gives what raises once it has ended."""
    with open(told, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)

    def ended():
        if process.poll() is not None:
            last = pathlib.Path(told).read_text(errors="replace").strip().splitlines()[-1:] or [""]
            raise MeasurementError(f"launch: exit status {process.returncode} {last[0]}".strip())

    try:
        yield ended
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


def _wait(workdir, ended: Callable[[], None], find: Callable[[list[dict]], dict | None]) -> dict:
    end = time.monotonic() + _LONGEST
    while True:
        file = workdir / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        found = find([json.loads(line) for line in lines if line.endswith("\n")])
        if found:
            return found
        ended()
        if time.monotonic() > end:
            raise MeasurementError(f"launch: nothing happened in {_LONGEST:.0f} s")
        time.sleep(0.05)


def _first(events, name) -> dict | None:
    return next((event for event in events if event["event"] == name), None)


def _of_last_attempt(events) -> list[dict]:
    """Events since the second start; none before it."""
    starts = [place for place, event in enumerate(events) if event["event"] == "init"]
    return events[starts[1] :] if len(starts) > 1 else []
