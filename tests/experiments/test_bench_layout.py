"""The comparison of matrix layouts measures both of them at every width."""

from experiments.bench_layout import WIDTHS, measure
from models.load import Model
from ops.weights import WeightLeaf
from tests.inference.models import VOCAB, config, letters, weights


def test_both_layouts_are_timed_in_turn(monkeypatch) -> None:
    seen: list[tuple[int, bool]] = []

    def timed(engine, prompts, tokens):
        turned = isinstance(engine.params.segments[0].layers.mlp.up.w, WeightLeaf)
        seen.append((engine.drafter.width, turned))
        return 1.0 if turned else 1.5

    monkeypatch.setattr("inference.tuning.round_seconds", timed)
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    rows = measure(model, 8, repeats=2)
    assert [row["width"] for row in rows] == list(WIDTHS)
    assert seen[:6] == [(1, True), (1, False), (1, False), (1, True), (1, True), (1, False)]
    assert all(row["speedup"]["samples"] == [1.5, 1.5] for row in rows)
