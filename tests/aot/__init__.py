"""Ahead-of-time compilation for real TPU targets on a host that has none.

`import tests.aot` costs nothing; `device(chip)` loads libtpu and skips the test, with the reason,
where that cannot be done. Tests that use it carry the marker `aot`.
"""

import functools
import importlib.util
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

CHIPS = ("v5e", "v5p", "v6e")
TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
"""A slice of 8 devices of each generation."""

_LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server on a host that is not in the cloud
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two test processes may compile at the same time
}


@functools.cache
def topology(chip: str) -> Any:
    """The description of an 8-device slice of `chip`; skips the running test if there is none."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make test-aot` installs it and runs these tests")
    for name, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])


def device(chip: str) -> SingleDeviceSharding:
    """One device of `chip`, as the sharding to give to ShapeDtypeStructs."""
    return SingleDeviceSharding(topology(chip).devices[0])


def mesh(chip: str, **axes: int) -> Mesh:
    """A mesh over the first devices of the slice: mesh("v5e", data=2, tensor=4)."""
    sizes = tuple(axes.values())
    devices = np.array(topology(chip).devices)[: int(np.prod(sizes))]
    return Mesh(devices.reshape(sizes), tuple(axes))


def compile_for(chip: str, function: Any, *shapes: Any, **jit_options: Any) -> Any:
    """Compiles `function` for one device of `chip`; `shapes` are trees of ShapeDtypeStructs."""
    place = device(chip)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return jax.jit(function, **jit_options).lower(*placed).compile()


def figures(compiled: Any) -> dict[str, float]:
    """What the compiler says: bytes of arguments, outputs and temporaries, flops, seconds."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": cost.get("flops", 0.0),
        "bytes_accessed": cost.get("bytes accessed", 0.0),
        "optimal_seconds": cost.get("optimal_seconds", 0.0),
    }
