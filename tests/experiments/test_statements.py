"""The protocol's statements are answered by the numbers, by their means and seed by seed."""

import dataclasses
import pathlib
from typing import Any

import pytest

from experiments import record
from experiments.speculative_statements import SPECULATIVE
from experiments.statements import Statement, answer, at_least, conclude, show


def row(method: str, per_pass: list[float], **accuracy: list[float]) -> dict[str, Any]:
    """A row of the comparison with two seeds."""
    exact = {"differing": 0, "near_ties": 0, "same_width_mismatches": 0}
    return {
        "method": method,
        "tokens_per_pass@0": record.sample(per_pass),
        "draft_cost": record.sample([0.1, 0.1]),
        "accuracy": {f"top1/{head}": record.sample(a) for head, a in accuracy.items()},
        "exactness": [exact, exact],
    }


def rows() -> list[dict[str, Any]]:
    """Clover a little better than Medusa in every way."""
    return [
        row("clover", [2.2, 2.4], head1=[0.5, 0.5], head2=[0.4, 0.4], head3=[0.3, 0.3]),
        row("medusa", [2.0, 2.0], head1=[0.51, 0.525], head2=[0.35, 0.36], head3=[0.2, 0.28]),
        row("clover-no-regression", [2.3, 2.0]),
    ]


def answers(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Answers by their statement."""
    return {a["statement"]: a for a in answer(rows, SPECULATIVE, 2)}


def test_statements_follow_from_the_numbers() -> None:
    got = answers(rows())
    close = got["Clover's head 1 is at most 2 points less accurate than Medusa's"]
    assert close["holds"] and close["seeds"] == [True, False]
    assert got["from head 2 on Clover is more accurate than Medusa"]["seeds"] == [True, True]
    grows = got["that gap grows with depth"]
    assert grows["holds"] and grows["seeds"] == [True, False]
    ahead = got["Clover's tokens per pass are at least 1.1 times Medusa's"]
    assert ahead["holds"] and ahead["seeds"] == [True, True]
    regression = got["regression helps"]
    assert regression["holds"] and regression["seeds"] == [False, True]
    assert got["every greedy text is exact"]["holds"]


def test_numbers_are_told_behind_a_statement_that_has_them() -> None:
    def positive(rows: dict[str, Any], seed: int) -> bool:
        return rows["a"]["x"] > 0

    told = Statement("x is positive", ("a",), positive, lambda rows: f"{rows['a']['x']} against 0")
    silent = Statement("x is positive, too", ("a",), positive)
    got = answer([{"method": "a", "x": 2}], (told, silent), 1)
    assert got[0]["numbers"] == "2 against 0" and "numbers" not in got[1]
    assert show(got).splitlines()[0].endswith("x is positive (1 of 1 seeds) (2 against 0)")
    (unknown,) = answer([], (told,), 1)
    assert unknown == {"statement": "x is positive", "holds": None, "seeds": []}


def test_what_was_not_measured_is_not_answered() -> None:
    got = answers(rows())
    for statement in ("distillation does not hurt", "the augmenting block helps"):
        assert got[statement] == {"statement": statement, "holds": None, "seeds": []}
    assert len(got) == len(SPECULATIVE)


@pytest.mark.parametrize(
    ("method", "change", "statement"),
    [
        ("medusa", {"tokens_per_pass@0": record.sample([2.2, 2.2])}, "at least 1.1 times"),
        ("clover", {"draft_cost": record.sample([0.2, 0.2])}, "fewer FLOPs"),
        ("medusa", {"exactness": 2 * [{"differing": 3, "near_ties": 2,
                                       "same_width_mismatches": 0}]}, "is exact"),
    ],
)  # fmt: skip
def test_a_worse_number_turns_its_statement(
    method: str, change: dict[str, Any], statement: str
) -> None:
    changed = [*rows(), row("eagle-like", [3.0, 3.0])]
    for r in changed:
        if r["method"] == "eagle-like":
            r["draft_cost"] = record.sample([0.15, 0.15])
    assert [a["holds"] for a in answer(changed, SPECULATIVE, 2) if statement in a["statement"]] == [
        True
    ]
    next(r for r in changed if r["method"] == method).update(change)
    assert [a["holds"] for a in answer(changed, SPECULATIVE, 2) if statement in a["statement"]] == [
        False
    ]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a measurement with two seeds."""

    model: str
    seeds: tuple[int, ...] = (4, 5)


def test_a_measurement_ends_with_its_answers_on_the_screen_and_in_its_result(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    asked = [Statement("one is best", ("a", "b"), at_least("a", "b", "x"))]
    measured = [
        {"method": "a", "x": record.sample([2.0, 1.0])},
        {"method": "b", "x": record.sample([1.0, 1.5])},
    ]
    conclude("trial", measured, asked, Settings("m"), {"load": 1.0})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [show(answer(measured, asked, 2)), f"saved {tmp_path / 'trial.json'}"]
    result = record.load("trial")
    assert result["rows"] == measured and result["config"] == {"model": "m", "seeds": [4, 5]}
    assert result["seeds"] == [4, 5] and result["timing"] == {"load": 1.0}
    (told,) = result["statements"]
    assert told["holds"] and told["seeds"] == [True, False]
