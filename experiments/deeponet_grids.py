"""DeepONet on shared grids: POD bases against a learned trunk, and data from files.

    python -m experiments.deeponet_grids --study=pod
    python -m experiments.deeponet_grids --study=files --data=FOLDER

Baselines are ridge regression from the sensor values to the whole grid, and to POD coefficients.
Files: Burgers and Darcy data of the neuraloperator project (``burgers_train_16.pt``, ...) and a
reaction solution of DeepXDE (``deepxde_reaction.npz``).
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.operator_training import Schedule, Trained, runs_of, show, solved, summarise, train
from experiments.settings import from_flags
from experiments.statements import Statement, at_least, value
from models import pod
from models.deeponet import DeepONetConfig
from research.approximation.deeponet import baselines
from research.approximation.deeponet.data import Cartesian, take
from research.approximation.deeponet.load import load_cartesian, read_arrays
from research.approximation.deeponet.problems import make_problem
from research.approximation.deeponet.task import DeepONetTask


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    study: str
    modes: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    functions: int
    test_functions: int


POD_GRID = {"name": "diffusion_reaction", "sensors": 50, "nt": 50}


@functools.lru_cache(maxsize=8)
def solutions(functions: int, test_functions: int, seed: int) -> tuple[Cartesian, Cartesian]:
    """(training, test) solutions of diffusion-reaction on the whole grid."""
    problem = make_problem(POD_GRID)
    fitted, test = (
        problem.cartesian(np.random.default_rng([seed, part]), count)
        for part, count in enumerate((functions, test_functions))
    )
    return fitted, test


def floor(fitted: Cartesian, test: Cartesian, modes: int) -> float:
    """The relative L2 error of the best approximation of the test functions in the basis."""
    mean, basis, _ = pod.pod_basis(np.asarray(fitted.s, np.float64), modes)
    left = pod.truncation_error(mean, basis, np.asarray(test.s, np.float64))
    return float(np.sqrt(left / np.mean(np.square(test.s, dtype=np.float64))))


MORE_FUNCTIONS, MORE_STEPS = 4, 5
"""How many times the functions and the updates of the row that shows what limits POD-DeepONet."""


def run_pod(settings: Settings) -> tuple[list[dict[str, Any]], tuple[Statement, ...]]:
    """Diffusion-reaction on a grid of 50 by 50: bases of several sizes against a learned trunk.

    The largest basis and the learned trunk are trained with a smooth activation too, and that
    basis on more functions and for more updates.
    """
    rows: list[dict[str, Any]] = []
    last = settings.modes[-1]

    def add(name: str, net: DeepONetConfig, more: bool = False, **about: Any) -> None:
        times = (MORE_FUNCTIONS, MORE_STEPS) if more else (1, 1)
        functions, steps = settings.functions * times[0], settings.steps * times[1]
        sets = [solutions(functions, settings.test_functions, seed) for seed in settings.seeds]
        trained = train(
            [
                DeepONetTask(model=net, given=data, normalise=True, data_seed=seed)
                for seed, data in zip(settings.seeds, sets, strict=True)
            ],
            Schedule(steps, min(100, functions), cosine=True),
        )
        runs = runs_of(trained)
        if net.modes:
            for run, data in zip(runs, sets, strict=True):
                run["floor"] = floor(*data, net.modes)
        about |= {"functions": functions, "steps": steps, "activation": net.activation}
        rows.append(summarise(name, runs, modes=net.modes or 0, **about))
        if name == f"pod-{last}":
            rows[-1]["example"] = picture(trained[0])

    def add_ridge(name: str, modes: int, functions: int, **about: Any) -> None:
        runs = []
        for seed in settings.seeds:
            a, b = solutions(functions, settings.test_functions, seed)
            fit = baselines.pod_ridge(a.u, a.s, modes) if modes else baselines.ridge(a.u, a.s)
            runs.append(solved(fit, a, b))
        rows.append(summarise(name, runs, modes=modes, functions=functions, **about))

    def pod_net(modes: int, **changes: Any) -> DeepONetConfig:
        fields = {"branch": (*branch, modes), "trunk": (2,), **changes}
        return DeepONetConfig(**fields, kind="pod", modes=modes, points=points)

    points = POD_GRID["sensors"] * POD_GRID["nt"]
    branch, trunk = (POD_GRID["sensors"], 100, 100), (2, 100, 100, 100)
    for activation, ending in (("relu", ""), ("gelu", "-gelu")):
        net = DeepONetConfig((*branch, 100), trunk, activation=activation)
        add(f"vanilla{ending}", net, model="vanilla")
    for modes in settings.modes:
        add(f"pod-{modes}", pod_net(modes), model="pod")
        add_ridge(f"pod-ridge-{modes}", modes, settings.functions, model="pod-ridge")
    add(f"pod-{last}-gelu", pod_net(last, activation="gelu"), model="pod")
    add(f"pod-{last}-more", pod_net(last), more=True, model="pod")
    extended = pod_net(last, branch=(*branch, last + 100), trunk=trunk)
    add(f"pod-{last}+trunk", extended, model="pod+trunk")
    add_ridge("ridge", 0, settings.functions, model="ridge")
    add_ridge("ridge-more", 0, settings.functions * MORE_FUNCTIONS, model="ridge")
    return rows, pod_statements(settings.modes)


def picture(run: Trained, stride: int = 2) -> dict[str, Any]:
    """One test function of a run: its source, and both solutions (x, t) on part of the grid."""
    test = run.task.sets[1]
    shape = (POD_GRID["sensors"], POD_GRID["nt"])
    rounded = lambda a: (
        np.round(a.astype(np.float64), 6).reshape(shape)[::stride, ::stride].tolist()
    )
    predicted = run.task.outputs(run.params, take(test, slice(0, 1)))
    return {
        "source": np.round(test.u[0].astype(np.float64), 5).tolist(),
        "exact": rounded(test.s[0]),
        "predicted": rounded(predicted[0]),
    }


def pod_statements(modes: Sequence[int]) -> tuple[Statement, ...]:
    """POD against a learned trunk, against ridge regression, and above its exact floor."""
    p = modes[-1]
    best = f"pod-{p}"
    wanted = [
        Statement(
            f"POD-DeepONet with {p} modes is at or below the vanilla one with the same branch",
            ("vanilla", best),
            at_least("vanilla", best, "relative_l2"),
        ),
        Statement(
            "the same with GELU in both",
            ("vanilla-gelu", f"{best}-gelu"),
            at_least("vanilla-gelu", f"{best}-gelu", "relative_l2"),
        ),
        Statement(
            f"POD-DeepONet with {p} modes beats ridge regression onto the same modes",
            (f"pod-ridge-{p}", best),
            at_least(f"pod-ridge-{p}", best, "relative_l2"),
        ),
    ]
    for p in modes:
        name = f"pod-{p}"
        wanted.append(
            Statement(
                f"the error with {p} modes is not below the exact truncation error",
                (name,),
                lambda rows, seed, name=name: (
                    value(rows[name], "relative_l2", seed) >= value(rows[name], "floor", seed)
                ),
            )
        )
    return tuple(wanted)


def burgers(folder: pathlib.Path) -> tuple[Cartesian, Cartesian]:
    """From the initial state to the solution over time; 16 points, 17 times."""
    train_set, test = (
        load_cartesian(folder / f"burgers_{part}_16.pt", ["x"], ["y"]) for part in ("train", "test")
    )
    return train_set, test


def darcy(folder: pathlib.Path) -> tuple[Cartesian, Cartesian]:
    """From the permeability on 16 by 16 points to the pressure."""
    train_set, test = (
        load_cartesian(folder / f"darcy_{part}_16.pt", ["x"], ["y"]) for part in ("train", "test")
    )
    return train_set, test


def reaction_step(folder: pathlib.Path, ahead: int = 20) -> tuple[Cartesian, Cartesian]:
    """Two concentrations now to the same two later: two inputs, two outputs, from one solution.

    States of the first 120 starting times are fitted, the later ones tested.
    """
    arrays = read_arrays(folder / "deepxde_reaction.npz")
    states = {name: arrays[name][:, ::4] for name in ("Ca", "Cb")}  # (time, every fourth place)
    pairs = {f"{k}{when}": v[rows] for k, v in states.items() for when, rows in (
        ("now", slice(0, -ahead)), ("later", slice(ahead, None)))}  # fmt: skip
    whole = load_cartesian(pairs, ["Canow", "Cbnow"], ["Calater", "Cblater"])
    part = lambda rows: Cartesian(whole.u[rows], whole.y, whole.s[rows])
    return part(slice(0, 120)), part(slice(120, None))


FILES = {"burgers": burgers, "darcy": darcy, "reaction-step": reaction_step}


def run_files(settings: Settings) -> tuple[list[dict[str, Any]], tuple[Statement, ...]]:
    """All data sets of the folder; seeds are of the weights."""
    rows, wanted = [], []
    for name, read in FILES.items():
        fitted, test = read(pathlib.Path(flags.FLAGS.data))
        rows += compare(name, fitted, test, settings)
        for kind in ("vanilla", "pod"):
            pair = (f"{name}/ridge", f"{name}/{kind}")
            wanted.append(
                Statement(f"{name}: {kind} beats ridge regression", pair, at_least(*pair, "mse"))
            )
    return rows, tuple(wanted)


def compare(
    name: str, fitted: Cartesian, test: Cartesian, settings: Settings
) -> list[dict[str, Any]]:
    """Vanilla and POD networks, ridge regression and the mean on one data set."""
    flat = fitted.s.reshape(len(fitted.s), -1)
    m, d, points = fitted.u.shape[1], fitted.y.shape[1], fitted.s.shape[1]
    outputs = 1 if fitted.s.ndim == 2 else fitted.s.shape[2]
    models = {
        "vanilla": DeepONetConfig((m, 100, 100), (d, 100, 100, 100), outputs=outputs),
        "pod": DeepONetConfig(
            (m, 100, 100, 32), (d,), kind="pod", modes=32, outputs=outputs, points=points
        ),
    }
    schedule = Schedule(settings.steps, min(100, len(fitted.u)), cosine=True)
    rows = []
    for kind, model in models.items():
        tasks = [
            DeepONetTask(model=model, given=(fitted, test), normalise=True, data_seed=seed)
            for seed in settings.seeds
        ]
        runs = runs_of(train(tasks, schedule))
        rows.append(summarise(f"{name}/{kind}", runs, system=name, model=kind))
    mean = flat.mean(0)
    simple = {
        "ridge": baselines.ridge(fitted.u, flat),
        "mean": lambda u: np.tile(mean, (len(u), 1)),
    }
    for kind, predict in simple.items():
        runs = [solved(predict, fitted, test)] * len(settings.seeds)
        rows.append(summarise(f"{name}/{kind}", runs, system=name, model=kind))
    return rows


STUDIES = {"pod": run_pod, "files": run_files}


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    settings = dataclasses.replace(settings, modes=tuple(int(p) for p in settings.modes))
    if settings.study == "files" and not flags.FLAGS.data:
        raise app.UsageError("--study=files needs --data=FOLDER with the files of its docstring.")
    rows, wanted = STUDIES[settings.study](settings)
    print(show(rows))
    name = record.name_of(f"deeponet_{settings.study}", None, flags.FLAGS.label)
    statements.conclude(name, rows, wanted, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_enum("study", "pod", list(STUDIES), "Which comparison.")
    flags.DEFINE_list("modes", ["4", "8", "16", "32"], "Of the pod study.")
    flags.DEFINE_string(
        "data", os.environ.get("LONGREACH_OPERATOR_DATA", ""), "Folder of the files study."
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of functions and weights.")
    flags.DEFINE_integer("steps", 4000, "Updates.", lower_bound=1)
    flags.DEFINE_integer("functions", 500, "For training, in the pod study.")
    flags.DEFINE_integer("test_functions", 200, "New functions.", lower_bound=1)
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
