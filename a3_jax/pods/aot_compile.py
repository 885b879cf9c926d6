"""Ahead-of-time compilation for a TPU topology that is not attached, and what the compiler reports."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from a3_jax.errors import EXIT_FAILED, InputError, RunError
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import axis_parts, batch_sharding
from a3_jax.model.two_stream import abstract_params, param_shardings
from a3_jax.pods.spec import COMPILER_FLAGS
from a3_jax.training.config import RunConfig
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.setup import make_model, sharded_state, step_arguments, with_shardings
from a3_jax.training.step import make_reset, make_train_step, step_kind

# What libtpu needs to compile where there is no TPU, and where others compile at the same time.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}
# Where there is none it would ask for its host in vain, and complain.
_NO_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}


def topology_devices(topology: str, slices: int = 1) -> list:
    """Returns the chips of a TPU topology, as descriptions that the compiler takes for devices.

    Args:
      topology: such as "v5e:4x4" or "v5p:4x4x4".
      slices: how many of them, joined by the data-centre network.
    """
    wanted = _ENVIRONMENT | (_NO_HOST if os.environ.get("JAX_PLATFORMS") == "cpu" else {})
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except Exception as error:  # libtpu's own kinds, whose first line says what is wrong
        raise InputError(f"{topology!r}: {str(error).splitlines()[0]}", field="topology") from error
    return list(described.devices)


def compile_step(
    run: RunConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    objective: str,
    content_loss_weight: float = 0.0,
) -> Any:
    """Compiles the step that `training.train` would run on this mesh; nothing is computed.

    Args:
      run: batch, length, dtype, remat, attention and optimiser are read.
      model: the run's.
      mesh: made by `setup.open_mesh`, over present devices or those of `topology_devices`.
      objective, content_loss_weight: the stage's.

    Returns:
      `jax.stages.Compiled`.
    """
    optimizer = make_optimizer(run.optimizer, **run.optimizer_options)
    step = make_train_step(
        make_model(run, model), optimizer, mesh,
        objective=objective, microbatches=run.microbatches, content_loss_weight=content_loss_weight,
    )  # fmt: skip
    arguments = step_arguments(run, model, mesh)
    with jax.set_mesh(mesh):  # for lowering alone: no array can be made on chips that are not there
        return step.lower(*arguments).compile()


# A program of its own: an unknown flag ends the process that compiles.
_PROBE = """
import sys, jax, jax.numpy as jnp
from a3_jax.pods.aot_compile import topology_devices
place = jax.sharding.SingleDeviceSharding(topology_devices(sys.argv[1])[0])
jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=place)).compile()
"""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_PROBE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program, as the compiler accounts for it on each chip.

    Attributes:
      name: the program's.
      arguments, outputs, aliases, temporaries, code: bytes; outputs that take the place
        of an argument are aliases.
      total: bytes at the peak; of a program that was refused the temporaries alone, as far as told.
      refused: why it does not fit, in the compiler's words; empty if it does.
      seconds: of compiling.
      text: the optimised program; empty if it was refused, or can't be read: a libtpu newer than jaxlib may
        use what this one doesn't know.
    """

    name: str
    arguments: int = 0
    outputs: int = 0
    aliases: int = 0
    temporaries: int = 0
    code: int = 0
    total: int = 0
    refused: str = ""
    seconds: float = 0.0
    text: str = dataclasses.field(default="", repr=False)

    @property
    def bytes(self) -> dict[str, int]:
        """The figures by name."""
        names = ("arguments", "outputs", "aliases", "temporaries", "code", "total")
        return {name: getattr(self, name) for name in names}


def check_flags(topology: str) -> None:
    """Tries the compiler's flags of the environment on a small program, in a process of its own."""
    given = {name: os.environ[name] for name in COMPILER_FLAGS if os.environ.get(name)}
    if not given:
        return
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, topology],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, errors="replace",
        check=False, timeout=_PROBE_SECONDS,
    )  # fmt: skip
    if not done.returncode:
        return
    for name, flags in given.items():
        for flag in flags.split():
            stem = flag.lstrip("-").split("=")[0]
            if re.search(rf"[^\n]*\b{re.escape(stem)}\b", done.stderr):
                raise InputError(f"the compiler does not take {flag!r}", field=name)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    raise InputError(f"the compiler ends at {said[-1] if said else done.returncode!r}", field="/".join(given))


