"""What an exported folder says of a trained position scheme: ``positions.json``.

A task that trains more than a decoder's config can say writes it beside the weights, and the
policy of its method reads it: plain JSON, so that nothing is run when it is loaded. What is too
large for that, such as an encoder's weights, lies as safetensors in the folder ``positions``.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from models.safetensors_io import read_tree, write_tree

POSITIONS = "positions.json"
WEIGHTS = "positions"
SCHEMA = 1


def write_positions(
    folder: pathlib.Path, method: str, facts: Mapping[str, Any], weights: Any = None
) -> None:
    """Write the facts of a scheme: JSON values, floats to the last bit; and a tree of weights."""
    told = {"schema": SCHEMA, "method": method, **facts}
    (folder / POSITIONS).write_text(json.dumps(told), encoding="utf-8")
    if weights is not None:
        (folder / WEIGHTS).mkdir()
        write_tree(folder / WEIGHTS, weights)


def read_weights(folder: str, specs: Any) -> Any:
    """The weights that :func:`write_positions` wrote, float32 in the structure of ``specs``.

    Raises:
        FileNotFoundError, ValueError: see :func:`models.safetensors_io.read_tree`.
    """
    return read_tree(pathlib.Path(folder) / WEIGHTS, specs)


def read_positions(folder: str, method: str) -> dict[str, Any]:
    """The facts that :func:`write_positions` wrote for a method.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: a damaged file, or one of another method or version.
    """
    path = pathlib.Path(folder) / POSITIONS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {POSITIONS}: export a run of {method} there with "
            "python -m train.export --run=RUN --out=DIR."
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): export it again.") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of another version: export it again.")
    if facts.get("method") != method:
        raise ValueError(f"{path} is of {facts.get('method')!r}: use that policy, not {method!r}.")
    return facts
