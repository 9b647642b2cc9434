"""What a training run carries from update to update, and where it lies on the devices."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import params as model_params
from models.sharding import ShardingRules


@struct.dataclass
class TrainState:
    """All that changes. The step counts attempted updates, skipped ones included."""

    step: Any  # int32 scalar
    trained: Any  # the task's trained parameters
    optimizer: Any
    average: Any  # exponential moving average of ``trained``, or None
    bad_in_row: Any  # int32 scalar: updates skipped since the last good one


def create_state(
    trained: Any, optimizer: optax.GradientTransformation, average: bool
) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        optimizer=optimizer.init(trained),
        average=jax.tree.map(jnp.copy, trained) if average else None,
        bad_in_row=jnp.zeros((), jnp.int32),
    )


def abstract_state(
    specs: Any,
    optimizer: optax.GradientTransformation,
    average: bool,
    mesh: Mesh,
    rules: ShardingRules,
) -> TrainState:
    """Shapes, dtypes and shardings of the state.

    What belongs to a parameter lies where the parameter lies: a leaf of the optimiser's state
    whose path ends in the parameter's, with the same shape. All else is on every device.
    """
    shapes = jax.eval_shape(
        lambda p: create_state(p, optimizer, average), model_params.shape_dtype(specs)
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = model_params.shardings(specs, mesh, rules)
    places = {
        tuple(path): (spec.shape, sharding)
        for (path, spec), sharding in zip(
            jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        endings = (places.get(tuple(path[i:])) for i in range(len(path)))
        shape, sharding = next((e for e in endings if e is not None), (None, everywhere))
        chosen = sharding if shape == leaf.shape else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chosen)

    return jax.tree_util.tree_map_with_path(place, shapes)
