"""Drafters by name, as ``--drafter`` takes them.

Each entry names a function ``load(argument, model) -> (drafter, params)`` as ``module:attribute``.
It is looked up when asked for, because some live in packages that this one must not import.
"""

import pathlib
import pkgutil
from typing import Any

from inference.drafter import Drafter, NoDrafter
from models.load import ASSETS, Model

DRAFTERS = {
    "none": "inference.drafters.registry:load_none",
    "lookup": "inference.drafters.lookup:load",
    "recycling": "research.speculative.token_recycling.drafter:load",
    "swift": "research.speculative.swift.drafter:load",
    "del": "research.speculative.del_exit.drafter:load",
    "draft:DIR": "inference.drafters.draft_model:load",
    "medusa:DIR": "inference.drafters.medusa:load",
    "eagle:DIR": "inference.drafters.eagle:load",
    "clover:DIR": "research.speculative.clover.drafter:load",
}
"""What can be asked for. ``DIR`` stands for a directory, a folder of ``assets/`` by its name, or,
for a draft model, whatever else names a model."""


def load_none(argument: str, model: Model) -> tuple[NoDrafter, None]:
    """Plain decoding."""
    return NoDrafter(), None


def check_name(name: str) -> tuple[str, str]:
    """The registered function for a drafter's name, and the name's argument ("" if none).

    Raises:
        ValueError: an unknown drafter, or an argument that is missing or superfluous.
    """
    kind, colon, argument = name.partition(":")
    known = ", ".join(DRAFTERS)
    if kind in DRAFTERS:
        if colon:
            raise ValueError(f"drafter {kind!r} takes no argument, got {name!r}: write {kind!r}.")
        return DRAFTERS[kind], ""
    entry = DRAFTERS.get(f"{kind}:DIR")
    if entry is None:
        raise ValueError(f"unknown drafter {name!r}: choose one of {known}.")
    if not argument:
        raise ValueError(f"drafter {name!r} lacks its directory: write '{kind}:DIR'.")
    return entry, argument


def make_drafter(name: str, model: Model) -> tuple[Drafter, Any]:
    """The drafter called ``name`` for ``model``, and its params.

    Raises:
        ValueError: see :func:`check_name`, or what it loads does not fit the model.
        FileNotFoundError: nothing at the place that the name gives.
    """
    entry, argument = check_name(name)
    if argument and not pathlib.Path(argument).exists() and (ASSETS / argument).is_dir():
        argument = str(ASSETS / argument)
    return pkgutil.resolve_name(entry)(argument, model)
