"""DeepONet's experiments: what they count, and that they run."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import deeponet, deeponet_grids, deeponet_systems, record, statements
from experiments.operator_training import Schedule, solved, train
from experiments.shown import deeponet as shown
from models.deeponet import DeepONetConfig
from models.fnn import FNNConfig
from research.approximation.deeponet.data import Cartesian
from research.approximation.deeponet.task import DeepONetTask, FNNTask


def rows_of(errors: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    return [
        {
            "method": name,
            "model": name.rsplit("-", 1)[0],
            "size": int(name.rsplit("-", 1)[1]),
            "mse": record.sample(values),
            "train_mse": record.sample([1e-5] * len(values)),
            "ratio": record.sample([x / 1e-5 for x in values]),
        }
        for name, values in errors.items()
    ]


def test_orders_are_slopes_of_logarithms() -> None:
    sizes = (100, 200, 400, 800, 1600, 3200)
    rows = rows_of({f"deeponet-{n}": (3.0 * n**-1.5, 5.0 * n**-0.25) for n in sizes})
    rows += rows_of({f"fnn-{n}": (2.0 / n, 1.0 / n) for n in sizes})
    deeponet.add_orders(rows, 2)
    assert rows[0]["order"]["samples"] == pytest.approx([1.5, 0.25])
    assert rows[-1]["order"]["samples"] == pytest.approx([1.0, 1.0])
    answers = statements.answer(rows, deeponet.order_statements(sizes), 2)
    assert answers[0]["seeds"] == [True, False]
    assert answers[2]["seeds"] == [True, False]


def test_statements_of_the_rivals() -> None:
    errors = {"deeponet-10": (1e-4,), "fnn-10": (5e-4,), "stacked-10": (2e-4,),
              "no-bias-10": (9e-5,), "trapezoid-10": (1e-8,)}  # fmt: skip
    found = statements.answer(rows_of(errors), deeponet.rival_statements((10,)), 1)
    by = {a["statement"].removeprefix("10 functions: "): a["holds"] for a in found}
    assert by["DeepONet's test error is at least 10 times below that of the FNN"] is False
    assert by["unstacked is at most stacked"] is True
    assert by["the bias helps"] is False
    assert by["DeepONet beats the trapezoid rule on the sensors"] is False
    assert by["the bias helps the stacked form"] is None


def grid(n: int, seed: int) -> Cartesian:
    """A linear operator on 4 sensors and 5 points."""
    u = np.random.default_rng(seed).normal(size=(n, 4))
    y = np.linspace(0, 1, 5)
    return Cartesian(u, y[:, None], u @ np.cos(np.outer(np.arange(4), 3 * y)))


def test_one_program_trains_every_seed() -> None:
    """Seeds differ in their weights; updates beyond the schedule's number do not happen."""
    data = (grid(40, 0), grid(20, 1))
    model = DeepONetConfig((4, 16, 8), (1, 16, 8))
    tasks = [DeepONetTask(model=model, given=data, data_seed=seed) for seed in (0, 1)]
    short, long = (train(tasks, Schedule(steps, learning_rate=5e-3)) for steps in (3, 520))
    assert long[0].errors()["mse"] < 0.2 * short[0].errors()["mse"]
    assert short[0].train_mse != short[1].train_mse
    fnn = FNNTask(model=FNNConfig((5, 16, 1)), given=data)
    assert train([fnn], Schedule(300, 10, 1e-2, cosine=True))[0].errors()["relative_l2"] < 0.9


def test_solved_maps_have_their_own_errors() -> None:
    fitted, test = grid(6, 0), grid(4, 1)
    found = solved(lambda u: np.zeros((len(u), 5)), fitted, test)
    assert found["relative_l2"] == pytest.approx(1.0)
    assert found["train_mse"] == pytest.approx(float(np.mean(fitted.s**2)))


def test_the_floor_of_a_basis() -> None:
    fitted = grid(30, 0)
    assert deeponet_grids.floor(fitted, grid(10, 1), 4) < 1e-6
    assert 0.01 < deeponet_grids.floor(fitted, grid(10, 1), 2) < 1


