"""The one place that knows which platform a computation is being built for.

Code that chooses between a kernel and its plain XLA form asks `target_platform()`; nothing asks
the attached devices while tracing, so a CPU-only host can trace, lower and compile for a TPU:

    with target("tpu"):
        jax.jit(step).lower(*shapes).compile()

The setting is a jax user context, which is part of jit's cache key: a function that was traced
for one target is traced again for another. It is thread-local and holds inside `shard_map`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_PLATFORMS = ("cpu", "gpu", "tpu")
_override = jax.make_user_context(default_value=None)


@functools.cache
def _default_platform() -> str:
    """The platform of jax's default backend, looked up once per process."""
    backend = jax.default_backend()
    if backend in ("cuda", "rocm"):
        return "gpu"
    return backend if backend in _PLATFORMS else "cpu"


def target_platform() -> str:
    """The platform that traced code will run on: the innermost `target`, else the default one."""
    return _override.value or _default_platform()


def implementation_of(name: str) -> str:
    """What "auto" stands for, "tpu" (a kernel) on a TPU and else "xla"; any other name as it is."""
    if name != "auto":
        return name
    return "tpu" if target_platform() == "tpu" else "xla"


@contextmanager
def target(platform: str) -> Iterator[None]:
    """Builds everything traced inside the block for `platform`, whatever device is attached.

    Raises:
      ValueError: `platform` is not "cpu", "gpu" or "tpu".
    """
    if platform not in _PLATFORMS:
        raise ValueError(f"unknown platform {platform!r}; name one of {', '.join(_PLATFORMS)}")
    with _override(platform):
        yield
