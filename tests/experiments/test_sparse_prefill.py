"""What sparse prefill retains and costs, on a tiny real model."""

import pathlib

import numpy as np
import pytest

from experiments import bench_sparse_prefill, record, sparse_prefill, statements
from experiments.shown import sparse_prefill as shown
from models.load import Model
from tests.experiments.conftest import TEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(" ".join(f"Story {i}. {TEXT}" for i in range(400)))
    return str(path)


def settings(folder: pathlib.Path, text: str) -> sparse_prefill.Settings:
    """An experiment of seconds."""
    return sparse_prefill.Settings(
        model=str(folder / "stories260k"), text=text, seeds=(0,), tokens=300, chunk=144, local=16,
        threshold=0.99, step=64, cap=200, scale=0.02,
    )  # fmt: skip


@pytest.mark.slow
def test_the_experiment_runs(folder: pathlib.Path, text: str) -> None:
    rows = sparse_prefill.run(settings(folder, text))
    by = {row["method"]: row for row in rows}
    assert [*by] == [*sparse_prefill.POINTS, "searched", "refined", "uniform"]
    for kind, points in sparse_prefill.POINTS.items():
        recall = sparse_prefill.curve(by[kind], "recall", 0)
        assert len(recall) == len(points) and np.all((recall > 0) & (recall <= 1 + 1e-5))
        assert len(shown.curve_row(by[kind])) == 1 + len(points)
    assert by["refined"]["short"]["mean"] == 0
    assert by["refined"]["budget"]["mean"] <= by["uniform"]["budget"]["mean"]
    answers = statements.answer(rows, sparse_prefill.STATEMENTS, 1)
    assert all(a["holds"] is not None for a in answers)
    assert "vertical_slash" in sparse_prefill.show(rows)
    assert len(shown.refined_row(by["refined"])) == 6


def row(**lists: list[float]) -> dict:
    return {name: [record.sample([x]) for x in values] for name, values in lists.items()}


def test_patterns_are_compared_at_equal_density() -> None:
    ours = row(density=[0.1, 0.3, 0.9], recall=[0.5, 0.8, 1.0], error=[0.5, 0.2, 0.0])
    rival = row(density=[0.2, 0.4], recall=[0.6, 0.9], error=[0.4, 0.1])
    rows = {"vertical_slash": ours, "a_shape": rival}
    assert sparse_prefill.beats("a_shape")(rows, 0)  # 0.8 over 0.75 at 0.3, the only shared density
    rival["recall"] = [record.sample([x]) for x in (0.7, 0.95)]
    assert not sparse_prefill.beats("a_shape")(rows, 0)
    rival["density"] = [record.sample([x]) for x in (0.91, 0.95)]
    assert not sparse_prefill.beats("a_shape")(rows, 0)  # nothing to compare
    assert sparse_prefill.monotone(rows, 0)
    ours["error"] = ours["error"][::-1]
    assert not sparse_prefill.monotone(rows, 0)


def test_excerpts_differ_by_seed_and_must_be_long_enough(model: Model, text: str) -> None:
    a, b = (sparse_prefill.excerpt(model, text, 50, seed) for seed in (0, 1))
    assert a.shape == (1, 50) and not np.array_equal(a, b)
    with pytest.raises(ValueError, match="give a longer text"):
        sparse_prefill.excerpt(model, text, 10**6, 0)


@pytest.mark.slow
def test_the_benchmark_runs(model: Model, text: str) -> None:
    asked = bench_sparse_prefill.Settings(
        model="", text=text, seeds=(0,), lengths=("300",), chunk=144, local=16, layers=2,
        repeats=1, prompt=512, pieces=("64",),
    )  # fmt: skip
    rows = bench_sparse_prefill.run_speed(asked, model)
    assert [r["policy"] for r in rows][:2] == ["dense", "dual chunk"]
    assert all(len(shown.speed_row(r)) == 7 and r["seconds"]["min"] > 0 for r in rows)
    assert all(0 < r["recall"] <= 1 + 1e-5 for r in rows[2:])
    whole, piece = bench_sparse_prefill.run_memory(asked)
    assert whole["share"] == 1 and piece["bytes"] < whole["bytes"]
    assert len(shown.memory_row(piece)) == 3
