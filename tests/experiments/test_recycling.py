"""Token Recycling's own experiment on a tiny real model."""

import pathlib

import numpy as np
import pytest

from experiments import recycling, statements
from experiments.exactness import is_exact
from experiments.replay import Pass
from models.load import Model


def settings(folder: pathlib.Path) -> recycling.Settings:
    """An experiment of seconds."""
    return recycling.Settings(
        model=str(folder / "stories260k"),
        prompts=(f"text:{folder / 'texts'}",),
        chat=False,
        bigrams=f"text:{folder / 'texts'}",
        methods=("recycling", "frozen", "bigrams"),
        seeds=(0,),
        count=4,
        prompt_tokens=12,
        new_tokens=32,
        frozen_after=2,
        checked=1,
    )


@pytest.mark.slow
def test_the_experiment_runs(folder: pathlib.Path) -> None:
    rows = recycling.run(settings(folder))
    by = {row["method"]: row for row in rows}
    assert list(by) == ["recycling", "frozen", "bigrams"] and all(map(is_exact, rows))
    learns = by["recycling"]
    assert len(learns["by_prompt"]) == 4 and len(learns["by_depth"]) == 6
    # A cold matrix drafts zeros below zeros; a table of bigrams has different successors only.
    assert learns["duplicates"]["mean"] > 0 == by["bigrams"]["duplicates"]["mean"]
    # The frozen one starts with what the other has learnt: from a cold matrix it would draft zeros.
    assert by["frozen"]["by_prompt"][0]["mean"] > 1
    answers = statements.answer(rows, recycling.STATEMENTS, 1)
    assert sum(a["holds"] is None for a in answers) == 3
    assert "recycling" in recycling.show(rows)


def test_what_was_learnt_goes_on_to_the_next_prompt(folder: pathlib.Path, model: Model) -> None:
    prompt = model.tokenizer.encode("Once upon a time")
    drafter = recycling.METHODS["recycling"]
    out = recycling.decode(model, drafter, None, [prompt, prompt], 32)
    assert out.texts[0] == out.texts[1] and out.rounds[1] < out.rounds[0]
    assert out.per_pass() == 64 / sum(out.rounds) and out.per_pass(slice(1)) == 32 / out.rounds[0]
    warm = recycling.decode(model, drafter, None, [prompt], 32, out.states[0])
    assert warm.rounds == out.rounds[1:]
    np.testing.assert_array_equal(warm.states[0].matrix, out.states[1].matrix)


def test_duplicates_are_siblings_with_the_same_token() -> None:
    one = Pass(
        tokens=np.array([9, 5, 5, 6, 5, 5]),
        parent=np.array([-1, 0, 0, 0, 1, 1]),
        emitted=np.array([5]),
    )
    assert recycling.duplicates([one]) == 2 / 5
    assert recycling.duplicates([one, Pass(np.array([1]), np.array([-1]), np.array([2]))]) == 2 / 5
