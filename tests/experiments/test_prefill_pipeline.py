"""The simulated pipeline: its costs, what each method cuts, and the statements."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from experiments import prefill_pipeline, record
from experiments.fit import config_of
from experiments.prefill_pipeline import METHODS, Settings, cost_of, cut, draw, measure
from experiments.shown import pipeline as shown
from experiments.tpu_slices import V5E
from research.context.qwen25_1m.pipeline import ChunkCost

COST = ChunkCost(per_token=1.0, per_pair=0.01, fixed=100.0)


def settings(**changes: Any) -> Settings:
    fields = {
        "model": "qwen2.5-7b", "chip": "v5e", "lengths": (16384, 65536), "stages": (2, 4),
        "stream": 3, "piece": 8192, "multiple": 512, "deviation": 0.05, "methods": METHODS,
        "seeds": (0, 1),
    }  # fmt: skip
    return Settings(**(fields | changes))


def test_costs_are_those_of_the_shape():
    """28 layers: q and output 3584 by 3584, k and v of 512, an MLP of three 3584 by 18944."""
    found = cost_of(config_of("qwen2.5-7b"), "v5e")
    products = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    pair = 28 * 4 * 3584
    assert found.per_token == pytest.approx((2 * products + pair) / V5E.flops)
    assert found.per_pair == pytest.approx(pair / V5E.flops)
    assert found.fixed == pytest.approx(2 * products / V5E.bandwidth, rel=1e-3)  # biases, norms
    with pytest.raises(ValueError, match="unknown chip 'v9'"):
        cost_of(config_of("qwen2.5-7b"), "v9")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_cuts_all_of_the_prompts(method):
    lengths = [5000, 70000]
    plans = cut(method, lengths, COST, 4, settings())
    assert [plan.sum() for plan in plans] == lengths


def test_methods_that_are_compared_have_as_many_chunks():
    def counts(method: str) -> list[int]:
        return [len(plan) for plan in cut(method, [5000, 70000], COST, 4, settings())]

    assert counts("pieces") == counts("equal-cost-pieces") == counts("misjudged-pieces") == [1, 9]
    assert counts("equal-size") == counts("equal-cost") and counts("whole") == [1, 1]
    with pytest.raises(ValueError, match="unknown method 'halves'"):
        counts("halves")


def test_one_chunk_on_two_stages_leaves_half_of_them_idle():
    found = measure([np.array([1000])], COST, 2, 0.0, np.random.default_rng(0))
    work = 1000 + 0.01 * 1000 * 500
    assert found["bubble"] == 0.5 and found["makespan"] == work + 100
    assert found["over_ideal"] == pytest.approx(2 * (work + 100) / work)


def test_streams_differ_by_seed_and_single_prompts_do_not():
    asked = settings()
    assert draw(asked, 4096, 0) == [4096] == draw(asked, 4096, 1)
    one, other = draw(asked, None, 0), draw(asked, None, 1)
    assert len(one) == 3 and one != other and one == draw(asked, None, 0)
    assert all(4096 <= n <= 65536 for n in one + other)


def test_the_whole_experiment(tmp_path, monkeypatch):
    asked = settings(lengths=(131072, 1048576), multiple=8192, piece=32768, stages=(4,))
    rows = prefill_pipeline.run(asked)
    assert len([r for r in rows if r["kind"] == "method"]) == 3 * len(METHODS)
    found = prefill_pipeline.answers(rows, 2)
    assert found[0]["holds"] and found[1]["holds"] and all(found[0]["seeds"])
    partial = prefill_pipeline.answers([r for r in rows if r.get("method") != "pieces"], 2)
    assert partial[0]["holds"] is None and partial[2]["holds"] is not None
    record.save(
        "prefill_pipeline", rows, config=asked, seeds=asked.seeds, statements=found,
        folder=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = shown.Pipelines("pipeline-1m", 1048576).render()
    assert "pieces of 32k" in text and "Simulated, qwen2.5-7b at the peaks of v5e" in text
    left, right = shown.bubbles(record.load("prefill_pipeline")).axes
    assert len(left.lines) == len(right.lines) == 2


def test_statements_ask_for_every_scenario():
    def rows(*pieces: float) -> list[dict[str, Any]]:
        found = []
        for x in pieces:
            for method, bubble in (("pieces", x), ("equal-cost-pieces", 0.5)):
                numbers = dict.fromkeys(("bubble", "makespan", "chunks"), record.sample([bubble]))
                found.append({"kind": "method", "method": method, **numbers})
        return found

    assert prefill_pipeline.answers(rows(0.6, 0.7), 1)[0]["holds"]
    assert not prefill_pipeline.answers(rows(0.6, 0.4), 1)[0]["holds"]


def test_curves_fall_to_the_cost_of_all_chunks():
    row = prefill_pipeline.curve(65536, 4, dataclasses.replace(COST, fixed=0.0), 512)
    for name in ("equal-size", "equal-cost"):
        assert row[name]["bubble"][0] == 0.75 and row[name]["bubble"][-1] < 0.05
        assert len(row[name]["over_ideal"]) == len(row["counts"])
    inside = slice(1, -1)  # one chunk, and one block each, leave nothing to choose
    sizes, costs = (row[name]["bubble"][inside] for name in ("equal-size", "equal-cost"))
    assert all(a <= b + 1e-3 for a, b in zip(costs, sizes, strict=True))
