"""Starts runs of one or several processes, watches what they write, and hurts them.

Processes are forked from one that has imported everything and touched no device: a start costs no
imports. Compiled programs are shared through a cache, and so are prepared rows: to open text takes longer
than all steps.
"""

import json
import multiprocessing
import os
import pathlib
import socket
import sys
import time

from tests import prepared_fixtures

CONFIG = str(pathlib.Path(__file__).parent / "config.py")
PRELOAD = ["a3_jax.cli", "a3_jax.training.run", "a3_jax.data.feature_converter", "a3_jax.data.tasks",
           "a3_jax.data.prepared", "a3_jax.decoding.filling", "tests.drills.harness"]  # fmt: skip
TIMEOUT = 240  # seconds, of anything that a healthy machine does in ten

TOKENS, LAST_STEP = 24, 16  # rows of an example, steps of the drills' config

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


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
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={self.devices}"
                " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
                "JAX_COMPILATION_CACHE_DIR": self._cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "A3_DRILL": (drills or {}).get(process, drill),
            }
            if self.processes > 1:
                env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                        "A3_NUM_PROCESSES": str(self.processes), "A3_PROCESS_ID": str(process)}  # fmt: skip
            arguments = ["train", f"--config={CONFIG}", f"--workdir={self.workdir}", *self._overrides,
                         *overrides, *(overrides_of or {}).get(process, ())]  # fmt: skip
            child = context.Process(target=_child, args=(arguments, env, str(self.log(process))))
            child.start()
            self.children.append(child)
        return self

    def log(self, process=0):
        return self.workdir / "logs" / f"process-{process}.log"

    def wait(self, timeout=TIMEOUT):
        """The exit statuses, negative for signals; a process that is still there fails the drill."""
        end = time.monotonic() + timeout
        for child in self.children:
            child.join(max(0.0, end - time.monotonic()))
        alive = [process for process, child in enumerate(self.children) if child.exitcode is None]
        assert not alive, f"processes {alive} didn't end in {timeout} s\n{self.told()}"
        return [child.exitcode for child in self.children]

    def finish(self):
        """Starts, waits, and expects success."""
        self.start()
        assert self.wait() == [0] * self.processes, self.told()
        return self

    def kill(self, process, signal):
        os.kill(self.children[process].pid, signal)

    def end(self):
        for child in self.children:
            if child.exitcode is None:
                child.kill()
                child.join()

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
            assert not alive or any(child.exitcode is None for child in self.children), self.told()
            time.sleep(0.02)
        return self

    def wait_for_step(self, step):
        return self.wait_for(lambda: any(row["step"] >= step for row in self.events("step")))

    def told(self):
        """What all processes have printed."""
        logs = sorted((self.workdir / "logs").glob("*"))
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)


def _child(arguments, env, log):
    os.setsid()
    os.environ.update(env)
    import jax

    jax.config.update("jax_platforms", env["JAX_PLATFORMS"])  # read when jax was imported
    jax.config.update("jax_compilation_cache_dir", env["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["a3", *arguments]
    from a3_jax.cli import console

    status = console()
    sys.stdout.flush()
    sys.stderr.flush()
    from a3_jax.training.processes import leave

    leave(status)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
