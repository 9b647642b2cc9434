"""The simulated decoding engines: their overheads, and what the statements say of them."""

from typing import Any

import pytest

from experiments import async_generation, record, statements
from experiments.async_generation import METHODS, STATEMENTS, Settings, draw, engine_of
from experiments.shown import pipeline as shown


def settings(**changes: Any) -> Settings:
    fields = {
        "methods": tuple(METHODS), "overheads": (0.0, 0.25, 0.5, 1.0, 2.0), "requests": 24,
        "rows": 4, "prompt": 10, "limit": 16, "stops": 0.5, "slots": 1000, "seeds": (0, 1),
    }  # fmt: skip
    return Settings(**(fields | changes))


def test_a_round_takes_the_overhead():
    one = engine_of("asynchronous", 0.6, settings())
    beside = one.schedule.of(4) + one.detokenise.of(4) + 3 * one.handover
    assert beside == pytest.approx(0.6) and one.device.of(4) == 1 and one.ahead == 1
    turn = engine_of("in-turn", 0.6, settings())
    assert turn.ahead == 0 == turn.handover and engine_of("two-ahead", 0.6, settings()).ahead == 2
    with pytest.raises(ValueError, match="unknown method 'ahead'"):
        engine_of("ahead", 0.6, settings())


def test_requests_stop_before_their_limit_or_not_at_all():
    found = draw(settings(requests=200), 0)
    stops = [r.stop_after for r in found if r.stop_after is not None]
    assert 70 < len(stops) < 130 and set(stops) <= set(range(1, 16))
    assert draw(settings(requests=200), 0) == found != draw(settings(requests=200), 1)


def test_the_whole_experiment(tmp_path, monkeypatch):
    asked = settings()
    rows = async_generation.run(asked)
    assert len(rows) == 5 * len(METHODS) and "asynchronous@0.5" in async_generation.show(rows)
    by = {row["method"]: row for row in rows}
    for seed in (0, 1):
        stopped = sum(r.stop_after is not None for r in draw(asked, seed))
        assert by["asynchronous@0.5"]["wasted"]["samples"][seed] == stopped
    # In turn, a step of 1 and 0.75 beside it in the one process.
    assert by["in-turn@1.0"]["idle"]["mean"] == pytest.approx(0.75 / 1.75, abs=0.01)
    found = statements.answer(rows, STATEMENTS, 2)
    assert [a["holds"] for a in found] == [True] * len(STATEMENTS)
    few = statements.answer(rows[:3], STATEMENTS, 2)
    assert few[0]["holds"] is None and few[3]["holds"]
    config = {"rows": 4}
    record.save(
        "async_generation", rows, config=config, seeds=[0, 1], statements=found, folder=tmp_path
    )
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = shown.Engines("engines").render()
    assert "| 0.25 | **three processes, one step ahead** |" in text and "Simulated, seeds" in text
