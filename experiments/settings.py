"""Flags that experiments on drafters share, and their settings out of the flags."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import flags

Settings = TypeVar("Settings")


def define_shared_flags(methods: Sequence[str], seeds: str) -> None:
    """The frozen model, where prompts come from, what is compared. ``seeds``: what they seed."""
    flags.DEFINE_string("model", "python-5m", "The frozen model.")
    flags.DEFINE_list(
        "prompts",
        ["python_stdlib"],
        "python_stdlib, text:PATH, FILE.jsonl:FIELD or FILE.jsonl:FIELD[KEY=VALUE], in turn.",
    )
    flags.DEFINE_bool("chat", False, "JSON lines are a user's turns in the chat template.")
    flags.DEFINE_list("methods", list(methods), "What to compare.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], seeds)
    flags.DEFINE_integer("prompt_tokens", 64, "Tokens of every prompt.")


def from_flags(settings: type[Settings]) -> Settings:
    """A settings dataclass whose every field is a flag of its name; lists become tuples."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # pyright: ignore[reportArgumentType]
        value = getattr(flags.FLAGS, field.name)
        given[field.name] = tuple(value) if isinstance(value, list) else value
    if "seeds" in given:
        given["seeds"] = tuple(int(seed) for seed in given["seeds"])
    return settings(**given)
