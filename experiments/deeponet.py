"""DeepONet on the antiderivative: against its rivals, and how its error falls with the data.

    python -m experiments.deeponet --study=rivals
    python -m experiments.deeponet --study=order

Every seed draws its own functions, times and weights. Networks see one random time per function;
``linear`` and ``kernel`` are closed-form regressions on the same triples, and the trapezoid rule on
the sensors, which needs no data, is the strongest simple baseline of this operator.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.operator_training import Schedule, errors_of, show, train
from experiments.settings import from_flags
from experiments.statements import Statement, at_least, value
from models.deeponet import DeepONetConfig
from models.fnn import FNNConfig
from research.approximation.deeponet import baselines
from research.approximation.deeponet.data import Aligned
from research.approximation.deeponet.problems import make_problem
from research.approximation.deeponet.task import DataTask, DeepONetTask, FNNTask

NETWORKS = {
    "deeponet": {},
    "no-bias": {"use_bias": False},
    "stacked": {"stacked": True},
    "stacked-no-bias": {"stacked": True, "use_bias": False},
    "fnn": {},
}
CLOSED_FORM = ("linear", "kernel", "trapezoid")
METHODS = (*NETWORKS, *CLOSED_FORM)
SENSORS = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    study: str
    methods: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    test_functions: int
    learning_rates: tuple[float, ...]


@functools.lru_cache(maxsize=8)
def triples(size: int, seed: int, test_functions: int) -> tuple[Aligned, Aligned]:
    """One random time for each of ``size`` functions, and for as many new ones as are tested."""
    problem = make_problem({"name": "ode", "equation": "antiderivative", "sensors": SENSORS})
    counts = (size, test_functions)
    fitted, test = (
        problem.batched(np.random.default_rng([seed, part]), count, 1).aligned()
        for part, count in enumerate(counts)
    )
    return fitted, test


def make_task(method: str, data: tuple[Aligned, Aligned], seed: int) -> DataTask:
    """A network on these triples."""
    if method == "fnn":
        model = FNNConfig((SENSORS + 1, 100, 100, 1))
        return FNNTask(model=model, given=data, data_seed=seed)
    model = DeepONetConfig((SENSORS, 40, 40), (1, 40, 40), **NETWORKS[method])
    return DeepONetTask(model=model, given=data, data_seed=seed)


def closed_form(method: str, data: tuple[Aligned, Aligned]) -> dict[str, float]:
    """Errors of a baseline that is solved, not trained."""
    fitted, test = data
    predict: Callable[[Aligned], np.ndarray]
    if method == "trapezoid":
        sensors = np.linspace(0.0, 1.0, SENSORS)
        predict = lambda part: baselines.trapezoid(sensors, part.u, part.y)[:, 0]
    else:
        predict = baselines.kernel_ridge(fitted, method == "linear")
    train_mse = float(np.mean(np.square(predict(fitted) - fitted.s)))
    return {"train_mse": train_mse, **errors_of(predict(test), test.s)}


def measure(settings: Settings, method: str, size: int) -> list[dict[str, float]]:
    """What one method reaches on each seed, with ``size`` training functions.

    With several learning rates a network has the one that does best with seed 1000, which no
    reported run uses.
    """
    make = lambda seed: make_task(method, triples(size, seed, settings.test_functions), seed)
    rate = settings.learning_rates[0]
    if len(settings.learning_rates) > 1:
        schedules = [Schedule(settings.steps, learning_rate=r) for r in settings.learning_rates]
        reached = [train([make(1000)], schedule)[0].errors()["mse"] for schedule in schedules]
        rate = settings.learning_rates[int(np.argmin(reached))]
    tasks = [make(seed) for seed in settings.seeds]
    return [
        {"train_mse": run.train_mse, "seconds": run.seconds, "rate": rate, **run.errors()}
        for run in train(tasks, Schedule(settings.steps, learning_rate=rate))
    ]


def summarise(method: str, size: int, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"method": f"{method}-{size}", "model": method, "size": size}
    row |= record.samples(runs)
    row["ratio"] = record.sample([run["mse"] / max(run["train_mse"], 1e-30) for run in runs])
    return row


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods at all sizes."""
    rows = []
    for size in settings.sizes:
        for method in settings.methods:
            print(f"{method}, {size} functions", flush=True)
            if method in CLOSED_FORM:
                given = [triples(size, seed, settings.test_functions) for seed in settings.seeds]
                runs = [closed_form(method, data) for data in given]
            else:
                runs = measure(settings, method, size)
            rows.append(summarise(method, size, runs))
            print(show(rows[-1:]), flush=True)
    return rows


