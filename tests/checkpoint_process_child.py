"""`python -m tests.checkpoint_process_child PORT NUMBER RUN`: one of two processes that save and restore.

Each goes through the same story, prints what it sees, one JSON object a line, and ends by itself.
"""

import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from a3_jax.checkpoints import step_writer, stored_arrays
from a3_jax.checkpoints.a3_format import list_steps
from a3_jax.checkpoints.manifest import DamagedCheckpoint
from a3_jax.checkpoints.step_writer import SaveFailed, StepWriter
from a3_jax.runtime.coordination import barrier
from tests.checkpoint_fixtures import META


def tree(mesh, step):
    values = np.random.default_rng(step).normal(size=(64, 128)).astype(np.float32)

    def place(array, spec):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda i: array[i])

    return {"split": place(values, P("a")), "whole": place(values[0], P())}


def state(mesh, step):
    return {"n": np.int64(step), "moments": tree(mesh, step + 100)}


def same(actual, expected):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected))
    parts = ([x.addressable_shards, y.addressable_shards] for x, y in pairs if isinstance(x, jax.Array))
    return all(np.array_equal(a.data, b.data) for x, y in parts for a, b in zip(x, y))


def try_to_save(writer, mesh, step):
    writer.save(step, tree(mesh, step), state(mesh, step), META)
    try:
        writer.wait()
    except SaveFailed as error:
        return str(error)


def try_to_restore(writer, mesh, **options):
    try:
        step, *trees = writer.restore_newest(tree(mesh, 0), state(mesh, 0), **options)
    except DamagedCheckpoint as damage:
        return str(damage)
    return step if same(trees, [tree(mesh, step), state(mesh, step)]) else "other values"


def full(*_, **__):
    raise OSError(28, "No space left on device")


async def full_later(handler, *args, **kwargs):
    class Failure:
        def result(self, timeout=None):
            full()

    return [*(await ASYNC_SAVE(handler, *args, **kwargs)), Failure()]


ASYNC_SAVE = ocp.StandardCheckpointHandler.async_save


def damage(run, step):
    file = max((run / str(step) / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


def story(run, mesh, second):
    """`second`: this is the process that has all the trouble."""
    with StepWriter(run, keep=2) as writer:
        for step in (1, 2, 3):
            yield "saved", try_to_save(writer, mesh, step)
        yield "again", writer.save(3, tree(mesh, 3), state(mesh, 3), META)
        yield "restored", try_to_restore(writer, mesh)
        if second:
            step_writer.read_checksums, read_checksums = full, step_writer.read_checksums
        yield "full", try_to_save(writer, mesh, 4)
        if second:
            step_writer.read_checksums = read_checksums
            ocp.StandardCheckpointHandler.async_save = full_later
        yield "full in orbax", try_to_save(writer, mesh, 4)
        ocp.StandardCheckpointHandler.async_save = ASYNC_SAVE
        yield "steps", list_steps(run)
        yield "saved", try_to_save(writer, mesh, 4)
        if not second:
            damage(run, 4)
        barrier("test")
        yield "restored", try_to_restore(writer, mesh)
        if second:
            check = stored_arrays.raise_damage

            def find_damage_alone(directory, *args, **kwargs):
                if directory.name == "5":
                    raise DamagedCheckpoint("seen by one alone", file=directory, step=5)
                check(directory, *args, **kwargs)

            stored_arrays.raise_damage = find_damage_alone
        yield "saved", try_to_save(writer, mesh, 5)
        yield "restored", try_to_restore(writer, mesh)
        yield "steps", list_steps(run)


def main(port, number, run):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
    mesh = jax.make_mesh((4,), ("a",))
    with jax.set_mesh(mesh):
        for what, seen in story(pathlib.Path(run), mesh, second=number == "1"):
            print(json.dumps([what, seen]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
