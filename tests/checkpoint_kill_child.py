"""`python -m tests.checkpoint_kill_child CACHE RUN...`: saves step 2 of each run, killed while it does.

One process imports everything; for each run it forks a child, before jax has a backend. A child that is
to die after a share of the time that a save takes learns that time from the first one, which lives.
"""

import os
import signal
import sys
import threading
import time

import jax

import tests.conftest  # noqa: F401  as in the tests
from a3_jax import paths
from a3_jax.checkpoints import step_writer
from tests.checkpoint_fixtures import save

SHARES = [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.05]
CALLS = [  # before the nth call of a function in the save, in whichever thread
    (step_writer, "start_fingerprints", 0),
    (step_writer, "list_files", 0),
    (step_writer, "read_checksums", 0),
    (step_writer, "write_manifest", 0),
    (paths.uuid, "uuid4", 0),  # for the manifest's temporary file
    (step_writer.StepWriter, "_prune", 0),
    (step_writer, "_remove", 0),  # of step 0, which is one too many
    (step_writer.ocp.StandardCheckpointHandler, "finalize", 0),
    (step_writer.ocp.StandardCheckpointHandler, "finalize", 1),
]
MOMENTS = [*SHARES, *CALLS]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(owner, name, calls):
    function, count = getattr(owner, name), iter(range(calls, -2, -1))

    def counted(*args, **kwargs):
        if next(count, -1) == 0:
            die()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def child(run, moment, seconds):
    """Saves once to warm up (step 1, if it isn't there), then step 2."""
    with step_writer.StepWriter(run, keep=2) as writer:
        for step in (0, 1):
            save(writer, step)
        writer.wait()
        if isinstance(moment, tuple):
            die_in(*moment)
        began = time.monotonic()
        if isinstance(moment, float):
            threading.Timer(moment * seconds, die).start()
        save(writer, 2)
        writer.wait()
    return time.monotonic() - began


def main(cache, *runs):
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    reader, pipe = os.pipe()
    seconds = None
    for run, moment in zip(runs, [None, *MOMENTS]):
        process = os.fork()
        if not process:
            taken = child(run, moment, seconds)
            os.write(pipe, str(taken).encode())
            os._exit(0)
        os.waitpid(process, 0)
        if seconds is None:
            seconds = float(os.read(reader, 100))


if __name__ == "__main__":
    main(*sys.argv[1:])
