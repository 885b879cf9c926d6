"""What the TPU compiler says of a run's programs, each compiled for chips that need not be there."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from a3_jax.errors import EXIT_FAILED, InputError, RunError
from a3_jax.pods.spec import COMPILER_FLAGS

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
    """Tries the compiler's flags of the environment on a small program, in a process of its own.

    Raises:
      InputError: a flag that is unknown, or a value that can't be.
    """
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
