"""Steps of trainings for longer contexts, timed in turns."""

from typing import Any

import pytest

from experiments import context_steps, record, statements
from experiments.context_steps import STATEMENTS, Settings, run


def test_settings_that_cannot_run_are_refused():
    assert Settings(("clex", "rope256"), 512, 1).checked().methods == ("rope256", "clex")
    with pytest.raises(ValueError, match="unknown method 'nothing'"):
        Settings(("nothing",), 512, 1).checked()
    with pytest.raises(ValueError, match="--update_tokens=512"):
        Settings(("linear",), 511, 1).checked()


def test_steps_alternate_and_ratios_are_those_of_one_turn(monkeypatch: pytest.MonkeyPatch):
    turns: list[str] = []
    takes = {"rope256": iter([9.0, 1.0, 2.0, 4.0]), "clex": iter([9.0, 1.2, 2.2, 8.0])}

    class Fake:
        """A training that is known by its method."""

        compile_seconds = 0.0

        def __init__(self, method: str):
            self.run = method

    def seconds(method: Any) -> float:
        turns.append(method)
        return next(takes[method])

    monkeypatch.setattr(context_steps, "training", lambda method, tokens: Fake(method))
    monkeypatch.setattr(context_steps, "seconds", seconds)
    rows = run(Settings(("clex",), 4096, 3).checked())
    assert turns == ["rope256", "clex"] * 4
    assert rows[1]["ratio"]["samples"] == pytest.approx([1.2, 1.1, 2.0])
    (answer,) = statements.answer(rows, STATEMENTS, 3)
    assert answer["holds"] and answer["seeds"] == [True, True, False]
    assert answer["numbers"] == "1.20, the median"
    rows[1]["ratio"] = record.sample([1.2, 1.4, 1.5])
    assert not statements.answer(rows, STATEMENTS, 3)[0]["holds"]


@pytest.mark.slow
def test_every_step_that_is_timed_is_that_of_its_config():
    made = context_steps.training("clex", 512)
    assert made.tokens == 512 and made.task.ode.max_position == 256
    plain = context_steps.training("rope256", 512)
    assert plain.task.sequence_length == 256 and plain.task.basis.scale == 1.0
    for training in (made, plain):
        assert training.run()["loss"] > 0
