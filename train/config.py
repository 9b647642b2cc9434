"""Configs: from the nested dictionaries that people write to frozen dataclasses.

Every key is checked, so that a misspelt one is an error that names the nearest known key. The
dataclasses here have no defaults: those are in ``configs/defaults.py`` alone.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from train.resolve import resolve

T = TypeVar("T")

MAY_CHANGE = (
    "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "tensorboard",
    "max_bad_steps",
)  # fmt: skip
"""Top-level keys that do not influence the trained values: a run may resume with others."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimiser with its schedule; see ``train.optimizer``."""

    name: str  # adamw or sgd
    learning_rate: float  # at the end of the warm-up
    schedule: str  # cosine, linear or constant
    warmup_steps: int
    final_fraction: float  # of learning_rate, at the last step of cosine and linear
    weight_decay: float  # of matrices only, times the learning rate
    beta1: float  # sgd: momentum
    beta2: float
    eps: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that one run is; written to ``config.json`` of its folder.

    ``batch_size`` counts rows per update over all devices, in ``microbatches`` equal parts.
    ``groups`` maps names that the task gives to parameters to changes of ``optimizer``.
    """

    task: Mapping[str, Any]  # name (module:attribute) and the fields of that task
    seed: int
    steps: int
    batch_size: int
    microbatches: int
    steps_per_call: int  # updates per compiled call: more pays when one takes under ~10 ms
    compute_dtype: str  # float32 or bfloat16; parameters and sums stay float32
    clip: str  # norm, group_norm (each optimiser group by itself), value or none
    clip_threshold: float
    ema_decay: float  # 0: no moving average
    max_bad_steps: int  # stop after so many updates in a row that are not finite
    log_every: int
    evaluate_every: int  # 0: only at the end
    checkpoint_every: int
    keep_checkpoints: int
    tensorboard: bool
    optimizer: OptimizerConfig
    groups: Mapping[str, Mapping[str, Any]]

    def __post_init__(self):
        for name in (
            "steps", "batch_size", "microbatches", "steps_per_call", "max_bad_steps",
            "log_every", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"config.{name} is {getattr(self, name)}: give at least 1.")
        for name in ("seed", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.{name} is {getattr(self, name)}: give 0 or more.")
        _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        _one_of("clip", self.clip, ("norm", "group_norm", "value", "none"))
        if self.clip != "none" and not self.clip_threshold > 0:
            raise ValueError(
                f"config.clip_threshold is {self.clip_threshold}: give a positive number, "
                "or clip='none'."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"config.ema_decay is {self.ema_decay}: give 0 (none) up to below 1.")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"config.batch_size {self.batch_size} is not a multiple of microbatches "
                f"{self.microbatches}: change one of them."
            )
        for name in ("steps", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) % self.steps_per_call:
                raise ValueError(
                    f"config.{name} {getattr(self, name)} is not a multiple of steps_per_call "
                    f"{self.steps_per_call}: change one of them."
                )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"config.{name} is {value!r}: choose one of {', '.join(known)}.")


def build(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """A dataclass from a (nested) dictionary: fields that are dataclasses are built likewise.

    Raises:
        ValueError: a key that the dataclass lacks (with the nearest that it has), a key that is
            missing, or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(fields))}."
            raise ValueError(f"unknown key {where}.{key}: {hint}")
    built = {k: _convert(v, hints[k], f"{where}.{k}") for k, v in values.items()}
    for name, field in fields.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if name not in built and no_default:
            raise ValueError(f"{where}.{name} is missing: add it to the config.")
    return cls(**built)


def build_task(config: TrainConfig) -> Any:
    """The task that ``config.task`` names, with the rest of ``config.task`` as its fields."""
    fields = dict(config.task)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError("config.task.name is missing: name the task as module:attribute.")
    return build(resolve(name), fields, "config.task")


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        # A union of plain types accepts the first that fits; there is at most one dataclass in it.
        for arg in (a for a in args if a is not type(None)):
            if dataclasses.is_dataclass(arg) or _fits(value, typing.get_origin(arg) or arg):
                return _convert(value, arg, where)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, where)
    elif origin is tuple and isinstance(value, list | tuple):
        item = args[0] if args else Any
        return tuple(_convert(v, item, where) for v in value)
    elif _fits(value, origin or hint):
        return float(value) if hint is float else value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} is {value!r}: it must be of type {name}.")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    if kind is tuple:
        return isinstance(value, list | tuple)
    return isinstance(kind, type) and isinstance(value, kind)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def first_difference(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str = "the checkpoint",
    may_change: tuple[str, ...] = MAY_CHANGE,
) -> str | None:
    """``'key is A in the checkpoint and B now'`` for the first key that matters, or None."""
    old, new = flatten(saved), flatten(now)
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "absent"), new.get(key, "absent")
        if key.split(".")[0] not in may_change and before != after:
            return f"{key} is {before!r} in {where} and {after!r} now"
    return None
