"""`a3 bench compile`: a config's train step compiled for a TPU topology, on any machine: memory a chip."""

import time

from a3_jax.benchmarks.measurement import Row, note
from a3_jax.benchmarks.settings import Settings
from a3_jax.errors import InputError
from a3_jax.model.accelerators import count_chips, find_accelerator
from a3_jax.training.ahead import compile_step, topology_devices
from a3_jax.training.command import read_config
from a3_jax.training.config import RunConfig, model_config
from a3_jax.training.loop import step_kind
from a3_jax.training.run import open_mesh


def measure(settings: Settings) -> list[Row]:
    """Bytes a chip by the compiler's account, beside the chip's memory, and the seconds it took.

    Raises:
      InputError: no config or topology, or a mesh that does not fit.
    """
    run = RunConfig.from_config(read_config(_given(settings.config, "--config"), list(settings.overrides)))
    chips = topology_devices(_given(settings.topology, "--topology"))
    mesh = open_mesh(run, chips)
    note(f"compile: {settings.config} for {settings.topology}: minutes")
    start = time.perf_counter()
    compiled = compile_step(run, model_config(run), mesh, *step_kind(run.stages[-1]))
    seconds = time.perf_counter() - start
    setting = {
        "config": settings.config, "topology": settings.topology, "chips": count_chips(chips),
        "batch": run.batch_size, "microbatches": run.microbatches, "length": run.seq_len, "remat": run.remat,
        "attention": run.attention, "mesh": ", ".join(f"{a} {n}" for a, n in mesh.shape.items() if n > 1),
    }  # fmt: skip
    memory = compiled.memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = resident + memory.temp_size_in_bytes
    rows = {"state_and_batch": resident, "temporaries": memory.temp_size_in_bytes, "total": total}
    table = [Row(f"{name}_per_chip", "bytes", setting, [value]) for name, value in rows.items()]
    chip = find_accelerator(chips[0].device_kind)
    if chip is not None:
        table.append(Row("total_over_memory_of_the_chip", "ratio", setting, [total / chip.memory_bytes]))
    return [*table, Row("compile_time", "s", setting, [seconds])]


def _given(text: str | None, flag: str) -> str:
    if not text:
        raise InputError("is needed", field=flag)
    return text
