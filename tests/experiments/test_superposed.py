"""The experiment on superposed drafts, on a tiny real model."""

import dataclasses
import pathlib

import numpy as np
import pytest

from experiments import statements, superposed
from experiments.grading import distinct, grade
from models.load import Model


def settings(folder: pathlib.Path) -> superposed.Settings:
    """An experiment of seconds."""
    return superposed.Settings(
        model=str(folder / "stories260k"),
        grader="",
        corpus=f"text:{folder / 'texts'}",
        methods=superposed.METHODS,
        seeds=(0,),
        count=3,
        tuned_on=2,
        prompt_tokens=8,
        new_tokens=4,
        drafts=2,
        max_order=4,
        timed=True,
    )


@pytest.mark.slow
def test_the_experiment_runs(folder: pathlib.Path) -> None:
    rows = superposed.run(settings(folder))
    by = {row["method"]: row for row in rows}
    assert tuple(by) == superposed.METHODS
    assert [by[m]["passes"]["mean"] for m in superposed.METHODS] == [4, 4, 8, 8, 0, 4, 4]
    assert [len(by[m]["ranked"]) for m in superposed.METHODS] == [1, 1, 2, 2, 1, 2, 2]
    ours = by["superposed"]
    assert not ours["lossless"] and by["beam"]["lossless"]
    assert len(ours["grid"]) == 35 and ours["alpha"] in superposed.ALPHAS
    # The first input is a token's own embedding, so there is nothing to be linear in.
    assert ours["linearity"][0]["raw"]["mean"] == pytest.approx(1, abs=1e-4)
    assert ours["linearity"][0]["centred"]["mean"] == pytest.approx(1, abs=1e-4)
    assert len(ours["linearity"]) == 4
    assert ours["seconds"]["mean"] > 0
    assert by["greedy"]["best"]["mean"] == by["greedy"]["mean"]["mean"]
    answers = statements.answer(rows, superposed.STATEMENTS, 1)
    assert all(a["holds"] is not None for a in answers) and answers[3]["holds"]
    assert "unsmoothed" in superposed.show(rows)


def test_grades_are_the_models_own_perplexities(model: Model) -> None:
    prompt = model.tokenizer.encode("Once upon a time")
    text = model.tokenizer.encode(" there was")
    one = grade(model, [prompt, prompt[:2]], [[text, text[:1]], [text]])
    assert one.shape == (2, 2) and one[1, 0] == one[1, 1]
    alone = grade(model, [prompt], [[text]])[0, 0]
    np.testing.assert_allclose(one[0, 0], alone, rtol=1e-4)
    first = np.log(one[0, 1])
    rest = grade(model, [[*prompt, text[0]]], [[text[1:]]])[0, 0]
    joint = (first + (len(text) - 1) * np.log(rest)) / len(text)
    np.testing.assert_allclose(np.log(alone), joint, rtol=1e-4)


def test_distinct_counts_ngrams_among_the_drafts_of_a_prompt() -> None:
    assert distinct([[[1, 2, 3], [1, 2, 4]]], 1) == 4 / 6
    assert distinct([[[1, 2, 3], [1, 2, 4]], [[1, 1]]], 2) == (3 / 4 + 1) / 2


def test_another_tokenizer_cannot_grade(folder: pathlib.Path) -> None:
    given = settings(folder)
    with pytest.raises(ValueError, match="another tokenizer"):
        superposed.run(dataclasses.replace(given, grader="python-1m"))
