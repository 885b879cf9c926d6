"""Work in a process of its own, done on request: its seconds and its peak memory.

On CPU the peak is the resident set: Linux's high-water mark, set back to the present size before each call.
On accelerators it is the device's own count, from the start of the process.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.measurement import MeasurementError
from benchmarks.settings import Settings

ROOT = str(pathlib.Path(__file__).parent.parent)
CHILD = f"import sys; sys.path.insert(0, {ROOT!r}); from benchmarks.fresh_process import serve; serve()"


@contextlib.contextmanager
def fresh_process(name: str, maker: Callable[..., Callable], warm_ups: int = 1, **arguments):
    """Starts a process that makes a call of its own, by a module's function; yields a call of it from here.

    It returns the "seconds" of a call, its "peak" and that of the whole process so far, in bytes, and raises
    `MeasurementError` if the process has failed. Two contenders in one process would share an allocator and
    leave each other their idle threads. The arguments of `maker` are plain JSON, or `Settings`.
    """
    task = json.dumps([maker.__module__, maker.__name__, warm_ups, arguments], default=dataclasses.asdict)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, task],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip

        def call() -> dict[str, float]:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                status = process.wait()
                errors.seek(0)
                raise MeasurementError(f"{name}: exit status {status}", errors.read())
            return json.loads(line)

        try:
            yield call
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.communicate()  # the end of its input ends it


def serve() -> None:
    """Runs in the process itself: a call for each line of standard input."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the call prints is no result
    module, function, warm_ups, arguments = json.loads(sys.argv[1])
    if "settings" in arguments:
        arguments["settings"] = Settings(**arguments["settings"])
    call = getattr(importlib.import_module(module), function)(**arguments)
    for _ in range(warm_ups):
        call()
    highest = peak_memory()
    with contextlib.suppress(OSError, AttributeError):  # glibc only: memory that compilation gave back
        ctypes.CDLL(None).malloc_trim(0)
    for _ in sys.stdin:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        began = time.perf_counter()
        call()
        seconds, peak = time.perf_counter() - began, peak_memory()
        highest = max(highest, peak)
        result = {"seconds": seconds, "peak": peak, "process_peak": highest}
        print(json.dumps(result), file=results, flush=True)


def peak_memory() -> float:
    """Returns bytes, of the accelerator where JAX has one; a PyTorch process loads no JAX to ask it."""
    device = sys.modules["jax"].devices()[0] if "jax" in sys.modules else None
    if device is not None and device.platform != "cpu":
        return device.memory_stats()["peak_bytes_in_use"]
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
