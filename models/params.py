"""Parameters declared once, abstractly; everything else is derived.

A model writes ``specs(cfg)``: its parameter dataclass filled with :class:`ParamSpec`. From that
one tree come initial values born sharded (:func:`init`), shapes for ahead-of-time compilation and
checkpoint restore (:func:`shape_dtype`), shardings (:func:`shardings`), counts, and validation.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from models.sharding import ShardingRules

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal with standard deviation ``stddev``."""

    stddev: float = 0.02

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return (self.stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform between ``low`` and ``high``."""

    low: float
    high: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, self.low, self.high).astype(dtype)


@dataclasses.dataclass(frozen=True)
class GlorotNormal:
    """Normal with variance 2 / (fan in + fan out), the lengths of the last two axes.

    Axes before those count copies, each drawn as if it were alone.
    """

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        stddev = math.sqrt(2.0 / (shape[-2] + shape[-1]))
        return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same ``value`` everywhere."""

    value: float = 0.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, logical axis names (None: never sharded), initialiser, dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = Normal()
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"a spec of shape {self.shape} needs one axis name per dimension, got {self.axes}."
            )

    def stacked(self, count: int) -> "ParamSpec":
        """The spec of ``count`` such parameters stacked along a new leading ``layers`` axis."""
        return dataclasses.replace(self, shape=(count, *self.shape), axes=("layers", *self.axes))


def path_name(path: tuple) -> str:
    """``'.segments[0].attn.q.w'``: the name of a leaf, as used in errors, masks and overrides."""
    return jax.tree_util.keystr(path)


def init(specs: Any, key: jax.Array, out_shardings: Any = None) -> Any:
    """Initial parameters, created under jit directly in their shardings.

    Each parameter's key is folded with its path, so adding a parameter leaves the others' values.
    """

    def build(key: jax.Array) -> Any:
        def one(path: tuple, spec: ParamSpec) -> jax.Array:
            return spec.init(
                jax.random.fold_in(key, zlib.crc32(path_name(path).encode())),
                spec.shape,
                spec.dtype,
            )

        return jax.tree_util.tree_map_with_path(one, specs)

    return jax.jit(build, out_shardings=out_shardings)(key)


def shape_dtype(specs: Any, shardings: Any = None) -> Any:
    """``jax.ShapeDtypeStruct`` for every parameter, with its sharding if given."""
    if shardings is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        specs,
        shardings,
    )


def shardings(specs: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """A ``NamedSharding`` for every parameter; see :meth:`ShardingRules.partition_spec`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, s: NamedSharding(
            mesh, rules.partition_spec(s.axes, s.shape, mesh, name=path_name(path))
        ),
        specs,
    )


def count(specs: Any) -> int:
    """Number of scalar parameters in a tree of specs, arrays or ``ShapeDtypeStruct``."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(specs))


def nbytes(specs: Any) -> int:
    """Bytes of a tree of specs, arrays or ``ShapeDtypeStruct``."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(specs)
    )


def cast(params: Any, dtype: Any, keep: Callable[[str], bool] = lambda name: False) -> Any:
    """``params`` with every floating-point leaf in ``dtype``, but those whose name ``keep`` takes.

    The name of a leaf is that of :func:`path_name`.
    """

    def one(path: tuple, x: Any) -> Any:
        changes = jnp.issubdtype(x.dtype, jnp.floating) and not keep(path_name(path))
        return x.astype(dtype) if changes else x

    return jax.tree_util.tree_map_with_path(one, params)


def validate(params: Any, specs: Any) -> None:
    """Raise ValueError naming the first parameter whose presence or shape differs from its spec."""
    given = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    wanted = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(specs)}
    if missing := sorted(wanted.keys() - given.keys()):
        raise ValueError(
            f"parameter {missing[0]} is missing ({len(missing)} in all): "
            "the checkpoint is of another config."
        )
    if extra := sorted(given.keys() - wanted.keys()):
        raise ValueError(f"parameter {extra[0]} is not part of this config ({len(extra)} such).")
    for name, spec in wanted.items():
        if tuple(given[name].shape) != spec.shape:
            raise ValueError(
                f"parameter {name} has shape {tuple(given[name].shape)} but the config asks for "
                f"{spec.shape}: load it with the config it was saved with."
            )
