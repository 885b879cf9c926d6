"""SIGTERM as a request: noticed while the main thread is in native code, and a second one is an order."""

import signal
import subprocess
import sys

import pytest

from a3_jax.errors import EXIT_PREEMPTED
from a3_jax.runtime.preemption import StopRequest

# The main thread sleeps where Python runs no handlers, as in a compiler.
PROGRAM = """
import ctypes, sys
from a3_jax.runtime.preemption import StopRequest
with StopRequest(lambda: print("given back", flush=True)) as stop:
    stop.anything_to_save = bool(int(sys.argv[1]))
    print("ready", flush=True)
    for _ in range(1200):
        ctypes.CDLL(None).usleep(100_000)
        if stop:
            print("asked", flush=True)
"""


@pytest.fixture
def start():
    started = []

    def start(*arguments):
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        started.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


def test_with_nothing_to_save_it_leaves_at_once(start):
    child = start("0")
    child.terminate()
    assert child.wait(30) == EXIT_PREEMPTED
    # "asked" may stand beside it: the main thread can wake between the signal and the leaving.
    assert "given back\n" in child.stdout.read()


def test_the_first_is_a_request_and_the_second_an_order(start):
    child = start("1")
    child.terminate()
    assert child.stdout.readline() == "asked\n"
    assert child.poll() is None, "it goes on until the run has saved"
    child.terminate()
    assert child.wait(30) == EXIT_PREEMPTED
    assert "given back\n" in child.stdout.read()


def test_afterwards_signals_are_the_programs_own():
    mine = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop and signal.getsignal(signal.SIGTERM) is not mine
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.set_wakeup_fd(-1) == -1
