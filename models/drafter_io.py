"""A trained drafter on disk: ``config.json`` and safetensors, without anything of its target.

The config names the kind of drafter, its settings, the ids of its draft vocabulary, and the shape
of the target that it was trained for.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.decoder import Config
from models.params import path_name
from models.safetensors_io import Safetensors, new_directory, write_checkpoint

SCHEMA = 1
MAX_SHARD_BYTES = 2 << 30


def save_drafter(
    directory: str | pathlib.Path,
    kind: str,
    cfg: Any,
    params: Any,
    target: Config,
    vocabulary: Sequence[int] | np.ndarray | None = None,
    dtype: Any = jnp.float32,
) -> None:
    """Write a drafter's settings (a dataclass) and weights, these in ``dtype``.

    Raises:
        FileExistsError: the directory is not empty.
        OSError: it cannot be written.
    """
    ids = None if vocabulary is None else np.asarray(vocabulary).astype(int).tolist()
    settings = {
        "schema": SCHEMA,
        "drafter": kind,
        "config": dataclasses.asdict(cfg),
        "target": _shape_of(target),
        "draft_vocabulary": ids,
    }
    size = np.dtype(dtype).itemsize
    tensors = [
        (_name(path), math.prod(leaf.shape) * size, lambda leaf=leaf: np.asarray(leaf, dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    with new_directory(directory) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        write_checkpoint(folder, tensors, MAX_SHARD_BYTES)


def load_settings(directory: str | pathlib.Path, kind: str, target: Config) -> dict[str, Any]:
    """The settings in a drafter's ``config.json``.

    Raises:
        FileNotFoundError: no ``config.json`` there.
        ValueError: not a drafter of this kind, or one for a target of another shape.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name the folder of a trained drafter.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): save the drafter again.") from error
    if settings.get("schema") != SCHEMA or settings.get("drafter") != kind:
        raise ValueError(
            f"{path} is of drafter {settings.get('drafter')!r}, schema {settings.get('schema')}, "
            f"but {kind!r}, schema {SCHEMA}, is asked for: name another folder."
        )
    if settings["target"] != _shape_of(target):
        raise ValueError(
            f"the drafter in {directory} was trained for a target of {settings['target']}, this "
            f"one has {_shape_of(target)}: use them with the models they were made for."
        )
    return settings


def load_weights(directory: str | pathlib.Path, specs: Any) -> Any:
    """Float32 weights in the structure of ``specs``.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: a missing or superfluous tensor, one of another shape, or a damaged file.
    """
    source = Safetensors(directory)
    wanted = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(specs)}
    if odd := sorted(wanted.keys() ^ set(source.names())):
        state = "missing from" if odd[0] in wanted else "not expected in"
        raise ValueError(
            f"tensor {odd[0]} is {state} {directory}: its config is of another drafter."
        )
    for name, spec in wanted.items():
        if source.shape(name) != tuple(spec.shape):
            raise ValueError(
                f"tensor {name} in {directory} has shape {source.shape(name)}, its config asks for "
                f"{tuple(spec.shape)}: save the drafter again."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: jnp.asarray(source.read(_name(path)), jnp.float32), specs
    )


def _name(path: tuple) -> str:
    return path_name(path).lstrip(".")


def _shape_of(target: Config) -> dict[str, int]:
    return {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
