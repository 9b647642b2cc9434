"""The experiment on MetricGrids: its models, its rows, its pictures; and a run in small."""

import dataclasses
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from experiments import metric_grids, record, statements
from experiments.metric_grids_statements import STATEMENTS
from experiments.shown import metric_grids as shown
from models.coordinate_fields import InstantNGP
from models.metric_grids import MetricGrids
from models.params import count
from research.approximation.metric_grids import sdf


@pytest.fixture
def image(tmp_path: pathlib.Path) -> str:
    """A file of 20 x 24 smooth colours."""
    y, x = np.mgrid[0:20, 0:24] / 24
    waves = [0.5 + 0.4 * np.sin(6 * x + 4 * k * y + k) for k in range(3)]
    path = tmp_path / "waves.png"
    Image.fromarray(np.round(255 * np.stack(waves, -1)).astype(np.uint8)).save(path)
    return str(path)


def settings(part: str, *signals: str) -> metric_grids.Settings:
    """An experiment of seconds."""
    return metric_grids.Settings(
        part=part, signals=signals, methods=("ngp", "full"), seeds=(0, 1), sizes=(8,), crop=16,
        steps=30, rates=(1e-3, 4e-3), batches=2, batch=256, resolution=12,
    )  # fmt: skip


def test_equal_tables_and_equal_totals():
    fields = {m: metric_grids.make_field(m, 2, 3, 9) for m in metric_grids.METHODS}
    full = fields["full"]
    assert isinstance(full, MetricGrids)
    for method in ("ngp", "one-grid", "no-modulators"):
        assert fields[method].specs().table.shape == full.specs().table.shape
    budget = count(full.specs())
    assert abs(count(fields["siren"].specs()) - budget) < 0.02 * budget
    equal = metric_grids.make_field("ngp", 2, 3, 9, budget)
    assert isinstance(equal, InstantNGP) and equal.grid.log2_size > 9
    assert abs(count(equal.specs()) - budget) < 0.05 * budget
    assert count(fields["one-grid"].specs()) == budget
    with pytest.raises(ValueError, match="unknown method 'best': choose one of ngp"):
        metric_grids.make_field("best", 2, 3, 9)


def test_crops_are_the_middle(image: str):
    whole, crop = metric_grids.load_crop(image, 0), metric_grids.load_crop(image, 16)
    assert whole.shape == (20, 24, 3)
    np.testing.assert_array_equal(crop, whole[2:18, 4:20])
    with pytest.raises(ValueError, match="20 x 24 pixels: choose a smaller --crop"):
        metric_grids.load_crop(image, 21)


def test_a_whole_image_comes_in_parts_that_hold_every_pixel(image: str):
    whole, parts = metric_grids.image_signal(image, 0), metric_grids.image_signal(image, 0, 200)
    assert parts.points.shape == (3, 200, 2) and parts.targets.shape == (3, 200, 3)
    assert parts.batches == 3 and whole.batches is None
    seen = {tuple(row) for row in np.concatenate([parts.points, parts.targets], -1).reshape(-1, 5)}
    assert seen == {tuple(row) for row in np.concatenate([whole.points, whole.targets], -1)}
    assert shown.read_picture(whole.original).shape == (20, 24, 3)


def test_pictures_survive_a_result():
    values = np.random.default_rng(0).random((5, 4, 3))
    for channels in (1, 3):
        part = values[..., :channels]
        np.testing.assert_allclose(
            shown.read_picture(metric_grids.picture(part)), part, atol=0.5 / 255 + 1e-9
        )


@pytest.mark.slow
def test_the_table_part_runs(image: str, tmp_path: pathlib.Path):
    chosen = settings("table", image)
    rows = metric_grids.run(chosen)
    by = {row["method"]: row for row in rows}
    assert list(by) == ["ngp-8", "full-8"]
    for row in rows:
        assert row["bytes"] == 4 * row["parameters"]
        assert len(row["quality"]["samples"]) == 2 and len(row["sweep"]) == 2
        assert row["rate"] == max(row["sweep"], key=lambda s: s["quality"])["rate"]
        assert row["by_signal"]["waves"] == row["quality"]
    answers = statements.answer(rows, STATEMENTS["table"], 2)
    assert {a["holds"] for a in answers} == {None}  # they ask about all three sizes
    path = record.save("t", rows, config=chosen, seeds=(0, 1), statements=answers, folder=tmp_path)
    result = record.load("t", path.parent)
    cells = shown.metric_grids_row(result["rows"][1])
    assert len(cells) == len(shown.header(result, "PSNR")) and cells[0] == "**MetricGrids**"
    for draw in (shown.quality_against_bytes, shown.reconstructions):
        canvas = draw(result)
        assert len(canvas.axes) >= 1
        plt.close(canvas)
    assert "full-8" in metric_grids.show(rows)


@pytest.mark.slow
def test_the_other_parts_run(image: str, tmp_path: pathlib.Path):
    rows = metric_grids.run(settings("total", image))
    assert rows[0]["log2_size"] > rows[1]["log2_size"]
    answers = statements.answer(rows, STATEMENTS["total"], 2)
    assert [a["holds"] is None for a in answers] == [False, True]
    whole = dataclasses.replace(settings("photo", image), crop=0)
    rows = metric_grids.run(whole)
    assert statements.answer(rows, STATEMENTS["photo"], 2)[0]["holds"] is not None
    chosen = dataclasses.replace(
        settings("sdf", "torus"), methods=("full",), rates=(1e-3,), steps=300, batches=8,
        batch=1024, resolution=32,
    )  # fmt: skip
    rows = metric_grids.run(chosen)
    inside = np.mean(sdf.load_shape("torus").distance(sdf.cube(32).astype(np.float64)) < 0)
    assert rows[0]["quality"]["mean"] > 2 * inside  # the overlap if everything were inside
    record.save("s", rows, config=chosen, seeds=(0, 1), folder=tmp_path)
    canvas = shown.reconstructions(record.load("s", tmp_path))
    assert len(canvas.axes) == 5
    plt.close(canvas)


def test_statements_compare_the_right_rows():
    def row(method: str, quality: float, common: float) -> dict:
        return {
            "method": method,
            "quality": record.sample([quality]),
            "common_rate": record.sample([common]),
        }

    rows = []
    for size in (8, 9, 10):
        rows += [
            row(f"full-{size}", 35.0, 33.0), row(f"ngp-{size}", 34.0, 29.0),
            row(f"no-modulators-{size}", 32.5, 30.0), row(f"one-grid-{size}", 34.8, 33.0),
        ]  # fmt: skip
    holds = [a["holds"] for a in statements.answer(rows, STATEMENTS["table"], 1)]
    assert holds == [True, True, True, False]
    rows = [row("full", 35.0, 33.0), row("separate", 35.1, 33.0), row("siren", 25.0, 24.0)]
    holds = [a["holds"] for a in statements.answer(rows, STATEMENTS["variants"], 1)]
    assert holds == [False, True]
    rows = [row("full", 0.9, 0.9), row("ngp", 0.9, 0.9), row("no-modulators", 0.95, 0.9)]
    holds = [a["holds"] for a in statements.answer(rows, STATEMENTS["sdf"], 1)]
    assert holds == [True, False, None]
