"""A sweep before it runs: the file that names it, its points, and what they make of the config."""

import copy
import difflib
import importlib.util
import pathlib
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from configs.sweep import Point, Search, Space, Sweep, Uniform
from train.config import TrainConfig, build, flatten

SAMPLERS = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
}


def load_sweep(path: str | pathlib.Path) -> Sweep:
    """What ``get_sweep()`` of a file returns, its points checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no ``get_sweep``, or a point does not fit the config.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep {path}: name a file of configs/sweeps/.")
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: name one of configs/sweeps/.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{path} has no get_sweep(): see configs/sweep.py for what it returns.")
    sweep = module.get_sweep()
    if not isinstance(sweep, Sweep):
        raise ValueError(f"get_sweep() of {path} returns no Sweep: see configs/sweep.py.")
    if isinstance(sweep.points, Search):
        if sweep.points.sampler not in SAMPLERS:
            raise ValueError(
                f"unknown sampler {sweep.points.sampler!r}: choose {', '.join(SAMPLERS)}."
            )
        distributions(sweep.points.space)
    elif not sweep.points:
        raise ValueError(f"the sweep {path} has no points.")
    for point in example_points(sweep):
        at_point(sweep, point)
    return sweep


def example_points(sweep: Sweep) -> list[Point]:
    """All points of a listed sweep; of a search, one with the lowest or first value of each key."""
    if not isinstance(sweep.points, Search):
        return list(sweep.points)
    space = sweep.points.space.items()
    return [{k: v.low if isinstance(v, Uniform) else v.values[0] for k, v in space}]


def at_point(sweep: Sweep, point: Point) -> TrainConfig:
    """The sweep's config with a point's values.

    Raises:
        ValueError: a key that the config lacks, or a value of another type.
    """
    return build(TrainConfig, values_at(sweep, point))


def values_at(sweep: Sweep, point: Point) -> dict[str, Any]:
    """The same as a nested dictionary; keys that refer to each other follow the point.

    Raises:
        ValueError: a key that the config lacks, or a value of another type.
    """
    known = flatten(sweep.config.to_dict())
    for key in point:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            raise ValueError(f"the sweep sets {key}, which its config lacks: {hint}")
    fresh = copy.deepcopy(sweep.config)  # keeps the references between its keys
    try:
        fresh.update_from_flattened_dict(point)
    except TypeError as error:
        raise ValueError(f"the sweep's point {point} does not fit: {error}") from error
    return fresh.to_dict()


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms.

    Raises:
        ValueError: a choice among values that are not numbers, text, truth values or None.
    """
    found: dict[str, BaseDistribution] = {}
    for key, values in space.items():
        if isinstance(values, Uniform):
            if values.integer:
                low, high = int(values.low), int(values.high)
                found[key] = optuna.distributions.IntDistribution(low, high, log=values.log)
            else:
                found[key] = optuna.distributions.FloatDistribution(
                    values.low, values.high, log=values.log
                )
        elif all(v is None or isinstance(v, bool | int | float | str) for v in values.values):
            found[key] = optuna.distributions.CategoricalDistribution(values.values)
        else:
            raise ValueError(
                f"the choices of {key} are {values.values}: a search can choose among numbers, "
                "text, truth values and None; name others in the config and choose by name."
            )
    return found


def horizon(config: TrainConfig) -> int:
    """How often a whole run evaluates; the last time is at its end."""
    if not config.evaluate_every:
        return 1
    return -(-config.steps // config.evaluate_every)
