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
    "swift:STEPS": "research.speculative.swift.drafter:load",
    "del": "research.speculative.del_exit.drafter:load",
    "draft:DIR": "inference.drafters.draft_model:load",
    "medusa:DIR": "inference.drafters.medusa:load",
    "eagle:DIR": "inference.drafters.eagle:load",
    "eagle2:DIR": "inference.drafters.eagle_tree:load",
    "clover:DIR": "research.speculative.clover.drafter:load",
    "longspec:DIR": "research.speculative.longspec.drafter:load",
    "longspec-chain:DIR": "research.speculative.longspec.drafter:load_chain",
    "specdec:DIR:HEADS": "research.speculative.specdec_pp.drafter:load",
}
"""What can be asked for. Words in capitals stand for a directory, a folder of ``assets/`` by its
name, or, for a draft model, whatever else names a model; ``STEPS`` for the longest chain that SWIFT
drafts, then without leaves beside it."""


def load_none(argument: str, model: Model) -> tuple[NoDrafter, None]:
    """Plain decoding."""
    return NoDrafter(), None


def check_name(name: str) -> tuple[str, str]:
    """The registered function for a drafter's name, and the name's argument ("" if none).

    Raises:
        ValueError: an unknown drafter, or an argument that is missing or superfluous.
    """
    kind, colon, argument = name.partition(":")
    forms = [p for p in DRAFTERS if p.partition(":")[0] == kind]
    if not forms:
        raise ValueError(f"unknown drafter {name!r}: choose one of {', '.join(DRAFTERS)}.")
    pattern = next((p for p in forms if (":" in p) == bool(colon)), forms[0])
    wanted = pattern.count(":")
    if colon and not wanted:
        raise ValueError(f"drafter {kind!r} takes no argument, got {name!r}: write {kind!r}.")
    parts = argument.split(":", max(wanted - 1, 0))
    if wanted and (len(parts) < wanted or not all(parts)):
        raise ValueError(f"drafter {name!r} lacks an argument: write {pattern!r}.")
    return DRAFTERS[pattern], argument


def make_drafter(name: str, model: Model) -> tuple[Drafter, Any]:
    """The drafter called ``name`` for ``model``, and its params.

    Raises:
        ValueError: see :func:`check_name`, or what it loads does not fit the model.
        FileNotFoundError: nothing at the place that the name gives.
    """
    entry, argument = check_name(name)
    argument = ":".join(_shipped(part) for part in argument.split(":"))
    return pkgutil.resolve_name(entry)(argument, model)


def _shipped(part: str) -> str:
    """A folder of ``assets/`` by its path, anything else as it is."""
    if part and not pathlib.Path(part).exists() and (ASSETS / part).is_dir():
        return str(ASSETS / part)
    return part
