"""Models of this workspace as Flax modules, and weights taken from Flax modules.

The core has no modules: parameters are pytrees and models are functions. This is the door to code
that has them.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx, traverse_util

from models.params import path_name

PathMap = Mapping[str, tuple[Hashable, ...] | tuple[tuple[Hashable, ...], Callable[[Any], Any]]]
"""Parameter name here to the path there, or to (path, function applied to the array)."""


class LinenModule(linen.Module):
    """A ``linen.Module`` around ``function(params, *args, **kwargs)``.

    Attributes:
        specs: the parameters as a tree of ``ParamSpec``; each becomes one linen parameter of the
            module, named as :func:`params.path_name` names it.
        function: the forward pass; it sees the assembled parameter tree.
    """

    specs: Any
    function: Callable[..., Any]

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``function`` with the module's parameters."""
        tree = jax.tree_util.tree_map_with_path(
            lambda path, spec: self.param(path_name(path), spec.init, spec.shape, spec.dtype),
            self.specs,
        )
        return self.function(tree, *args, **kwargs)


def to_linen(params: Any) -> dict[str, Any]:
    """The variables with which :class:`LinenModule` computes what ``params`` compute."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"params": {path_name(path): leaf for path, leaf in leaves}}


def from_linen(variables: Mapping[str, Any], specs: Any, path_map: PathMap | None = None) -> Any:
    """Parameters from the ``params`` collection of a linen module.

    Args:
        variables: what ``module.init`` returned.
        specs: the tree of ``ParamSpec`` to fill.
        path_map: where each parameter lies; default: as in :class:`LinenModule`.

    Raises:
        ValueError: a parameter without a place, absent there, or of another shape.
    """
    flat = traverse_util.flatten_dict(dict(variables["params"]))
    return _take(flat, specs, path_map)


def from_nnx(module: nnx.Module, specs: Any, path_map: PathMap) -> Any:
    """Parameters from the ``nnx.Param`` variables of an NNX module; see :func:`from_linen`."""
    flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    return _take(flat, specs, path_map)


def _take(flat: Mapping[Any, Any], specs: Any, path_map: PathMap | None) -> Any:
    def one(path: tuple, spec: Any) -> Any:
        name = path_name(path)
        if path_map is not None and name not in path_map:
            raise ValueError(f"the path map has no entry for parameter {name}: add one.")
        entry: Any = (name,) if path_map is None else path_map[name]
        there, function = entry if entry and isinstance(entry[0], tuple) else (entry, None)
        if there not in flat:
            raise ValueError(
                f"the module has no parameter at {there}, which is asked for {name}: it has "
                f"{sorted(map(str, flat))[:5]}."
            )
        array = flat[there] if function is None else function(flat[there])
        if tuple(np.shape(array)) != spec.shape:
            raise ValueError(
                f"parameter {name} has shape {np.shape(array)} at {there} but {spec.shape} is "
                "needed: map it with a function that reshapes it."
            )
        return jax.numpy.asarray(array, spec.dtype)

    return jax.tree_util.tree_map_with_path(one, specs)
