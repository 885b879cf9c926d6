"""One train step in a fresh process, `python -m a3_jax.benchmarks.worker`: its peak memory, or when asked.

On CPU the peak resident set: the kernel's high-water mark, put back to the present size before each
step once compilation and warm-up are over. On accelerators the device's own count.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from a3_jax.benchmarks.measurement import MeasurementError
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows, thread_count

WARM_UPS = 2
_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Bytes.

    Attributes:
      steps: the peak during each step after the warm-up.
      process: the peak of the whole process, from its start.
    """

    steps: list[float]
    process: float


def measure_apart(kind: str, settings: Settings, length: int, batch: int) -> Peaks:
    """The peak memory of a kind of step, in a process of its own.

    Args:
      kind: a name of `KINDS`.
      settings: `repeats` counts the steps after the warm-up.

    Raises:
      MeasurementError: the process failed (out of memory, for one).
    """
    task = {"kind": kind, "settings": dataclasses.asdict(settings), "length": length, "batch": batch}
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(task)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        raise MeasurementError(f"{kind} at length {length}: exit status {done.returncode} {last[0]}".strip())
    return Peaks(**json.loads(done.stdout.splitlines()[-1]))


class StepApart:
    """A step in a process of its own; a call makes one, and returns when it is done.

    Two contenders in one process would share an allocator and leave each other their idle threads.

    Args:
      kind, settings, length, batch: as for `measure_apart`.

    Raises:
      MeasurementError: from a call too: the process has failed.
    """

    def __init__(self, kind: str, settings: Settings, length: int, batch: int):
        task = {"kind": kind, "settings": dataclasses.asdict(settings), "length": length, "batch": batch}
        self._name = f"{kind} at length {length}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed on exit, with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(task | {"serve": True})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def __call__(self) -> None:
        process = self._process
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print("step", file=process.stdin, flush=True)
        if process.stdout.readline() != "done\n":
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or [""]
            raise MeasurementError(f"{self._name}: exit status {process.wait()} {last[0]}".strip())

    def __enter__(self) -> "StepApart":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()  # the end of its input ends it
        self._errors.close()


def _serve(kind, settings, length, batch) -> None:
    """Steps for `StepApart`: one a line of standard input."""
    step = KINDS[kind](settings, length, batch)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


def _two_stream(settings, length, batch):
    return _jax_step(settings, length, batch, "any_order")


def _ar(settings, length, batch):
    return _jax_step(settings, length, batch, "ar")


def _two_stream_release(settings, length, batch):
    return _jax_step(settings, length, batch, "any_order", residual="release")


def _jax_step(settings, length, batch, objective, residual="standard"):
    from a3_jax.benchmarks.steps import Steps

    rows = sort_rows(draw_rows(settings, length, batch, objective))
    return Steps(settings, settings.model(length, residual)).compile(rows, objective)


def _release(settings, length, batch):
    from a3_jax.benchmarks.torch_steps import load_release, release_step

    rows = draw_rows(settings, length, batch)
    module = load_release(settings.release)
    return release_step(module, settings.model(length, "release"), rows, thread_count(), settings.seed)


KINDS: dict[str, Callable[..., Callable[[], Any]]] = {
    "two_stream": _two_stream,
    "ar": _ar,
    "two_stream_release": _two_stream_release,
    "release": _release,
}


def _run(kind, settings, length, batch) -> Peaks:
    step = KINDS[kind](settings, length, batch)
    for _ in range(WARM_UPS):
        step()
    device = _accelerator()
    if device is not None:
        peaks = [_device_peak(device, step) for _ in range(settings.repeats)]
        return Peaks(steps=peaks, process=max(peaks))
    before = resident_peak()
    with contextlib.suppress(OSError, AttributeError):  # glibc only: memory that compilation gave back
        ctypes.CDLL(None).malloc_trim(0)
    peaks = []
    for _ in range(settings.repeats):
        with contextlib.suppress(OSError), open(_CLEAR, "w") as file:
            file.write("5")
        step()
        peaks.append(resident_peak())
    return Peaks(steps=peaks, process=max(before, *peaks))


def _accelerator():
    """The device whose memory counts; None on CPU. A PyTorch step loads no JAX: asking would add to it."""
    if "jax" not in sys.modules:
        return None
    import jax

    device = jax.devices()[0]
    return None if device.platform == "cpu" else device


def _device_peak(device, step) -> float:
    step()
    return device.memory_stats()["peak_bytes_in_use"]


def resident_peak() -> float:
    """Bytes. `ru_maxrss` would not do on Linux: a process inherits that of the one that started it."""
    if os.path.exists(_STATUS):
        with open(_STATUS, encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return 1024.0 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> int:
    task = json.loads(sys.argv[1])
    settings = Settings(**task.pop("settings"))
    if task.pop("serve", False):
        _serve(settings=settings, **task)
    else:
        print(json.dumps(dataclasses.asdict(_run(settings=settings, **task))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
