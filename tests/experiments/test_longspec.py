"""The experiment on LongSpec, on a tiny real model with layers that were not trained."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from experiments import longspec as experiment
from experiments import statements
from experiments.longspec_statements import STATEMENTS, kept, later
from models import longspec
from models import params as params_
from models.drafter_io import save_drafter
from models.load import Model
from research.speculative.longspec.drafter import KIND


def save(folder: pathlib.Path, model: Model, name: str, **changes: Any) -> str:
    """An exported layer with its first weights."""
    cfg = dataclasses.replace(longspec.LongSpecConfig(window=8), **changes)
    made = params_.init(longspec.specs(cfg, model.cfg), jax.random.key(0))
    save_drafter(folder / name, KIND, cfg, made, model.cfg)
    return f"{name}={folder / name}"


def settings(folder: pathlib.Path, drafts: tuple[str, ...]) -> experiment.Settings:
    """An experiment of seconds."""
    return experiment.Settings(
        model=str(folder / "stories260k"),
        policy="dense",
        others=("dual_chunk:16:4",),
        drafts=drafts,
        rivals=("lookup",),
        corpus=f"text:{folder / 'texts'}",
        seeds=(0, 1),
        edges=(24, 48),
        windows=2,
        prompts=2,
        prompt_tokens=20,
        new_tokens=12,
        shape=(2, 3),
        slots=(64, 200),
        repeats=2,
    )


@pytest.mark.slow
def test_the_experiment_runs(folder: pathlib.Path, model: Model, tmp_path: pathlib.Path) -> None:
    drafts = (save(tmp_path, model, "full"), save(tmp_path, model, "window-only", cross=False))
    given = settings(folder, drafts)
    rows = experiment.run(given)
    by = {row["method"]: row for row in rows}
    chunks = "full under dual_chunk:16:4"
    assert set(by) == {"full", chunks, "window-only", "lookup", "attention-64", "attention-200"}
    full = by["full"]
    # In chunks the keys meet other queries, and the texts are those of that policy.
    assert by[chunks]["policy"] == "dual_chunk:16:4" and full["policy"] == "dense"
    assert by[chunks]["nats@48/step1"] != full["nats@48/step1"]
    assert by[chunks]["mismatches/tree"]["mean"] == by[chunks]["mismatches/chain"]["mean"] == 0
    assert set(full["bytes"].values()) == {2 * 4 * 11 * 4 * 8 + 4 * 11 + 4}
    assert full["mismatches/tree"]["mean"] == full["mismatches/chain"]["mean"] == 0
    assert 1 <= full["tokens_per_pass/chain"]["mean"] <= 5
    # Only the target's keys are hidden from later steps, and the window alone reads none.
    alone = by["window-only"]
    assert alone["nats@48/step1"] == alone["nats@48/step4"]
    assert full["nats@48/step1"] != full["nats@48/step4"]
    assert by["attention-64"]["error"]["mean"] < 1e-5
    answers = statements.answer(rows, STATEMENTS, 2)
    held = {a["statement"]: a["holds"] for a in answers}
    assert held[STATEMENTS[4].text] and held[STATEMENTS[6].text]
    assert held[STATEMENTS[1].text] is None  # not measured
    assert "tokens_per_pass" in experiment.show(rows)


def test_bytes_of_one_length_answer_nothing() -> None:
    asked = [s for s in STATEMENTS if "bytes" in s.text]
    for sizes, held in (
        ({}, None),
        ({"4": 7}, None),
        ({"4": 7, "9": 7}, True),
        ({"4": 7, "9": 8}, False),
    ):
        rows = [{"method": "full", "bytes": sizes}]
        assert [a["holds"] for a in statements.answer(rows, asked, 1)] == [held]


def test_agreement_by_hand() -> None:
    def one(value: float) -> dict[str, Any]:
        return {"mean": value, "samples": [value]}

    row = {"edges": [256, 1024]} | {
        f"top1@{edge}/step{step}": one(x)
        for edge, values in ((256, (0.6, 0.5, 0.4, 0.3)), (1024, (0.3, 0.3, 0.2, 0.1)))
        for step, x in enumerate(values, 1)
    }
    assert kept(row, -1) == 0.5
    np.testing.assert_allclose(later(row, 0), (0.4 + 0.3 + 0.2) / 3)
    nothing = row | {f"top1@{edge}/step1": one(0.0) for edge in (256, 1024)}
    assert kept(nothing, -1) == 0.0


def test_other_policies_without_a_draft_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="--others is for the first of --drafts"):
        experiment.run(settings(folder, ()))


@pytest.mark.parametrize("draft", ["full", "best=folder", "full="])
def test_drafts_are_named_by_method(folder: pathlib.Path, model: Model, draft: str) -> None:
    with pytest.raises(ValueError, match="write METHOD=DIR, of full, no-offset"):
        experiment.load_drafts(settings(folder, (draft,)), model)
