"""Meshes, and the rules that map logical axis names to mesh axes."""

import dataclasses
import math
import re

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

DEFAULT_RULES = (
    ("batch", ("data", "fsdp")),
    ("length", "context"),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
)


def parse_mesh(text: str) -> dict[str, int]:
    """``'data=2,fsdp=2,tensor=2'`` to sizes by axis name; missing axes have size 1.

    Raises:
        ValueError: unknown axis name, or a size that is not a positive integer.
    """
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name not in sizes:
            raise ValueError(
                f"unknown mesh axis {name!r}: use {', '.join(MESH_AXES)}, as in data=2,tensor=4."
            )
        if not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"mesh axis {name} needs a positive size, as in {name}=2, got {size!r}."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int] | str = "", devices: list | np.ndarray | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor, context over ``devices`` (default: all of them).

    Raises:
        ValueError: the product of the sizes is not the number of devices.
    """
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else sizes
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = math.prod(shape)
    if needed > devices.size or (needed != devices.size and needed != 1):
        raise ValueError(
            f"the mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {needed} devices but "
            f"there are {devices.size}: change --mesh so that the sizes multiply to {devices.size}."
        )
    # A Mesh built directly has automatic axes; jax.make_mesh would make them explicit.
    return Mesh(devices.reshape(-1)[:needed].reshape(shape), MESH_AXES)


def mesh_in_force() -> AbstractMesh | None:
    """The mesh that the program is traced under (``jax.set_mesh``).

    None where there is nothing to divide: no mesh, one device, or inside ``shard_map``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types
    return mesh if divided else None


def dividing(mesh: AbstractMesh, logical: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes of a logical one in the default rules if they divide ``size``.

    None, replicated, if they do not or have size 1.
    """
    wanted = dict(DEFAULT_RULES)[logical]
    names = (wanted,) if isinstance(wanted, str) else wanted
    names = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis name to mesh axis (or axes), with regex overrides on parameter names.

    ``overrides`` are pairs (regex, mesh axes per dimension); the first whose regex is found in the
    parameter's name wins, as ``(r"\\.embed$", ("tensor", None))``.
    """

    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = DEFAULT_RULES
    overrides: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    def partition_spec(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, name: str = ""
    ) -> PartitionSpec:
        """The spec for a value with these logical axes.

        A dimension that its mesh axes do not divide is replicated: small models keep odd sizes.

        Raises:
            ValueError: two dimensions of one value map to the same mesh axis.
        """
        table = dict(self.rules)
        wanted = [table.get(axis) if axis else None for axis in axes]
        for pattern, override in self.overrides:
            if re.search(pattern, name):
                wanted = list(override)
                break
        if len(wanted) != len(shape):
            raise ValueError(
                f"the sharding override for {name} has {len(wanted)} entries for shape {shape}."
            )
        used: set[str] = set()
        spec = []
        for size, target in zip(shape, wanted, strict=True):
            names = (target,) if isinstance(target, str) else tuple(target or ())
            names = tuple(n for n in names if mesh.shape[n] > 1)
            if size % math.prod(mesh.shape[n] for n in names):
                names = ()
            if clash := used.intersection(names):
                raise ValueError(
                    f"{name or axes} would use mesh axis {sorted(clash)[0]} twice: "
                    "change the rules."
                )
            used.update(names)
            spec.append(names[0] if len(names) == 1 else names or None)
        return PartitionSpec(*spec)

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
    ) -> NamedSharding:
        """The ``NamedSharding`` of a value with these logical axes."""
        return NamedSharding(mesh, self.partition_spec(axes, shape, mesh))