def compile_program(name: str, make: Callable[[], Any]) -> Compiled:
    """Compiles a program and reads the compiler's account.

    Args:
      name: of it.
      make: gives a `jax.stages.Compiled`.

    Raises:
      RunError: the compiler fails for another reason than memory.
    """
    start = time.perf_counter()
    try:
        compiled = make()
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
            raise RunError(EXIT_FAILED, f"{name}: the compiler: {said.splitlines()[0]}") from error
        why, needed = _refusal(said)
        seconds = time.perf_counter() - start
        return Compiled(name, temporaries=needed, total=needed, refused=why, seconds=seconds)
    m = compiled.memory_analysis()
    arguments, outputs, aliases = m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes
    temporaries, code = m.temp_size_in_bytes, m.generated_code_size_in_bytes
    return Compiled(
        name, arguments, outputs, aliases, temporaries, code,
        total=arguments + outputs - aliases + temporaries + code,
        seconds=time.perf_counter() - start, text=_text(compiled),
    )  # fmt: skip


def _text(compiled) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return ""


def _refusal(said: str) -> tuple[str, int]:
    """Returns the compiler's line about memory, and the bytes that it needs at least; 0 if it doesn't say."""
    line = next((line for line in said.splitlines() if "Ran out of memory" in line), said.splitlines()[0])
    needed = re.search(r"temporaries \(([\d.]+)([KMG]?)\)|Used ([\d.]+)([KMG]?)\w* of", said)
    if not needed:
        return line.strip()[:300], 0
    number, unit = (text for text in needed.groups() if text is not None)
    return line.strip()[:300], round(float(number) * _UNITS[unit])


Makers = dict[str, Callable[[], Any]]  # name -> a function that gives a `jax.stages.Compiled`


def train_programs(run: RunConfig, model: ModelConfig, mesh) -> Makers:
    """Each kind of step that the stages have: "train OBJECTIVE", with its content loss if it has one."""

    def maker(objective, weight):
        return lambda: compile_step(run, model, mesh, objective, weight)

    return {
        f"train {objective}" + (f" + {weight:g} content" if weight else ""): maker(objective, weight)
        for objective, weight in sorted({step_kind(stage) for stage in run.stages})
    }


def other_programs(run: RunConfig, model: ModelConfig, mesh, names: Sequence[str]) -> Makers:
    """Those of "decode", "fingerprint" and "restore" that are named."""
    makers = {"decode": _decode, "fingerprint": _fingerprint, "restore": _restore}
    return {name: lambda name=name: makers[name](run, model, mesh) for name in names}


def _fingerprint(run, model, mesh):
    """Returns the checksums of a checkpoint's arrays, over the whole state at once."""
    from a3_jax.checkpoints import fingerprint

    return fingerprint._sums.lower(jax.tree.leaves(sharded_state(run, model, mesh))).compile()


def _restore(run, model, mesh):
    """Compiles what may follow a restored state: a fresh optimiser at the beginning of a stage.

    Reading itself is no program: arrays go to the chips as they are.
    """
    optimizer = make_optimizer(run.optimizer, **run.optimizer_options)
    reset = make_reset(optimizer, make_model(run, model), mesh)
    state = sharded_state(run, model, mesh)
    with jax.set_mesh(mesh):
        return reset.lower(state).compile()


def _decode(run, model, mesh):
    """`a3 generate` in bfloat16 with its defaults: a text a part of the batch axis, half of it blank."""
    from a3_jax.decoding.batched_decode import first_state, make_decode_spec
    from a3_jax.decoding.loop import decode
    from a3_jax.decoding.options import GenerateOptions

    options, columns = GenerateOptions(dtype="bfloat16"), run.seq_len
    group = min(options.group_size, columns)
    spec = make_decode_spec(model, options, None, (columns, max(1, columns // 2), group, group))
    params = with_shardings(abstract_params(model, jnp.bfloat16), param_shardings(mesh, model))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: first_state([], columns, axis_parts("batch"), 0))
        state = with_shardings(state, jax.tree.map(lambda _: batch_sharding(mesh), state))
        return decode.lower(params, state, spec=spec).compile()
