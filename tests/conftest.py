"""Settings that every test runs under. All of them must be in place before jax is imported.

Eight CPU devices, a persistent compilation cache in `.cache/jax`, rank promotion as an error, full
float32 matrix products, and run-time checks of every jaxtyping signature in our packages.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from tests.source_tree import PACKAGES, ROOT

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would be tried first
# Most of a test's time is compiling: machine code that is not optimised is made faster, and by the
# older emitters, which jax 0.10 has beside the new ones, in little more than half the time.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 "
    + "--xla_cpu_use_fusion_emitters=false " * version("jaxlib").startswith("0.10.")
    + os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two test processes may compile at once
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("MPLBACKEND", "agg")

from jaxtyping import install_import_hook

install_import_hook(list(PACKAGES), "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()  # grain and tensorflow-datasets read absl flags at use

MAPPINGS = Path("/proc/self/maps")
MANY = 15_000


def drop_programs() -> None:
    """Forget compiled programs once there are many.

    Each holds memory mappings, of which Linux allows a process 65,530 by default; a compilation
    beyond that ends in a segmentation fault.
    """
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Look after the programs between modules."""
    yield
    drop_programs()
