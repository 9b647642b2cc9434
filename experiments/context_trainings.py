"""What is trained for longer contexts from one base model: by which config, and how it is read."""

import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

CONFIGS = ("configs/giraffe.py", "configs/clex.py")


@dataclasses.dataclass(frozen=True)
class Method:
    """A training, and the policies under which its model is read.

    Attributes:
        config: the name of its file in ``configs/``.
        changes: of the config, by dotted key.
        policies: by label, as :mod:`experiments.long_context` takes them; ``DIR`` stands for the
            export. Rates are chosen by the first.
        follows: further keys that take the learning rate.
        choose_length: tokens of the text that chooses its rate, where not the comparison's.
    """

    config: str
    changes: Mapping[str, Any]
    policies: Mapping[str, str]
    follows: tuple[str, ...] = ()
    choose_length: int = 0


def _giraffe(policies: Mapping[str, str], **basis: Any) -> Method:
    changes = {f"task.basis.{key}": value for key, value in ({"scale": 1.0} | basis).items()}
    return Method("giraffe", changes, policies)


def _at_256(
    policies: Mapping[str, str], changes: Mapping[str, Any] | None = None, choose_length: int = 0
) -> Method:
    """Rows of the trained length, as CLEX has them, by Giraffe's task."""
    short = {
        "task.sequence_length": 256,
        "task.corpus": "text:runs/records.jsonl",
        "task.basis.scale": 1.0,
    }
    return Method("giraffe", short | dict(changes or {}), policies, choose_length=choose_length)


def _rope(kind: str, label: str) -> Method:
    """A registered rotary scheme with a factor of 4, which the export carries."""
    scheme = {"task.model.rope.rope_type": kind, "task.model.rope.factor": 4.0}
    return Method("giraffe", {"task.basis.scale": 1.0, **scheme}, {label: "dense@DIR"})


_ODE = ("groups.ode.learning_rate",)

METHODS: dict[str, Method] = {
    # Rows of 512 tokens: Giraffe's comparison.
    "rope": _giraffe({"rope, tuned": "dense@DIR", "window, tuned": "window:256@DIR"}),
    "linear": _giraffe(
        {"linear 4, tuned": "giraffe:DIR@DIR", "linear 4, tuned, read at 8": "linear:8@DIR"},
        scale=4.0,
    ),
    "power0.1": _giraffe({"power 0.1, tuned": "giraffe:DIR@DIR"}, power=0.1),
    "power0.5": _giraffe({"power 0.5, tuned": "giraffe:DIR@DIR"}, power=0.5),
    "truncated": _giraffe({"truncated, tuned": "giraffe:DIR@DIR"}, truncate=256),
    "randomised": _giraffe({"randomised, tuned": "giraffe:DIR@DIR"}, randomize=True),
    "xpos": _giraffe({"xPos, tuned": "giraffe:DIR@DIR"}, xpos=True),
    "yarn": _rope("yarn", "YaRN 4, tuned"),
    "ntk": _rope("ntk", "NTK 4, tuned"),
    # Rows of the trained length: CLEX's comparison.
    "clex": Method("clex", {}, {"CLEX": "clex:DIR@DIR"}, _ODE),
    "clex-ntk": Method(
        "clex", {"groups.ode.learning_rate": 0.0}, {"CLEX, analytic field only": "clex:DIR@DIR"}
    ),
    "random": Method(
        "clex", {"task.plain_frequencies": True}, {"random positions at 256": "dense@DIR"}, _ODE
    ),
    "rope256": _at_256({"rope, tuned at 256": "dense@DIR"}),
    "rope256-here": _at_256({"rope, tuned at 256, rate for 256": "dense@DIR"}, choose_length=256),
    "linear256": _at_256({"linear 4, tuned at 256": "giraffe:DIR@DIR"}, {"task.basis.scale": 4.0}),
    # The same tokens with and without the four synthetic tasks of Qwen2.5-1M.
    "text": _at_256(
        {"dual chunk, tuned on text": "dual_chunk:192:32@DIR"},
        {"task.corpus": "text:runs/records_text.jsonl"},
    ),
    "tasks": _at_256(
        {"dual chunk, tuned on text and tasks": "dual_chunk:192:32@DIR"},
        {"task.corpus": "text:runs/records_tasks.jsonl"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained and measured; see the flags of :mod:`experiments.context_methods`."""

    model: str
    folder: str
    methods: tuple[str, ...]
    rates: tuple[str, ...]
    updates: int
    update_tokens: int
    choose_length: int
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    text: str
    seeds: tuple[int, ...]
    windows: int
    depths: int
    count: int
    batch: int
    jobs: int
    loss_threshold: float
    accuracy_threshold: float

    def checked(self) -> "Settings":
        """The same with lengths as sorted numbers.

        Raises:
            ValueError: an unknown method, no rate or seed, or updates of less than a row.
        """
        if unknown := set(self.methods) - METHODS.keys():
            raise ValueError(f"unknown method {min(unknown)!r}: choose of {', '.join(METHODS)}.")
        if not self.rates or not self.seeds:
            raise ValueError("give at least one rate and one seed.")
        if self.update_tokens < (most := max(row_length(METHODS[m]) for m in self.methods)):
            raise ValueError(f"an update needs at least a row: --update_tokens={most}.")
        lengths = tuple(sorted({int(length) for length in self.lengths}))
        return dataclasses.replace(self, lengths=lengths)


def export_folder(settings: Settings, method: str, rate: str, seed: int) -> pathlib.Path:
    """Where the exported model of a training stands, beside its run."""
    return pathlib.Path(settings.folder) / method / rate / str(seed) / "export"


def row_length(method: Method) -> int:
    """Tokens of a row of its batches."""
    known = importlib.import_module(f"configs.{method.config}").get_config().task.sequence_length
    return method.changes.get("task.sequence_length", known)


def command(settings: Settings, method: str, rate: str, seed: int) -> list[str]:
    """The command of one training."""
    chosen = METHODS[method]
    values = {
        "task.start_from": settings.model,
        "seed": seed,
        "optimizer.learning_rate": float(rate),
        **dict.fromkeys(chosen.follows, float(rate)),
        **chosen.changes,
        "steps": settings.updates,
        "batch_size": settings.update_tokens // row_length(chosen),
        "optimizer.warmup_steps": min(20, settings.updates // 10),
        "evaluate_every": 0,
        "task.evaluation_split": "",
        "checkpoint_every": settings.updates,
    }
    return [
        sys.executable, "-m", "train", f"--config=configs/{chosen.config}.py",
        f"--workdir={export_folder(settings, method, rate, seed).parent / 'run'}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]  # fmt: skip
