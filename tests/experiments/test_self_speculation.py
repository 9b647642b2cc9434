"""Both protocols of self-speculation on a tiny real model."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import self_speculation, self_speculation_exits, self_speculation_sets, statements
from experiments.exactness import is_exact
from models.load import Model
from research.speculative.swift.search import SkipSet


def settings(folder: pathlib.Path, protocol: str) -> self_speculation.Settings:
    """An experiment of seconds."""
    texts = f"text:{folder / 'texts'}"
    return self_speculation.Settings(
        protocol=protocol,
        model=str(folder / "stories260k"),
        prompts=(texts,),
        other=(texts,),
        seeds=(0,),
        count=4,
        prompt_tokens=12,
        new_tokens=48,
        ratio=0.35,
        ratios=(),
        max_score=0.95,
        checked=2,
    )


@pytest.mark.slow
def test_the_protocol_of_exits_runs(folder: pathlib.Path, model: Model) -> None:
    rows = self_speculation.run(settings(folder, "exits"))
    by = {row["method"]: row for row in rows}
    assert all(map(is_exact, rows))
    assert by["plain"]["layer_speedup"]["mean"] == 1.0
    best = by["best static"]
    exits = model.cfg.num_layers - 1
    assert len(best["grid"][0]) == exits * len(self_speculation_exits.GAMMAS)
    assert best["layer_speedup"]["mean"] == max(x[2] for x in best["grid"][0])
    assert best["average_static"]["mean"] <= best["layer_speedup"]["mean"]
    assert by["del"]["readouts"]["mean"] > 0 == by["fsm"]["readouts"]["mean"]
    answers = statements.answer(rows, self_speculation_exits.STATEMENTS, 1)
    assert all(a["holds"] is not None for a in answers)
    assert "del min" in self_speculation.show(rows, self_speculation_exits.NUMBERS)


@pytest.mark.slow
def test_the_protocol_of_sets_runs(folder: pathlib.Path) -> None:
    rows = self_speculation.run(settings(folder, "sets"))
    by = {row["method"]: row for row in rows}
    assert all(map(is_exact, rows))
    best = by["found"]["best"][0]
    assert len(best) > 0 and np.all(np.diff(best) >= 0)
    assert len(by["offline"]["best"][0]) == len(best)
    assert sum(by["found"]["skipped"][0]) in (2, 4)  # what was found, or every second layer yet
    assert by["fixed length"]["steps"]["mean"] > by["found chain"]["steps"]["mean"]
    answers = statements.answer(rows, self_speculation_sets.STATEMENTS, 1)
    assert all(a["holds"] is not None for a in answers)


def test_the_cost_of_a_draft_is_its_share_of_the_layers_parameters(model: Model) -> None:
    layers = model.cfg.num_layers
    attention, mlp = self_speculation_sets.sub_layer_parameters(model)
    none = jnp.zeros(layers, bool)
    assert self_speculation_sets.draft_cost(model, SkipSet(none, none)) == 1
    one = none.at[1].set(True)
    cost = self_speculation_sets.draft_cost(model, SkipSet(one, none))
    assert cost == pytest.approx(1 - attention / (layers * (attention + mlp)))


def test_layers_per_token_by_hand(model: Model) -> None:
    found = {
        "emitted": np.array([10.0, 6.0]), "rounds": np.array([4, 3]),
        "drafted": np.array([8, 4]), "accepted": np.array([6, 3]),
        "passes": np.array([4 * 5 + 8 * 2.0, 3 * 5 + 4 * 1.0]), "drafting": np.array([16.0, 4.0]),
    }  # fmt: skip
    assert model.cfg.num_layers == 5
    row = self_speculation_exits.summary(model, found, 2, True)
    assert row["layer_speedup"] == pytest.approx(16 * 5 / 55)
    assert row["by_domain"] == pytest.approx([10 * 5 / 36, 6 * 5 / 19])
    assert row["exit"] == 20 / 12 and row["acceptance"] == 9 / 12
    assert row["readouts"] == pytest.approx(5 * (12 / 7 + 1))


def test_a_ratio_that_skips_nothing_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="leaves out 0 of 6 sub-layers"):
        self_speculation_sets.check_ratio(model, (0.5, 0.1))
