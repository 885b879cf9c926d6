"""Compiled programs that outlive the process: a run that goes on need not compile again."""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from a3_jax.paths import as_path

DIRECTORY = "A3_COMPILATION_CACHE"  # an environment variable: of one launch at a time, on one machine
# One process that finds a program waits in vain for another that doesn't, as two launches may bring about.
_ONCE = {"jax_share_binary_between_hosts": True, "jax_share_binary_between_hosts_timeout_ms": 600_000}
_EVERY_PROGRAM = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compilation_cache(directory: str, platform: str) -> Iterator[None]:
    """What is compiled meanwhile is kept in a directory, and taken from there by later processes.

    A directory that the user (`JAX_COMPILATION_CACHE_DIR`) or the program has set before stays. A
    place that can't be written is one warning, and no cache. Only process 0 writes: runs on several
    hosts want a directory that all of them see, such as a bucket's.

    Args:
      directory: local or in a bucket; "off" for none; empty for `a3_jax/xla` in the user's cache
        directory, but on a CPU for what A3_COMPILATION_CACHE names, or none: a program compiled for one
        CPU may crash on another that shares the home directory.
      platform: of the devices.
    """
    settings: dict[str, object] = dict(_EVERY_PROGRAM)
    if platform == "cpu" and not directory:
        directory = os.environ.get(DIRECTORY, "off")
        if directory != "off" and _name_programs_alike():
            settings |= _ONCE
    names = [*settings, "jax_compilation_cache_dir"]
    before = {name: getattr(jax.config, name) for name in names}
    if before["jax_compilation_cache_dir"] or directory == "off":
        yield
        return
    path = as_path(directory or default_directory())
    reason = _unwritable(path)
    if reason:
        print(f"warning: compiled programs are not kept: {reason}", file=sys.stderr)
        yield
        return
    try:
        _set(settings | {"jax_compilation_cache_dir": str(path)})
        yield
    finally:
        _set(before)


def default_directory() -> str:
    """`$XDG_CACHE_HOME/a3_jax/xla`, under `~/.cache` where that isn't set."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "a3_jax", "xla")


def _name_programs_alike() -> bool:
    """Lets the CPU processes of a run find what process 0 has kept; whether that can be.

    JAX names a program by the topology that a process sees, among other things, and the CPU's says which
    process that is. All others then find nothing, and, as only process 0 writes, compile at every start.
    """
    from jax._src import cache_key  # nothing public names a program

    if not hasattr(cache_key, "_hash_accelerator_config") or not hasattr(cache_key, "_hash_devices"):
        return False
    cache_key._hash_accelerator_config = cache_key._hash_devices
    return True


def _unwritable(path) -> str:
    """Why nothing can be written in a directory, which is made; empty if it can."""
    probe = path / f"probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except Exception as error:  # a bucket's client raises its own kinds; no run fails for want of a cache
        return f"{path}: {error}"
    return ""


def _set(settings) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX opens a cache once, and keeps to that directory
