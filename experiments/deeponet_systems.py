"""DeepONet on other equations, and how many sensors it needs.

    python -m experiments.deeponet_systems --study=systems
    python -m experiments.deeponet_systems --study=sensors

Beside DeepONet and the fully connected network stands the strongest simple rival: for ordinary
equations the best linear regression on the networks' own triples, for others ridge regression from
the sensor values to the whole grid, which sees more of every function than the networks do, and for
paths of a stochastic equation Gaussian-process regression.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.operator_training import (
    Run,
    Schedule,
    errors_of,
    runs_of,
    show,
    solved,
    summarise,
    train,
)
from experiments.settings import from_flags
from experiments.statements import Statement, at_least, value
from models.deeponet import DeepONetConfig
from models.fnn import FNNConfig
from research.approximation.deeponet import baselines
from research.approximation.deeponet.problems import make_problem
from research.approximation.deeponet.task import DataTask, DeepONetTask, FNNTask


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    study: str
    systems: tuple[str, ...]
    sensors: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    functions: int
    test_functions: int
    queries: int


ORDINARY = {
    "nonlinear": {"name": "ode", "equation": "nonlinear"},
    "pendulum": {"name": "ode", "equation": "pendulum", "length": 3.0},
}
PARTIAL = {
    "diffusion-reaction": {"name": "diffusion_reaction"},
    "advection-I": {"name": "advection", "case": "I"},
    "advection-II": {"name": "advection", "case": "II"},
    "advection-III": {"name": "advection", "case": "III"},
    "advection-IV": {"name": "advection", "case": "IV"},
    "advection-diffusion": {"name": "advection_diffusion"},
    "stochastic-mean": {"name": "stochastic_ode", "output": "mean"},
    "legendre": {"name": "legendre"},
    "caputo": {"name": "caputo"},
}
PATHS = {"stochastic-path": {"name": "stochastic_ode", "output": "path"}}
SYSTEMS = ORDINARY | PARTIAL | PATHS
MODELS = {"linear": "the best linear map", "kernel": "Gaussian-process regression"}
DEFAULT = (
    "nonlinear",
    "pendulum",
    "diffusion-reaction",
    "advection-I",
    "advection-III",
    "advection-diffusion",
    "stochastic-path",
)


def tasks_of(system: str, settings: Settings) -> dict[str, Callable[[int], DataTask]]:
    """DeepONet and FNN on the same data, by seed."""
    problem = SYSTEMS[system]
    queries = 1 if system in ORDINARY else settings.queries
    functions = settings.functions * (10 if system in ORDINARY else 1)
    example = make_problem(problem).batched(np.random.default_rng(0), 1, 1)
    m, d = example.u.shape[1], example.y.shape[2]
    queries = min(queries, 20) if system == "legendre" else queries
    hidden = 40 if system in ORDINARY else 100

    def common(seed: int) -> dict[str, Any]:
        return {
            "problem": problem,
            "functions": functions,
            "test_functions": settings.test_functions,
            "queries": queries,
            "test_queries": queries,
            "normalise": True,
            "data_seed": seed,
        }

    ours = DeepONetConfig((m, hidden, hidden), (d, hidden, hidden, hidden))
    rival = FNNConfig((m + d, 100, 100, 1))
    return {
        "deeponet": lambda seed: DeepONetTask(model=ours, **common(seed)),
        "fnn": lambda seed: FNNTask(model=rival, **common(seed)),
    }


def simple_runs(system: str, settings: Settings) -> tuple[str, list[Run]]:
    """The strongest simple rival: a linear map of triples or of whole grids, for paths a kernel.

    Paths are not linear in their random numbers, so Gaussian-process regression stands in, on
    triples of eight functions for every one that the networks train on.
    """
    runs = []
    for seed in settings.seeds:
        draws = [np.random.default_rng([seed, part]) for part in (0, 1)]
        problem = make_problem(SYSTEMS[system])
        if system in PARTIAL:
            counts = (settings.functions, settings.test_functions)
            fitted, test = (problem.cartesian(r, n) for r, n in zip(draws, counts, strict=True))
            runs.append(solved(baselines.ridge(fitted.u, fitted.s), fitted, test))
            continue
        counts = (10 if system in ORDINARY else 8) * settings.functions, settings.test_functions
        fitted, test = (
            problem.batched(r, n, 1).aligned() for r, n in zip(draws, counts, strict=True)
        )
        found = baselines.kernel_ridge(fitted, linear=system in ORDINARY)
        train_mse = float(np.mean(np.square(found(fitted) - fitted.s)))
        runs.append({"train_mse": train_mse, **errors_of(found(test), test.s)})
    return ("kernel" if system in PATHS else "linear"), runs


def run_systems(settings: Settings) -> tuple[list[dict[str, Any]], tuple[Statement, ...]]:
    """Every system with DeepONet, FNN and the linear map."""
    rows, wanted = [], []
    for system in settings.systems:
        batch = 0 if system in ORDINARY else min(50, settings.functions)
        for name, make in tasks_of(system, settings).items():
            schedule = Schedule(settings.steps, batch, cosine=True)
            runs = runs_of(train([make(seed) for seed in settings.seeds], schedule))
            rows.append(summarise(f"{system}/{name}", runs, system=system, model=name))
        name, runs = simple_runs(system, settings)
        rows.append(summarise(f"{system}/{name}", runs, system=system, model=name))
        ours = f"{system}/deeponet"
        for rival, words in (("fnn", "the fully connected network"), (name, MODELS[name])):
            pair = (f"{system}/{rival}", ours)
            wanted.append(
                Statement(f"{system}: DeepONet beats {words}", pair, at_least(*pair, "mse"))
            )
    return rows, tuple(wanted)


def run_sensors(settings: Settings) -> tuple[list[dict[str, Any]], tuple[Statement, ...]]:
    """The pendulum with few sensors; the functions are the same for every number."""
    rows, schedule = [], Schedule(settings.steps, cosine=True)
    for m in settings.sensors:

        def make(seed: int, m: int = m) -> DataTask:
            return DeepONetTask(
                model=DeepONetConfig((m, 40, 40), (1, 40, 40)),
                problem={"name": "ode", "equation": "pendulum", "sensors": m},
                functions=4 * settings.functions,
                test_functions=4 * settings.test_functions,
                data_seed=seed,
            )

        runs = runs_of(train([make(seed) for seed in settings.seeds], schedule))
        rows.append(summarise(f"deeponet-{m}", runs, sensors=m))
    few, middle, many = (f"deeponet-{settings.sensors[i]}" for i in (0, -2, -1))
    wanted = (
        Statement(
            f"from {settings.sensors[0]} sensors to {settings.sensors[-2]} the error falls tenfold",
            (few, middle),
            at_least(few, middle, "mse", 10.0),
        ),
        Statement(
            f"from there to {settings.sensors[-1]} it changes by less than a factor of 3",
            (middle, many),
            lambda rows, seed: (
                1 / 3 < value(rows[many], "mse", seed) / value(rows[middle], "mse", seed) < 3
            ),
        ),
    )
    return rows, wanted


STUDIES = {"systems": run_systems, "sensors": run_sensors}


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    settings = dataclasses.replace(settings, sensors=tuple(int(m) for m in settings.sensors))
    if unknown := set(settings.systems) - set(SYSTEMS):
        raise app.UsageError(f"--systems: unknown {sorted(unknown)}, known are {list(SYSTEMS)}.")
    rows, wanted = STUDIES[settings.study](settings)
    print(show(rows))
    name = record.name_of(f"deeponet_{settings.study}", None, flags.FLAGS.label)
    statements.conclude(name, rows, wanted, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_enum("study", "systems", list(STUDIES), "Which comparison.")
    flags.DEFINE_list("systems", list(DEFAULT), "Equations of the systems study.")
    flags.DEFINE_list("sensors", ["2", "4", "6", "8", "10", "20"], "Of the sensors study.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of functions and weights.")
    flags.DEFINE_integer("steps", 4000, "Updates.", lower_bound=1)
    flags.DEFINE_integer(
        "functions",
        500,
        "For training; with one query each ten times as many, of the sensors study four times.",
    )
    flags.DEFINE_integer("test_functions", 500, "New functions.", lower_bound=1)
    flags.DEFINE_integer("queries", 50, "Random grid points of each function.", lower_bound=1)
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
