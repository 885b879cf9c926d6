"""Which mesh axis each logical axis lies on: one table, and the mesh itself."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from a3_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. () means replicated; an axis that is absent here is an error."""

    batch: tuple = ("data", "fsdp")
    length: tuple = ()
    embed_act: tuple = ()  # the model width of activations
    vocab: tuple = ("tensor",)
    embed: tuple = ("fsdp",)  # the model width of weights
    heads: tuple = ("tensor",)
    kv_heads: tuple = ("tensor",)
    head_size: tuple = ()
    mlp: tuple = ("tensor",)
    norm: tuple = ()
    layers: tuple = ()


RULES = Rules()


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes.

    Raises:
      ValueError: an axis without a rule.
    """
    known = dataclasses.asdict(RULES)
    for axis in axes:
        if axis not in known:
            raise ValueError(f"logical axis {axis!r} has no sharding rule; known: {', '.join(known)}")
    return PartitionSpec(*(known[axis] or None for axis in axes))


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """The device mesh with axes data, fsdp and tensor.

    Args:
      sizes: devices along each axis, absent = 1; one may be -1, all that remain.
      devices: default all.

    Raises:
      InputError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": 1, "fsdp": -1, "tensor": 1} if sizes is None else dict(sizes)
    for axis in sizes:
        if axis not in MESH_AXES:
            raise InputError(f"unknown axis {axis!r}; known: {', '.join(MESH_AXES)}", field="mesh")
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"{sizes}: sizes are positive, but for one -1", field="mesh")
    given = math.prod(size for size in shape if size != -1)
    shape = [max(1, len(devices) // given) if size == -1 else size for size in shape]
    if math.prod(shape) != len(devices):
        raise InputError(
            f"{dict(zip(MESH_AXES, shape, strict=True))} does not match {len(devices)} devices", field="mesh"
        )
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)


def axes_shardings(mesh: Mesh, axes, shapes) -> object:
    """A `NamedSharding` for each array.

    Args:
      mesh: the devices.
      axes: tree of logical axis names (`two_stream.logical_axes`).
      shapes: the same tree of arrays or `ShapeDtypeStruct`s.

    Raises:
      InputError: a dimension that its mesh axes don't divide, by name.
    """

    def sharding(path, names, array):
        spec = partition_spec(names)
        for name, size in zip(names, array.shape, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in getattr(RULES, name))
            if size % parts:
                leaf = "/".join(str(key.key) for key in path)
                raise InputError(
                    f"{leaf}: axis {name} of size {size} can't be split in {parts}", field="mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        sharding, axes, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [B, ...] split over data and fsdp."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis lies on."""
    return getattr(RULES, axis)


def axis_parts(axis: str) -> int:
    """In how many parts the mesh of the context (`jax.set_mesh`) splits a logical axis; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def platform() -> str:
    """Of the context's mesh (`jax.set_mesh`), whose devices need not be there, or of the default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(array, axes: Sequence[str]):
    """Pins an array's layout inside a jitted function; nothing outside a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(axes))


def mesh_of(params) -> contextlib.AbstractContextManager:
    """The context of the mesh that parameters lie on: what runs in it is sharded like them."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, jax.NamedSharding) and sharding.mesh.size > 1:
        return jax.set_mesh(cast(Mesh, sharding.mesh))
    return contextlib.nullcontext()
