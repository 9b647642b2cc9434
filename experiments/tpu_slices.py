"""TPU slices by their cloud names: what they have, and their topology for the compiler.

Peak figures are the public specifications of the TPU system architecture pages of Google Cloud's
documentation (v5e, v5p, v6e), read once and kept here: bfloat16 operations, bandwidth and size of
the chip's memory. Names are theirs too: v5e and v6e count chips, v5p counts cores, two per chip,
and to jax a v5p chip is one device.
"""

import dataclasses
import functools
import importlib.util
import os
from typing import Any

from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip: bfloat16 operations and bytes per second, GiB of memory."""

    flops: float
    bandwidth: float
    memory_gib: int


V5E = Chip(flops=197e12, bandwidth=819e9, memory_gib=16)
V5P = Chip(flops=459e12, bandwidth=2765e9, memory_gib=95)
V6E = Chip(flops=918e12, bandwidth=1640e9, memory_gib=32)
CHIPS = {"v5e": V5E, "v5p": V5P, "v6e": V6E}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some chips of one kind; ``topology`` is the compiler's name for them."""

    chip: Chip
    topology: str
    devices: int


SLICES = {
    "v5e-8": Slice(V5E, "v5e:2x4", 8),
    "v5e-16": Slice(V5E, "v5e:4x4", 16),
    "v5p-8": Slice(V5P, "v5p:2x2x1", 4),
    "v5p-16": Slice(V5P, "v5p:2x2x2", 8),
    "v6e-8": Slice(V6E, "v6e:2x4", 8),
    "v6e-16": Slice(V6E, "v6e:4x4", 16),
}

_LIBTPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server on a host that is not in the cloud
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes may compile at the same time
}


def slice_named(name: str) -> Slice:
    """A slice by name.

    Raises:
        ValueError: it is not one of those known.
    """
    if name not in SLICES:
        raise ValueError(f"unknown slice {name!r}: use one of {', '.join(SLICES)}.")
    return SLICES[name]


@functools.cache
def devices(topology: str) -> list[Any]:
    """Descriptions of a topology's devices, to compile for; none need be attached.

    Raises:
        RuntimeError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "compiling for a TPU needs libtpu, which is not installed: "
            'install the extra, pip install -e ".[aot]".'
        )
    for name, value in _LIBTPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
