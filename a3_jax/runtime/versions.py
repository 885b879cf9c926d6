"""The software that decides what a run computes and what a checkpoint holds."""

import contextlib
import importlib.metadata
import pathlib
import platform
import zlib

_LIBRARIES = ("a3_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def software_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that decide what a checkpoint holds."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def software() -> dict[str, str]:
    """Returns what must be equal on all processes: the versions, and a checksum of this package's code."""
    checksum, package = 0, pathlib.Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        checksum = zlib.crc32(str(path.relative_to(package)).encode(), checksum)
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return {"code": f"{checksum:08x}", **software_versions()}
