"""Flags that experiments on drafters share, their settings out of the flags, and their folders."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import flags

from train import run_folder

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


def open_study(settings: Any, weights: dict[str, str]) -> pathlib.Path:
    """The folder of a study that goes on where it stood.

    Methods and seeds may be added to it, nothing else may change.

    Args:
        settings: a dataclass with ``methods``, ``seeds`` and ``folder``.
        weights: hashes of the models' weights.

    Raises:
        ValueError: it was begun with other settings or other models.
    """
    folder = pathlib.Path(settings.folder)
    run_folder.open_folder(folder)
    kept = dataclasses.asdict(settings) | weights
    for name in ("methods", "seeds", "folder"):
        del kept[name]
    kept = json.loads(json.dumps(kept))  # as it is read back
    path = folder / "settings.json"
    if not path.exists():
        run_folder.write_json(path, kept)
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(n for n in kept.keys() | before.keys() if kept.get(n) != before.get(n))
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings ({', '.join(changed)}): name another --folder."
        )
    return folder
