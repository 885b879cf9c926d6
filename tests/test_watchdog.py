"""A hang ends the process with status 76 and a file that says where; a slow but live one goes on."""

import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from a3_jax.errors import EXIT_HUNG
from a3_jax.runtime.watchdog import PHASES, Limits, Watchdog

HANG = """
import sys, threading, time
from a3_jax.runtime.watchdog import Limits, Watchdog

def waiting_for_a_peer():
    time.sleep(60)

def reading_ahead():
    time.sleep(60)

Watchdog(sys.argv[1], 3, Limits(step=float(sys.argv[2]))).enter("step")
threading.Thread(target=reading_ahead).start()
assert "jax" not in sys.modules
print("hanging", flush=True)
waiting_for_a_peer()
"""


class Ends:
    """What the watchdog told and how it ended the process."""

    def __init__(self):
        self.status, self.told, self.ended = None, [], threading.Event()

    def exit(self, status):
        self.status = status
        self.ended.set()

    def on_hang(self, phase, seconds, file):
        self.told.append((phase, seconds, file))


@pytest.fixture
def ends():
    return Ends()


@pytest.fixture
def clock(monkeypatch):
    """`time.monotonic` with a hand that tests move."""
    real, offset = time.monotonic, [0.0]
    monkeypatch.setattr("a3_jax.runtime.watchdog.time.monotonic", lambda: real() + offset[0])

    def move(seconds):
        offset[0] += seconds

    return move


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_is_ended_by_its_limit(tmp_path, ends, capsys, phase):
    limits = Limits(**{name: 0.1 if (phase if phase in ("step", "compile") else "other") == name else 60
                       for name in ("step", "compile", "other")})  # fmt: skip
    with Watchdog(tmp_path, 0, limits, ends.on_hang, ends.exit) as watchdog:
        watchdog.enter(phase)
        assert ends.ended.wait(5)
    assert ends.status == EXIT_HUNG
    ((told_phase, seconds, file),) = ends.told
    assert told_phase == phase and 0.1 < seconds < 2
    assert "test_each_phase_is_ended_by_its_limit" in pathlib.Path(file).read_text()
    assert os.path.dirname(file) == str(tmp_path / "stacks")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{phase}'" in line and file in line


def test_what_goes_on_is_left_alone(tmp_path, ends):
    with Watchdog(tmp_path, 0, Limits(step=0.3, other=0.3), ends.on_hang, ends.exit) as watchdog:
        for number in range(12):
            watchdog.enter(("step", "data")[number % 2])
            time.sleep(0.05)
        for _ in range(10):
            time.sleep(0.05)
            watchdog.beat()
        assert not ends.ended.is_set()
    time.sleep(0.5)
    assert not ends.ended.is_set()  # closed
    assert not (tmp_path / "stacks").exists()


def test_nothing_is_watched_before_the_first_phase_nor_without_limits(tmp_path, ends):
    with Watchdog(tmp_path, 0, Limits(0.05, math.inf, 0.05), ends.on_hang, ends.exit) as watchdog:
        watchdog.beat()
        time.sleep(0.3)
        watchdog.enter("compile")
        time.sleep(1.3)
    assert not ends.ended.is_set()


def test_a_word_that_is_no_phase(tmp_path, ends):
    with (
        Watchdog(tmp_path, 0, Limits(), exit=ends.exit) as watchdog,
        pytest.raises(ValueError, match="stepp"),
    ):
        watchdog.enter("stepp")


def test_the_automatic_limit_follows_the_steps(tmp_path, ends, clock):
    with Watchdog(tmp_path, 0, Limits(), exit=ends.exit) as watchdog:
        watchdog._stop.set()  # only the limit is looked at
        watchdog.enter("step")
        for seconds in (500, 30, 30, 30):
            clock(seconds)
            watchdog.enter("step")
        assert watchdog.limit("step") == 1800
        clock(30)
        watchdog.enter("data")  # the fifth step ends here
        assert watchdog.limit("step") == pytest.approx(600, abs=20)
        clock(1000)
        for _ in range(51):
            watchdog.enter("step")
            clock(0.5)
        watchdog.enter("save")
        assert watchdog.limit("step") == 120
        for _ in range(51):
            watchdog.enter("step")
            clock(7)
        assert watchdog.limit("step") == pytest.approx(140, abs=5)
        assert (watchdog.limit("compile"), watchdog.limit("data")) == (3600, 1800)


def test_a_callback_that_raises_or_hangs_changes_nothing(tmp_path, ends):
    def raising(*_):
        raise RuntimeError

    for on_hang in (raising, lambda *_: time.sleep(30)):
        ends = Ends()
        with Watchdog(tmp_path, 0, Limits(step=0.05), on_hang, ends.exit) as watchdog:
            watchdog.enter("step")
            assert ends.ended.wait(6)
        assert ends.status == EXIT_HUNG


def test_stacks_that_can_not_be_written_go_to_standard_error(tmp_path, ends, capfd):
    (tmp_path / "stacks").write_text("")
    with Watchdog(tmp_path, 0, Limits(step=0.05), ends.on_hang, ends.exit) as watchdog:
        watchdog.enter("step")
        assert ends.ended.wait(5)
    assert "test_stacks_that_can_not_be_written" in capfd.readouterr().err


def test_stacks_in_a_bucket(tmp_path, ends, monkeypatch):
    written = {}

    class File(type(tmp_path)):
        def write_bytes(self, content):
            written[str(self)] = content

    monkeypatch.setattr("a3_jax.runtime.watchdog.absolute", lambda path: File(path))
    place = tmp_path / "gs:" / "" / "bucket"
    monkeypatch.setattr(File, "__str__", lambda self: "gs://bucket/" + self.name)
    with Watchdog(place, 0, Limits(step=0.05), ends.on_hang, ends.exit) as watchdog:
        watchdog.enter("step")
        assert ends.ended.wait(5)
    assert b"test_stacks_in_a_bucket" in written[ends.told[0][2]]


def hanging(tmp_path, limit):
    process = subprocess.Popen(
        [sys.executable, "-c", HANG, str(tmp_path), str(limit)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "hanging\n"
    return process


def test_a_process_that_hangs(tmp_path):
    process = hanging(tmp_path, 0.5)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == EXIT_HUNG
    assert err.count("\n") == 1 and "'step'" in err
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.startswith("3-") and str(file) in err
    text = file.read_text()
    assert "waiting_for_a_peer" in text and "reading_ahead" in text


def test_a_suspended_process_is_not_to_blame(tmp_path):
    """Eight seconds asleep, with a limit of six: the clock goes on from where it stood."""
    process = hanging(tmp_path, 6)
    time.sleep(1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    time.sleep(2.5)
    assert process.poll() is None
    process.communicate(timeout=30)
    assert process.returncode == EXIT_HUNG
