"""The comparisons of ways to tell positions, for seconds."""

import dataclasses
import pathlib
import types
from typing import Any

import numpy as np
import pytest

from experiments import record, seqpe, seqpe_vit, statements
from inference.policies.interpolated import InterpolatedPolicy
from tests.inference.models import config
from tests.train.text import write_corpus


@pytest.mark.slow
def test_the_text_experiment_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_DATA", str(tmp_path / "cache"))
    corpus, tokenizer = write_corpus(tmp_path)
    (tmp_path / "test.txt").write_text(" ".join(["value index self"] * 400))
    settings = seqpe.Settings(
        folder=str(tmp_path / "runs"), methods=("seqpe", "rope", "rope_ntk", "learned"), seeds=(0,),
        corpus=corpus, tokenizer=tokenizer, text=str(tmp_path / "test.txt"), steps=10, batch_size=2,
        compute_dtype="float32", times=(1, 2), windows=2, batch_tokens=256,
    )  # fmt: skip
    rows = seqpe.run(settings)
    assert [row["method"] for row in rows] == list(settings.methods)
    for row in rows:
        assert 1 < row["at_1x"]["mean"] < 5000 and np.isfinite(row["at_2x"]["mean"])
    by = {row["method"]: row for row in rows}
    # Within the trained length another scaling is the same; beyond it is not.
    assert by["rope"]["at_1x"] == by["rope_ntk"]["at_1x"]
    assert by["rope"]["at_2x"] != by["rope_ntk"]["at_2x"]
    assert by["seqpe"]["candidates"] == 16 and 0 <= by["seqpe"]["nearest"]["mean"] <= 1
    assert "rope_ntk" in seqpe.show(rows)
    # A second time nothing is trained: the runs are there.
    again = seqpe.run(dataclasses.replace(settings, methods=("rope",)))
    assert again[0]["at_2x"] == by["rope"]["at_2x"]


def test_sinusoids_are_squeezed_into_the_trained_range_not_into_what_the_model_can_read():
    model = config(position="sinusoidal", max_length=160)
    task: Any = types.SimpleNamespace(model=model, sequence_length=32)
    policy = seqpe.policy_of("sinusoidal_squeezed", task, None, 64)
    assert isinstance(policy, InterpolatedPolicy) and policy.trained == 32


def row(method: str, *values: float) -> dict:
    """A row whose perplexities at 1, 8 and 16 trained lengths are given."""
    names = ("at_1x", "at_8x", "at_16x")
    return {
        "method": method,
        **{n: record.sample([float(v)]) for n, v in zip(names, values, strict=True)},
    }


def test_what_must_hold() -> None:
    learned = {"contrastive": record.sample([1.0]), "nearest": record.sample([0.7])}
    rows = [
        {**row("seqpe", 10.1, 12, 14), **learned, "candidates": 16},
        row("rope", 10.0, 100, 200),
        row("learned", 10.0, 30, 27),
        row("no_transfer", 10.0, 20, 16),
        row("alibi", 10.0, 9, 9),
    ]
    found = {a["statement"]: a["holds"] for a in statements.answer(rows, seqpe.STATEMENTS, 1)}
    by_rival = {r: found[seqpe.far_below(r).text] for r in ("rope", "learned", "sinusoidal")}
    assert by_rival == {"rope": True, "learned": False, "sinusoidal": None}
    assert sum(value is False for value in found.values()) == 2  # learned at 16 times, and ALiBi


def test_unknown_methods_are_refused() -> None:
    settings = seqpe.Settings("", ("rope2",), (0,), "", "", "", 10, 2, "float32", (1,), 1, 128)
    with pytest.raises(ValueError, match="unknown method 'rope2'"):
        seqpe.run(settings)


@pytest.mark.slow
def test_the_image_experiment_runs(tmp_path: pathlib.Path) -> None:
    settings = seqpe_vit.Settings(
        folder=str(tmp_path / "runs"), images="textures:400:16", classes=9, held_out=128,
        sizes=(16, 24), methods=("seqpe", "learned"), seeds=(0,), steps=10,
    )  # fmt: skip
    rows = seqpe_vit.run(settings)
    assert [r["method"] for r in rows] == ["seqpe", "learned"]
    assert {k for k in rows[0] if "_" in k} == {"scaled_16", "scaled_24", "placed_24"}
    answers = statements.answer(rows, seqpe_vit.make_statements((16, 24)), 1)
    assert sum(a["holds"] is None for a in answers) == 5  # without sinusoids and no_both
    assert "placed_24" in seqpe_vit.show(rows)
    with pytest.raises(ValueError, match="must grow"):
        seqpe_vit.run(dataclasses.replace(settings, sizes=(24, 16)))


def test_larger_images() -> None:
    images = np.random.default_rng(0).random((4, 6, 6, 1)).astype(np.float32)
    larger = seqpe_vit.placed(images, 9, seed=1)
    np.testing.assert_allclose(larger.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=1e-5)
    places = {tuple(np.argwhere(image[..., 0] > 0).min(0)) for image in larger}
    assert len(places) > 1 and max(max(p) for p in places) <= 3
    assert seqpe_vit.scaled(images, 9).shape == (4, 9, 9, 1)
    np.testing.assert_allclose(seqpe_vit.scaled(images, 6), images, atol=1e-6)


def test_a_result_is_extended_by_methods_that_it_lacks_or_has_anew() -> None:
    before = [row("seqpe", 10, 12, 14), row("rope", 20, 30, 40)]
    rows = seqpe.joined(before, [row("rope", 21, 30, 40), row("none", 30, 40, 50)])
    assert [one["method"] for one in rows] == ["seqpe", "rope", "none"]
    assert rows[1] == row("rope", 21, 30, 40)
