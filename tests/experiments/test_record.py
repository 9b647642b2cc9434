"""The results' schema."""

import json
import math

import pytest

from experiments import record


def test_a_result_comes_back_with_its_facts(tmp_path):
    rows = [{"method": "x", "value": record.sample([1.0, 2.0, 6.0])}]
    path = record.save("trial", rows, config={"a": 1}, seeds=[0, 1, 2], folder=tmp_path)
    result = record.load("trial", tmp_path)
    assert path == tmp_path / "trial.json"
    assert result["rows"] == rows and result["seeds"] == [0, 1, 2] and result["config"] == {"a": 1}
    assert rows[0]["value"]["mean"] == 3.0 and rows[0]["value"]["spread"] == pytest.approx(7**0.5)
    assert result["versions"]["jax"] and result["host"]["cores"] >= 1
    assert [p.name for p in tmp_path.iterdir()] == ["trial.json"], "no temporary file is left"


def test_statements_are_answered_again_and_all_else_stays(tmp_path):
    old = [{"statement": "x", "holds": False, "seeds": []}]
    record.save("trial", [{"a": 1}], config={}, seeds=[0], statements=old, folder=tmp_path)
    before = record.load("trial", tmp_path)
    record.restate("trial", [{"statement": "y", "holds": True, "seeds": []}], tmp_path)
    after = record.load("trial", tmp_path)
    assert after.pop("statements")[0]["statement"] == "y" and before.pop("statements") == old
    assert after == before and list(after) == list(before)


def test_a_result_tells_what_it_was_extended_from(tmp_path):
    first: dict = {}
    for name in ("first", "second", "third"):
        earlier = first if name != "first" else None
        path = record.save(name, [], config={}, seeds=[0], earlier=earlier, folder=tmp_path)
        first = record.load(path.stem, tmp_path)
    origin = {key: first[key] for key in ("commit", "modified", "date", "command")}
    assert "earlier" not in record.load("first", tmp_path)
    assert first["earlier"] == [origin, origin]


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_numbers_that_were_not_measured_are_refused(values):
    with pytest.raises(ValueError, match="finite samples"):
        record.sample(values)


def test_a_missing_damaged_or_foreign_result_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run its experiment"):
        record.load("nothing", tmp_path)
    (tmp_path / "cut.json").write_text('{"schema": 1, "rows": [')
    with pytest.raises(ValueError, match="not valid JSON"):
        record.load("cut", tmp_path)
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema 0"):
        record.load("old", tmp_path)


def test_bandwidth_is_positive_and_finite():
    assert 0 < record.memory_bandwidth(megabytes=4, repeats=2) < 1e5


def test_a_result_is_named_by_experiment_model_and_endings():
    assert record.name_of("bench", "runs/some-model", "", "label") == "bench_some_model_label"
    assert record.name_of("bench", "python-5m", "") == "bench_python_5m"
    assert record.name_of("fit", None, "a-label") == "fit_a-label"
    assert record.name_of("fit") == record.name_of("fit", None, "") == "fit"
