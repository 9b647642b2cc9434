"""Results on disk: one JSON schema for every experiment.

A result names the host, the versions, the commit, the command, the config, the seeds, and keeps
the raw samples of every number beside mean and spread. Tables and figures are made from these
files and from nothing else (``experiments.report``).
"""

import dataclasses
import json
import math
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from train.run_folder import command_line, cores, processor, write_text

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax")


def sample(values: Sequence[float | int]) -> dict[str, Any]:
    """Raw samples with their mean, standard deviation (0 for one sample), minimum and maximum.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    values = [float(v) for v in values]
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(
            f"a result needs finite samples, got {values}: look at the run that made them."
        )
    return {
        "samples": values,
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def samples(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The samples of every number of the first run, over all runs."""
    return {name: sample([run[name] for run in runs]) for name in runs[0]}


def host() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "processor": processor(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def memory_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Measured read bandwidth in GB/s: the best time of a large matrix times a vector.

    That is what decoding does at batch 1. (Summing an array reached less on the CPUs we tried.)
    """
    matrix = jnp.ones((megabytes * 2**8, 1024), jnp.float32)
    vector = jnp.ones((1024,), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best / 1e9


def commit() -> dict[str, Any]:
    """The commit of the code, and whether the tree differs from it; None outside git."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", *args], cwd=root, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "modified": None if status is None else bool(status)}


def save(
    name: str,
    rows: Sequence[dict[str, Any]],
    *,
    config: Any,
    seeds: Sequence[int],
    timing: dict[str, Any] | None = None,
    statements: Sequence[dict[str, Any]] = (),
    earlier: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Path:
    """Write ``<folder>/<name>.json`` (default folder: the committed results); returns the path.

    Args:
        rows: one per line of the table; numbers that were measured are made by :func:`sample`.
        config: the settings, a dataclass or a plain mapping.
        seeds: all seeds used.
        timing: bandwidth, load average and compile times, for experiments that measure seconds.
        statements: what must hold, each with its answer.
        earlier: a result with some of the rows; when and by what it was made is kept, too.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    result = {
        "schema": SCHEMA,
        "experiment": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(command_line()),
        "host": host(),
        "versions": {p: metadata.version(p) for p in PACKAGES},
        **commit(),
        "config": config,
        "seeds": list(seeds),
        "timing": timing,
        "statements": list(statements),
        "rows": list(rows),
    }
    if earlier is not None:
        origin = {key: earlier[key] for key in ("commit", "modified", "date", "command")}
        result["earlier"] = [*earlier.get("earlier", ()), origin]
    return _write(name, result, folder)


def check_extends(result: Mapping[str, Any], config: Any, free: Sequence[str]) -> None:
    """Refuse to add rows to a result under other settings than its own, but for the ``free`` ones.

    Args:
        config: the settings, a dataclass.

    Raises:
        ValueError: the first setting that differs.
    """
    theirs, ours = result["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    if other := [key for key in ours if key not in free and ours[key] != theirs[key]]:
        raise ValueError(
            f"the result has {other[0]} {theirs[other[0]]}, not {ours[other[0]]}: it can be "
            "extended with its own settings only."
        )


def name_of(experiment: str, model: str | None = None, *endings: str) -> str:
    """The name of a result: the last part of its model's path, if any, and endings but empty ones.

    Args:
        model: what it was measured on; None: no one model.
    """
    parts = (experiment, Path(model or "").name.replace("-", "_"), *endings)
    return "_".join(part for part in parts if part)


def restate(name: str, statements: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    """Give a result other ``statements``, answered by its rows; all else stays as it was measured.

    Raises:
        FileNotFoundError, ValueError: see :func:`load`.
    """
    return _write(name, load(name, folder) | {"statements": list(statements)}, folder)


def _write(name: str, result: dict[str, Any], folder: Path | None) -> Path:
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def load(name: str, folder: Path | None = None) -> dict[str, Any]:
    """A result by name, from ``folder`` (default: the committed ones).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or of another schema version.
    """
    path = (RESULTS if folder is None else folder) / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"there is no result {path.name}: run its experiment first.")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}): make it again.") from error
    if result.get("schema") != SCHEMA:
        raise ValueError(
            f"{path.name} has schema {result.get('schema')}, not {SCHEMA}: make it again."
        )
    return result
