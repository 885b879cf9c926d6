"""Compiled programs that outlive the process: a run that goes on doesn't compile them again."""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from a3_jax.paths import as_path

DIRECTORY = "A3_COMPILATION_CACHE"  # an environment variable: the directory for CPU programs
_EVERY_PROGRAM: dict[str, object] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compilation_cache(directory: str, platform: str) -> Iterator[None]:
    """Keeps what is compiled inside the block in a directory, from which later processes take it.

    A directory that the user (`JAX_COMPILATION_CACHE_DIR`) or the program has set before stays in use. A
    directory that can't be written costs one warning, and nothing is kept. Only process 0 writes, so runs
    on several hosts need a directory that all of them see, such as one in a bucket. Several processes on
    CPUs keep nothing: JAX names their programs by process, so that only process 0 would find its own.

    Args:
      directory: local or in a bucket; "off" for none; empty for `a3_jax/xla` in the user's cache
        directory, but on a CPU for the directory that A3_COMPILATION_CACHE names, or none: a program
        compiled for one CPU may crash on another that shares the home directory.
      platform: that of the devices.
    """
    if platform == "cpu" and not directory:
        directory = os.environ.get(DIRECTORY, "off")
    if platform == "cpu" and jax.process_count() > 1:
        directory = "off"  # process 0 would not compile, and give up on the others, which do, after 30 s
    names = [*_EVERY_PROGRAM, "jax_compilation_cache_dir"]
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
        _set(_EVERY_PROGRAM | {"jax_compilation_cache_dir": str(path)})
        yield
    finally:
        _set(before)


def default_directory() -> str:
    """Returns `$XDG_CACHE_HOME/a3_jax/xla`, or `~/.cache/a3_jax/xla` if that variable isn't set."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "a3_jax", "xla")


def _unwritable(path) -> str:
    """Makes a directory; returns why nothing can be written there, or an empty string."""
    probe = path / f"probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except Exception as error:  # a bucket's client raises its own types; a missing cache ends no run
        return f"{path}: {error}"
    return ""


def _set(settings) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX opens a cache once, and keeps its directory
