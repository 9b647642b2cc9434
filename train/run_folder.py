"""What a run leaves besides its checkpoints, so that it can be repeated."""

import hashlib
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from models.params import path_name
from train.checkpoint import clear_disk_errors

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def open_folder(folder: pathlib.Path) -> None:
    """Make the folder and see that it can be written.

    Raises:
        OSError: it cannot, with the reason.
    """
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write_test_{jax.process_index()}"
        probe.write_text("written")
        probe.unlink()


def describe_run(
    folder: pathlib.Path, config: Mapping[str, Any], argv: Sequence[str], mesh: Mapping[str, int]
) -> None:
    """Write config.json and run.json: command, versions, commit and hardware of every launch.

    What was not committed at a launch is kept beside them, in ``diff_<launch>.patch``.
    """
    earlier = []
    if (folder / "run.json").exists():
        try:
            earlier = json.loads((folder / "run.json").read_text())["launches"]
        except (ValueError, KeyError):
            earlier = []  # a launch was killed while it wrote the file
    commit, diff = _git()
    patch = f"diff_{len(earlier) + 1}.patch" if diff else None
    if patch is not None:
        with clear_disk_errors(folder):
            (folder / patch).write_text(diff)
    launch = {
        "command": shlex.join(argv),
        "commit": commit,
        "diff": patch,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": [jax.devices()[0].device_kind, len(jax.devices())],
        "processor": f"{processor()}, {cores()} cores",
        "mesh": dict(mesh),
        "processes": jax.process_count(),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "run.json", {"schema": 1, "launches": [*earlier, launch]})


def processor() -> str:
    """The host's processor by name."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores of the host that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON; see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write by way of a temporary file, so that the file is never half-written."""
    with clear_disk_errors(path.parent):
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def command_line() -> list[str]:
    """The words that repeat this launch from the repository root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else pathlib.Path(sys.argv[0]).stem
    return ["python", "-m", name, *sys.argv[1:]]


def hash_tree(tree: Any) -> str:
    """sha256 over the names, dtypes, shapes and values of a tree of arrays.

    Raises:
        ValueError: an array is spread over processes, so that no one of them can read it whole.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                raise ValueError(
                    f"frozen parameter {path_name(path)} is sharded over processes: replicate "
                    "frozen parameters by a sharding override."
                )
            leaf = leaf.addressable_data(0)
        array = np.asarray(leaf)
        digest.update(f"{path_name(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).tobytes())
    return digest.hexdigest()


def hash_file(path: pathlib.Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, str]:
    """Commit of the repository and the difference to it; (None, '') without git."""

    def run(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = run("rev-parse", "HEAD")
    return (commit.strip() if commit else None), (run("diff", "HEAD") or "" if commit else "")
