"""Starts runs of one or several processes, watches what they write, and hurts them.

Compiled programs are shared through a cache, and so are prepared rows: to open text takes longer than all
steps.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from a3_jax.pods.local import start_child
from tests import prepared_fixtures

CONFIG = str(pathlib.Path(__file__).parent / "config.py")
TIMEOUT = 240  # seconds, of anything that a healthy machine does in ten

TOKENS, LAST_STEP = 24, 16  # rows of an example, steps of the drills' config
A3 = (sys.executable, "-m", "a3_jax.cli")


def rows_beside(cache) -> str:
    """A prepared directory beside the cache; made once."""
    directory = pathlib.Path(f"{cache}-rows")
    if not directory.exists():
        directory.mkdir(parents=True)
        table, heldout = (prepared_fixtures.rows(*size, seq_len=TOKENS) for size in ((150,), (16,)))
        prepared_fixtures.make_prepared(directory, table, rows_a_shard=40, heldout=heldout)
    return str(directory)


class Run:
    """A training run in a directory; `start` again goes on."""

    def __init__(self, workdir, cache, *, processes=1, devices=2, overrides=()):
        self.workdir, self.processes, self.devices = pathlib.Path(workdir), processes, devices
        self._cache, self._overrides = str(cache), [f"--config.data={rows_beside(cache)}", *overrides]
        self.children = []

    def start(self, *, drill="", drills=None, overrides=(), overrides_of=None):
        """Starts its processes.

        Args:
          drill: a fault of `sabotage` in every process; `drills`: {process: fault}.
          overrides: more `--config.FIELD=VALUE`; `overrides_of`: {process: more of them}.
        """
        (self.workdir / "logs").mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.children = []
        for process in range(self.processes):
            env = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}"
                " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
                "A3_COMPILATION_CACHE": self._cache,
                "A3_DRILL": (drills or {}).get(process, drill),
            }
            if self.processes > 1:
                env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                        "A3_NUM_PROCESSES": str(self.processes), "A3_PROCESS_ID": str(process)}  # fmt: skip
            arguments = ["train", f"--config={CONFIG}", f"--workdir={self.workdir}", *self._overrides,
                         *overrides, *(overrides_of or {}).get(process, ())]  # fmt: skip
            with open(self.log(process), "ab") as log:
                self.children.append(start_child([*A3, *arguments], env, log))
        return self

    def log(self, process=0):
        return self.workdir / "logs" / f"process-{process}.log"

    def wait(self, timeout=TIMEOUT):
        """The exit statuses, negative for signals; a process that is still there fails the drill."""
        end = time.monotonic() + timeout
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))
        alive = [process for process, child in enumerate(self.children) if child.poll() is None]
        assert not alive, f"processes {alive} didn't end in {timeout} s\n{self.told()}"
        return [child.poll() for child in self.children]

    def finish(self):
        """Starts, waits, and expects success."""
        self.start()
        assert self.wait() == [0] * self.processes, self.told()
        return self

    def kill(self, process, number):
        self.children[process].send_signal(number)

    def end(self):
        for child in self.children:
            child.send_signal(signal.SIGKILL)
            child.wait()

    def rows(self, name="metrics.jsonl"):
        file = self.workdir / name
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def events(self, name):
        return [row for row in self.rows("events.jsonl") if row["event"] == name]

    def wait_for(self, what, timeout=TIMEOUT, alive=True):
        """Until `what()` is true, while a process of it is alive if it has to be."""
        end = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < end, f"waited in vain\n{self.told()}"
            assert not alive or any(child.poll() is None for child in self.children), self.told()
            time.sleep(0.02)
        return self

    def wait_for_step(self, step):
        return self.wait_for(lambda: any(row["step"] >= step for row in self.events("step")))

    def told(self):
        """What all processes have printed."""
        logs = sorted((self.workdir / "logs").glob("*"))
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
