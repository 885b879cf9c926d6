"""`a3 bench launch`: how soon two processes under `a3 launch local` train, and train again after a kill.

Each has two virtual CPU devices. Compiled programs are kept from one start to the next, as on a pod; the
first start finds none.
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
    """Seconds from the command to the first step, from `kill -9` of a process to the next step, and from the
    command to the first step of another run that finds the programs of this one.

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
        told = "first step {:.1f} s, after a kill {:.1f} s, of a later run {:.1f} s".format(*found[-1])
        note(f"launch: {number + 1} of {settings.repeats}: {told}")
    names = "first_step_time", "kill_to_next_step_time", "later_first_step_time"
    return [Row(name, "s", setting, values) for name, values in zip(names, zip(*found), strict=True)]


def _measure_once(settings) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as directory:
        run, later = (pathlib.Path(directory) / name for name in ("run", "later"))
        began = time.time()
        with _launched(settings, run) as ended:
            step = _wait(run, ended, lambda events: _first(events, "step"))
            started = _wait(run, ended, lambda events: _first(events, "saved") and _first(events, "init"))
            killed = time.time()
            os.kill(started["pid"], signal.SIGKILL)
            again = _wait(run, ended, lambda events: _first(_of_last_attempt(events), "step"))
        began_later = time.time()
        with _launched(settings, later) as ended:
            other = _wait(later, ended, lambda events: _first(events, "step"))
        return step["time"] - began, again["time"] - killed, other["time"] - began_later


@contextlib.contextmanager
def _launched(settings, workdir):
    """The launch as a process; gives what raises once it has ended."""
    command = [sys.executable, "-m", "a3_jax.cli", "launch", "local", "--processes=2", "--devices=2"]
    command += [f"--config={settings.config}", f"--workdir={workdir}", *settings.overrides]
    command += [f"--config.checkpoint_every={_SAVE_EVERY}"]
    environment = {**os.environ, "A3_COMPILATION_CACHE": str(workdir.parent / "programs")}
    told = workdir.with_suffix(".told")
    with open(told, "wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)

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
