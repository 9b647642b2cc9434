"""The study of SpecDec++ on a tiny real model that drafts for itself."""

import dataclasses
import pathlib
from typing import Any

import pytest

from experiments import specdec_pp, statements
from experiments.specdec_pp_statements import FIXED, OURS, SPECDEC, below_fixed
from models.load import Model


def settings(folder: pathlib.Path, **changes: Any) -> specdec_pp.Settings:
    """An experiment of seconds."""
    fields: dict[str, Any] = {
        "model": str(folder / "stories260k"),
        "draft_model": str(folder / "stories260k"),
        "folder": str(folder / "study"),
        "prompts": (f"text:{folder / 'texts'}",),
        "chat": False,
        "methods": ("fixed-2", "fixed-16", "oracle", "specdec-0.5"),
        "seeds": (0,),
        "texts": 40,
        "prompt_tokens": 8,
        "text_tokens": 12,
        "steps": 4,
        "learning_rate": 1e-3,
        "heldout": 3,
        "new_tokens": 16,
    }
    return specdec_pp.Settings(**(fields | changes))


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on(folder: pathlib.Path) -> None:
    rows = specdec_pp.run(settings(folder))
    by = {row["method"]: row for row in rows}
    # The model drafts for itself: nothing is discarded, and rates are those of the lengths.
    for method, length in (("fixed-2", 2), ("fixed-16", 16)):
        assert by[method]["discarded"]["mean"] == 0
        assert by[method]["verified"]["mean"] == pytest.approx(1 / (length + 1))
        assert by[method]["cost@8"]["mean"] == pytest.approx((length + 8) / (length + 1))
    assert set(by["head-specdec"]) >= {"auc", "calibration_error"}
    assert by["head-specdec"]["label"]["mean"] == pytest.approx(1.0, abs=1e-3)
    assert by["greedy"]["exactness"][0]["same_width_mismatches"] == 0
    again = specdec_pp.run(settings(folder, methods=("fixed-2",)))
    assert again[0] == by["fixed-2"]
    with pytest.raises(ValueError, match="begun with other settings"):
        specdec_pp.run(settings(folder, steps=9))
    assert "specdec-0.5" in specdec_pp.show(rows)


def test_rules_share_programs(folder: pathlib.Path, model: Model) -> None:
    made = [
        specdec_pp.make_method(settings(folder), model, method, 0)
        for method in ("fixed-1", "fixed-9", "entropy-0.5", "entropy-3.0", "oracle")
    ]
    drafters = [drafter for drafter, _ in made]
    assert drafters[0] == drafters[1] and drafters[2] == drafters[3]
    assert len(set(drafters)) == 3 and len({d.width for d in drafters}) == 1
    assert int(made[1][1].limits.longest) == 9
    with pytest.raises(ValueError, match="unknown method 'fixed-0'"):
        specdec_pp.run(dataclasses.replace(settings(folder), methods=("fixed-0",)))


def point(method: str, verified: float, discarded: float, **more: float) -> dict[str, Any]:
    numbers = {"verified": verified, "discarded": discarded} | more
    return {"method": method} | {n: {"samples": [v], "mean": v} for n, v in numbers.items()}


def test_thresholds_are_compared_at_equal_verification() -> None:
    fixed = [point(m, 1 - 0.05 * i, 0.1 * i) for i, m in enumerate(FIXED)]
    rows = {row["method"]: row for row in fixed}
    for i, method in enumerate(OURS):
        # On the line of fixed lengths at i + 1, moved down for all but two.
        rows[method] = point(method, 1 - 0.05 * (i + 1), 0.1 * (i + 1) - (0.01 if i < 3 else -0.01))
    assert below_fixed(rows, 0) == 3
    rows[OURS[0]] = point(OURS[0], 1.2, 0.0)  # beyond all fixed lengths
    assert below_fixed(rows, -1) == 2


def test_statements_take_each_rule_at_its_best() -> None:
    costs = {f"cost@{r}": 2.0 for r in (4, 8, 16)}
    rows = [point(m, 0.5, 0.5, **costs) for m in (*FIXED, "confidence-0.6", "entropy-1.0")]
    rows += [point(m, 0.4, 0.4, **(costs | {"cost@8": 1.9})) for m in OURS]
    rows += [point("heuristic", 0.5, 0.5, **costs), point("target-text-0.1", 0.5, 0.5, **costs)]
    answers = [a["holds"] for a in statements.answer(rows, SPECDEC, 1)]
    three_percent = next(i for i, s in enumerate(SPECDEC) if "3% less" in s.text)
    every_ratio = next(i for i, s in enumerate(SPECDEC) if s.text.startswith("at every cost"))
    assert answers[three_percent] is True and answers[every_ratio] is False
    auc = next(i for i, s in enumerate(SPECDEC) if "AUC" in s.text)
    assert answers[auc] is None
