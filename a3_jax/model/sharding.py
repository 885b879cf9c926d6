"""The mesh, and one table of the mesh axes that split each logical axis."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
from jax.experimental import mesh_utils
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
    """Returns the mesh axes of an array with these logical axes; `ValueError` for an axis without a rule."""
    known = dataclasses.asdict(RULES)
    for axis in axes:
        if axis not in known:
            raise ValueError(f"logical axis {axis!r} has no sharding rule; known: {', '.join(known)}")
    return PartitionSpec(*(known[axis] or None for axis in axes))


def make_mesh(sizes: Mapping[str, int] | None = None, devices=None, slices_are_processes=False) -> Mesh:
    """Makes the device mesh with axes data, fsdp and tensor.

    Within a slice devices that are neighbours along an axis are neighbours on its network (ICI). Of several
    slices, which the data-centre network joins, the data axis alone goes from one to the next, outermost:

        sizes {"data": 4, "fsdp": 2}, two slices of 4 chips

                 fsdp
        data   s0c0 s0c1     one sum of gradients per step crosses between s0 and s1;
               s0c2 s0c3     parameters are gathered within each
               s1c0 s1c1
               s1c2 s1c3

    Args:
      sizes: devices along each axis, absent = 1; one may be -1, all that remain.
      devices: default all.
      slices_are_processes: whether each process counts as a slice, as on CPUs, which have none.

    Raises:
      InputError: an unknown axis, sizes whose product is not the number of devices, a data axis that the
        slices don't divide, or axes that can't be laid out on a slice's network.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _shape({"data": 1, "fsdp": -1, "tensor": 1} if sizes is None else sizes, len(devices))
    slices = number_of_slices(devices, slices_are_processes)
    if shape[0] % slices:
        message = f"data is {shape[0]}: on {slices} slices it must be a multiple of {slices}, as it alone"
        raise InputError(f"{message} goes from one to the next", field="mesh")
    try:
        if slices == 1:
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            placed = mesh_utils.create_hybrid_device_mesh(
                (shape[0] // slices, *shape[1:]), (slices, 1, 1), devices,
                process_is_granule=slices_are_processes, allow_split_physical_axes=True,
            )  # fmt: skip
    except (AssertionError, NotImplementedError, ValueError) as error:  # holes, odd sizes, unequal slices
        message = f"{dict(zip(MESH_AXES, shape, strict=True))} can't be laid out on these devices"
        raise InputError(f"{message}: {str(error).splitlines()[0]}", field="mesh") from error
    return Mesh(placed, MESH_AXES)


def number_of_slices(devices: Sequence, slices_are_processes=False) -> int:
    """Counts the TPU slices of devices; `slices_are_processes` as in `make_mesh`. Others have one."""
    if slices_are_processes:
        return len({device.process_index for device in devices})
    on_tpu = (device for device in devices if device.platform == "tpu")
    return len({getattr(device, "slice_index", None) for device in on_tpu}) or 1


def _shape(sizes: Mapping[str, int], devices: int) -> list[int]:
    """Returns `sizes` in the order of the axes, without -1; checked."""
    for axis in sizes:
        if axis not in MESH_AXES:
            raise InputError(f"unknown axis {axis!r}; known: {', '.join(MESH_AXES)}", field="mesh")
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"{dict(sizes)}: sizes are positive, but for one -1", field="mesh")
    given = math.prod(size for size in shape if size != -1)
    shape = [max(1, devices // given) if size == -1 else size for size in shape]
    if math.prod(shape) != devices:
        raise InputError(
            f"{dict(zip(MESH_AXES, shape, strict=True))} does not match {devices} devices", field="mesh"
        )
    return shape


def axes_shardings(mesh: Mesh, axes, shapes) -> object:
    """Returns a `NamedSharding` for each array of a tree.

    Args:
      mesh: the devices.
      axes: tree of logical axis names (`two_stream.logical_axes`).
      shapes: the same tree of arrays or `ShapeDtypeStruct`s.
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
    """Splits rows [B, ...] over data and fsdp."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def mesh_axes(axis: str) -> tuple[str, ...]:
    """Returns the mesh axes that split a logical axis."""
    return getattr(RULES, axis)


def axis_parts(axis: str) -> int:
    """Returns the number of parts of a logical axis on the mesh of the context (`jax.set_mesh`); else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def on_each_device(function: Callable, in_axes, out_axes, sizes: Mapping[str, int]) -> Callable:
    """Maps a function over each device's part of its arrays, on the mesh of the context.

    Args:
      function: of arrays, to one array; it communicates nothing.
      in_axes: logical axes of each argument.
      out_axes: logical axes of the result.
      sizes: logical axis -> its size, for those along which the mesh may split the arrays.

    Returns:
      The mapped function; `function` itself without a mesh, or where the mesh doesn't divide a size.
    """
    parts = {axis: axis_parts(axis) for axis in sizes}
    if math.prod(parts.values()) == 1 or any(size % parts[axis] for axis, size in sizes.items()):
        return function
    specs = tuple(map(partition_spec, in_axes))
    return jax.shard_map(function, in_specs=specs, out_specs=partition_spec(out_axes), check_vma=False)


def platform() -> str:
    """Returns the platform of the context's mesh, whose devices may be absent, or of the default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts the same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(array, axes: Sequence[str]):
    """Pins an array's layout inside a jitted function; nothing outside a mesh (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, partition_spec(axes))


def mesh_of(params) -> contextlib.AbstractContextManager:
    """Returns the context of the mesh that parameters are on: what runs in it is sharded like them."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, jax.NamedSharding) and sharding.mesh.size > 1:
        return jax.set_mesh(cast(Mesh, sharding.mesh))
    return contextlib.nullcontext()