def rival_statements(sizes: Sequence[int]) -> tuple[Statement, ...]:
    """The protocol's statements at every size, and two on simple baselines."""
    found = []
    for n in sizes:
        ours = f"deeponet-{n}"

        def holds(text: str, other: str, factor: float = 1.0, ours: str = ours, n: int = n) -> None:
            test = at_least(other, ours, "mse", factor)
            found.append(Statement(f"{n} functions: {text}", (ours, other), test))

        holds("DeepONet's test error is at least 10 times below that of the FNN", f"fnn-{n}", 10.0)
        holds("unstacked is at most stacked", f"stacked-{n}")
        holds("the bias helps", f"no-bias-{n}")
        holds("DeepONet beats linear kernel regression on the same triples", f"linear-{n}")
        holds("DeepONet beats Gaussian-process regression on the same triples", f"kernel-{n}")
        holds("DeepONet beats the trapezoid rule on the sensors", f"trapezoid-{n}")
        pair = (f"stacked-no-bias-{n}", f"stacked-{n}")
        found.append(
            Statement(
                f"{n} functions: the bias helps the stacked form", pair, at_least(*pair, "mse")
            )
        )
    names = tuple(f"deeponet-{n}" for n in sizes)
    found.append(
        Statement(
            "DeepONet's ratio of test to training error falls with every size",
            names,
            lambda rows, seed: all(
                value(rows[a], "ratio", seed) > value(rows[b], "ratio", seed)
                for a, b in itertools.pairwise(names)
            ),
        )
    )
    return tuple(found)


def slope(rows: Sequence[dict[str, Any]], seed: int) -> float:
    """Least-squares slope of log test error against log size; seed number -1: of the means."""
    x = np.log([row["size"] for row in rows])
    return float(np.polyfit(x, np.log([value(row, "mse", seed) for row in rows]), 1)[0])


def add_orders(rows: list[dict[str, Any]], seeds: int) -> None:
    """Give each model's rows the convergence order over all of its sizes."""
    for row in rows:
        same = [r for r in rows if r["model"] == row["model"]]
        if len(same) > 1:
            row["order"] = record.sample([-slope(same, seed) for seed in range(seeds)])


def order_statements(sizes: Sequence[int]) -> tuple[Statement, ...]:
    """The paper's range of convergence orders, and the plateau."""
    first, last = f"deeponet-{sizes[0]}", f"deeponet-{sizes[-1]}"
    early, late = [f"deeponet-{n}" for n in sizes[:3]], [f"deeponet-{n}" for n in sizes[-3:]]

    def part(rows: dict[str, Any], names: Sequence[str], seed: int) -> float:
        return -slope([rows[name] for name in names], seed)

    return (
        Statement(
            "the test error falls with an order between a half and four in the number of functions",
            (first,),
            lambda rows, seed: 0.5 <= value(rows[first], "order", seed) <= 4.0,
        ),
        Statement(
            "the order is lower over the three largest sizes than over the three smallest",
            tuple({*early, *late}),
            lambda rows, seed: part(rows, late, seed) < part(rows, early, seed),
        ),
        Statement(
            "the error at the largest size is at least 10 times below that at the smallest",
            (first, last),
            at_least(first, last, "mse", 10.0),
        ),
    )


DEFAULTS = {
    "rivals": (METHODS, (500, 2000, 5000)),
    "order": (("deeponet",), (100, 200, 500, 1000, 2000, 5000)),
}


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    methods, sizes = DEFAULTS[settings.study]
    settings = dataclasses.replace(
        settings,
        methods=settings.methods or methods,
        sizes=tuple(int(n) for n in settings.sizes) or sizes,
        learning_rates=tuple(float(r) for r in settings.learning_rates),
    )
    if unknown := set(settings.methods) - set(METHODS):
        raise app.UsageError(f"--methods: unknown {sorted(unknown)}, known are {METHODS}.")
    rows = run(settings)
    wanted = rival_statements(settings.sizes)
    if settings.study == "order":
        add_orders(rows, len(settings.seeds))
        wanted = order_statements(settings.sizes)
    print(show(rows))
    name = record.name_of(f"deeponet_{settings.study}", None, flags.FLAGS.label)
    statements.conclude(name, rows, wanted, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_enum("study", "rivals", list(DEFAULTS), "Which comparison.")
    flags.DEFINE_list("methods", [], "What to compare; empty: the study's own choice.")
    flags.DEFINE_list("sizes", [], "Training functions; empty: the study's own choice.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of functions and weights.")
    flags.DEFINE_integer("steps", 4000, "Full-batch updates.", lower_bound=1)
    flags.DEFINE_integer("test_functions", 5000, "New functions.", lower_bound=1)
    flags.DEFINE_list("learning_rates", ["1e-3"], "Several: each network has its best.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