def test_states_of_the_reaction_are_paired_in_time(tmp_path: pathlib.Path) -> None:
    t, x = np.meshgrid(np.arange(201.0), np.arange(201.0), indexing="ij")
    np.savez(tmp_path / "deepxde_reaction.npz", Ca=t, Cb=1000 * t + x)
    fitted, test = deeponet_grids.reaction_step(tmp_path)
    assert fitted.u.shape == (120, 102) and fitted.s.shape == (120, 51, 2)
    assert fitted.u[7, 0] == 7 and fitted.u[7, 51] == 7000
    assert fitted.s[7, 3].tolist() == [27, 27012] and len(test.u) == 61


def test_what_documents_show() -> None:
    """Cells and figures from made-up rows."""
    rows = rows_of({f"deeponet-{n}": (3.0 / n, 5.0 / n) for n in (10, 20, 40)})
    deeponet.add_orders(rows, 2)
    for row in rows:
        row["mse_without_outliers"], row["seconds"] = row["mse"], record.sample([2.0])
        row["relative_l2"] = row["floor"] = record.sample([0.01, 0.03])
        row |= {"system": "pendulum", "sensors": row["size"], "modes": 4}
        row |= {"functions": 500, "steps": 4000, "activation": "relu"}
    cells = shown.rival_row(rows[0])
    assert cells[:2] == ("10", "**DeepONet**") and cells[3] == "(4.0 ± 1.4)e-1"
    assert len(cells) == len(shown.RIVAL_HEADER)
    assert shown.system_row(rows[0]) == ("pendulum", "**DeepONet**", cells[3], "2.00 ± 1.41%")
    assert len(shown.pod_row(rows[0])) == len(shown.POD_HEADER)
    assert shown.pod_row(rows[0])[2:5] == ("ReLU", "500", "4,000")
    assert shown.scientific(record.sample([0.0])) == "0.0e+00"
    result = {"rows": rows, "config": {"steps": 5}}
    legend = shown.convergence(result).axes[0].get_legend()
    assert legend is not None and "order 1.00" in legend.get_texts()[0].get_text()
    assert len(shown.sensors(result).axes[0].lines) == 3
    field = np.arange(6.0).reshape(2, 3).tolist()
    rows[0]["example"] = {"source": [0.0, 1.0], "exact": field, "predicted": field}
    assert shown.solution(result).axes[2].get_title() == "POD-DeepONet, 4 modes"
    plt.close("all")


SMALL = {"seeds": (0, 1), "steps": 20}


@pytest.mark.slow
def test_the_rivals_run() -> None:
    settings = deeponet.Settings(
        study="rivals", methods=deeponet.METHODS, sizes=(40,), test_functions=30,
        learning_rates=(1e-3, 3e-3), **SMALL,
    )  # fmt: skip
    rows = deeponet.run(settings)
    by = {row["model"]: row for row in rows}
    assert list(by) == list(deeponet.METHODS)
    assert by["trapezoid"]["mse"]["max"] < 1e-6 < by["deeponet"]["mse"]["min"]
    answers = statements.answer(rows, deeponet.rival_statements((40,)), 2)
    assert all(a["holds"] is not None for a in answers)
    assert "stacked-40" in deeponet.show(rows)


@pytest.mark.slow
@pytest.mark.parametrize("study", ["systems", "sensors"])
def test_the_systems_run(study: str) -> None:
    settings = deeponet_systems.Settings(
        study=study, systems=tuple(deeponet_systems.SYSTEMS), sensors=(2, 4, 8), functions=12,
        test_functions=10, queries=6, **SMALL,
    )  # fmt: skip
    rows, wanted = deeponet_systems.STUDIES[study](settings)
    answers = statements.answer(rows, wanted, 2)
    assert answers and all(a["holds"] is not None for a in answers)
    names = {row["method"] for row in rows}
    assert study == "sensors" or {"pendulum/linear", "stochastic-path/kernel"} <= names


@pytest.mark.slow
def test_the_pod_study_runs() -> None:
    settings = deeponet_grids.Settings(
        study="pod", modes=(2, 4), functions=20, test_functions=8, **SMALL
    )
    rows, wanted = deeponet_grids.run_pod(settings)
    answers = statements.answer(rows, wanted, 2)
    assert len(rows) == 11 and all(a["holds"] is not None for a in answers)
    by = {row["method"]: row for row in rows}
    assert by["pod-4"]["floor"]["mean"] < by["pod-2"]["floor"]["mean"]
    assert (by["pod-4-more"]["functions"], by["pod-4-more"]["steps"]) == (80, 100)
