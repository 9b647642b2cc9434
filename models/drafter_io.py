"""A trained drafter on disk: ``config.json`` and safetensors, without anything of its target.

The config names the kind of drafter, its settings, the ids of its draft vocabulary, and the shape
of the target that it was trained for.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.decoder import Config
from models.safetensors_io import new_directory, read_tree, write_tree

SCHEMA = 1


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
    with new_directory(directory) as folder:
        (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        write_tree(folder, params, dtype)


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
        FileNotFoundError, ValueError: see :func:`models.safetensors_io.read_tree`.
    """
    return read_tree(directory, specs)


def _shape_of(target: Config) -> dict[str, int]:
    return {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
