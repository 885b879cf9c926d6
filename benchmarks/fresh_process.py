"""Work in a process of its own, done on request: its seconds and its peak memory.

On CPU the peak is the resident set: the kernel's high-water mark, set back to the present size before each
call. On accelerators it is the device's own count, from the start of the process.
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

from benchmarks.measurement import MeasurementError, last_line
from benchmarks.settings import Settings

ROOT = str(pathlib.Path(__file__).parent.parent)
CHILD = f"import sys; sys.path.insert(0, {ROOT!r}); from benchmarks.fresh_process import serve; serve()"


@contextlib.contextmanager
def fresh_process(name: str, maker: Callable[..., Callable], warm_ups: int = 1, **arguments):
    """Starts a process that makes a call of its own; yields a call that has it called there.

    Two contenders in one process would share an allocator and leave each other their idle threads. What is
    yielded returns the "seconds" of a call, its "peak" and that of the whole process so far, in bytes.

    Args:
      name: what errors call it.
      maker: a function of a module, which returns the call.
      warm_ups: calls before the first on request.
      arguments: those of `maker`: plain JSON, or `Settings`.

    Raises:
      MeasurementError: from a call: the process has failed (out of memory, for one).
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
                raise MeasurementError(f"{name}: exit status {status} {last_line(errors.read())}".strip())
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
    if "jax" in sys.modules:
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return device.memory_stats()["peak_bytes_in_use"]
    return resident_peak()


def resident_peak() -> float:
    """Returns bytes. On Linux `ru_maxrss` is inherited from the process that started this one."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="ascii") as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    import resource

    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
