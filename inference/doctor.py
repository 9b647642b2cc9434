"""What this machine is and which kernels will run on it: ``python -m inference.doctor``."""

import importlib.metadata
import os
import platform
import sys

import jax
import jax.numpy as jnp

from ops.attention import AttentionMask, attention
from ops.platform import target_platform

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
    "safetensors", "tokenizers", "gguf",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed version by package; what is absent says so."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """One line per device: what it is, and its memory if it tells."""
    lines = []
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f"{limit / 2**30:.1f} GiB" if limit else "memory of the host"
        lines.append(f"{device.platform}:{device.id} {device.device_kind}, {memory}")
    return lines


def host() -> str:
    """Cores and memory of the host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return f"{cores} cores, memory unknown on {platform.system()}"
    return f"{cores} cores, {total / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB free"


def attention_kernel(queries: int, slots: int) -> str:
    """What ``ops.attention`` compiles to for so many new tokens against so many cache slots.

    Found by tracing a call, not by repeating the rules that choose.
    """
    q = jax.ShapeDtypeStruct((1, queries, 8, 128), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, slots, 2, 128), jnp.float32)
    mask = AttentionMask(q_positions=jnp.arange(slots - queries, slots, dtype=jnp.int32)[None])

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, mask=mask)  # pyright: ignore[reportReturnType]

    traced = str(jax.make_jaxpr(call)(q, kv, kv))
    kernel = "Pallas TPU kernel" if "pallas_call" in traced else "plain XLA operations"
    return f"{kernel}, because the target platform is {target_platform()}"


def main() -> int:
    """Print the report; returns the exit status."""
    print("versions")
    for name, version in versions().items():
        print(f"  {name:18} {version}")
    print(f"host\n  {host()}")
    print(f"devices (default platform {jax.default_backend()})")
    for line in devices():
        print(f"  {line}")
    print("attention")
    print(f"  prefill, 1024 tokens    {attention_kernel(1024, 1024)}")
    print(f"  decode, 1 token         {attention_kernel(1, 1024)}")
    print(f"  verify, 64 tree nodes   {attention_kernel(64, 1024)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
