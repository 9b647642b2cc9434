import dataclasses
import json
import pathlib
import types
from typing import Any

import numpy as np
import pytest

from experiments import measure, statements
from experiments import speculative_bench as bench
from experiments.bare_loop import loop_overhead
from experiments.speculative_bench_statements import AVERAGED, STATEMENTS
from inference.drafter import NoDrafter
from inference.drafters.adaptive import AdaptiveDraftModel, AdaptiveParams, Fixed, Limits
from inference.engine import generated
from inference.loop import init_stats
from models import decoder
from models.load import Model
from ops.sampling import SamplingParams
from research.speculative.token_recycling.drafter import TokenRecycling


def settings(folder: pathlib.Path, **changes: Any) -> bench.Settings:
    given: dict[str, Any] = {
        "model": str(folder / "stories260k"), "drafters": ("lookup", "tuned:recycling"),
        "prompts": (f"prose=text:{folder / 'texts'}",),
        "chat": False, "count": 2, "prompt_tokens": 16, "new_tokens": 8, "temperatures": ("0",),
        "batches": ("2",), "repeats": 1, "seeds": (0,), "peers": False, "assistant": "",
    }  # fmt: skip
    return bench.Settings(**(given | changes))


@pytest.fixture(scope="module")
def rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    return bench.run(settings(folder))


@pytest.mark.slow
def test_every_side_is_measured_in_every_category(rows):
    sides = [r for r in rows if r["kind"] == "side"]
    assert [(r["drafter"], r["category"]) for r in sides] == [
        (name, "prose") for name in ("none", "lookup", "tuned:recycling")
    ]
    assert sides[0]["speedup"]["samples"] == [1.0]
    assert sides[0]["tokens_per_pass"] == 1.0
    assert all(r["tokens_per_second"]["mean"] > 0 for r in sides)
    json.dumps(rows)  # nothing but plain numbers


@pytest.mark.slow
def test_costs_batches_and_summaries_stand_beside(rows):
    costs = {r["width"]: r["ratio"] for r in rows if r["kind"] == "cost"}
    assert costs[1] == 1.0
    batches = [r for r in rows if r["kind"] == "batch"]
    assert {(r["drafter"], r["batch"]) for r in batches} == {
        ("none", 2), ("lookup", 2), ("tuned:recycling", 2),
    }  # fmt: skip
    found = {r["method"]: r for r in rows if r["kind"] == "summary"}
    lookup = found["lookup"]
    assert lookup["param_bytes"] == lookup["state_bytes"] == 0
    assert lookup["exactness"]["differing"] == lookup["exactness"]["near_ties"]
    per_pass = lookup["tokens_per_pass"]
    np.testing.assert_allclose(lookup["modelled"]["1.5"], per_pass / (1.5 + lookup["draft_cost"]))


def test_statements_look_at_the_best_drafter():
    def side(mean: float, best: float) -> dict[str, Any]:
        exact = {"differing": 0, "near_ties": 0}
        return {
            "mean_of": AVERAGED,
            "mean_speedup": {"mean": mean, "samples": [mean]},
            "overhead": 0.01,
            "best_speedup": {"mean": best, "samples": [best]},
            "exactness": exact,
        }

    rows = [{"method": "none"} | side(1.0, 1.0), {"method": "lookup"} | side(1.3, 1.4)]
    held = [a["holds"] for a in statements.answer(rows, STATEMENTS, 1)]
    assert held == [False, True, True, True]
    rows[1]["exactness"] = {"differing": 2, "near_ties": 1}
    assert not statements.answer(rows, STATEMENTS, 1)[3]["holds"]
    rows[0]["mean_of"] = ("code",)
    assert statements.answer(rows, STATEMENTS, 1)[1]["holds"] is None


def test_layers_that_draft_are_what_the_rounds_ran_beyond_their_passes():
    # Two rounds for three tokens; each ran half as many layers again for its draft.
    row = {"tokens_per_pass": 1.5, "layer_passes": 2 * 1.5 / 3}
    assert bench.own_layers([row]) == 0.5
    assert bench.own_layers([{"tokens_per_pass": 3.0, "layer_passes": 1 / 3}]) == 0


def counted(emitted: int) -> Any:
    """Counters of one row after one round."""
    stats = init_stats(1, 0, 1)
    return dataclasses.replace(stats, emitted=stats.emitted + emitted, rounds=stats.rounds + 1)


def test_what_prompts_teach_is_there_for_the_next_ones(
    folder: pathlib.Path, model: Model, monkeypatch: pytest.MonkeyPatch
):
    read: list[tuple[int, Any]] = []
    decoded: list[tuple[int, Any]] = []

    def spy(engine, prompts, new, sampling, eos, capacity, memory=None):
        key = prompts[0][0], memory
        read.append(key)

        def decode():
            decoded.append(key)
            state = {"stats": counted(1), "drafter": f"after {key[0]}"}
            return 1.0, types.SimpleNamespace(**state)

        return decode

    monkeypatch.setattr(measure, "prefilled", spy)
    monkeypatch.setattr(bench, "state_bytes", lambda state: 0)
    monkeypatch.setattr(bench, "generated", lambda state, prompts: [[5]])
    monkeypatch.setattr(bench, "other_prompts", lambda settings, model: [[7], [8]])
    sides = {"none": (NoDrafter(), None), "recycling": (TokenRecycling(), None)}
    engines = bench.make_engines(model, sides)
    given = settings(folder)
    memories = bench.experience(given, model, engines, 128)
    assert read == decoded == [(7, None), (8, "after 7")]
    assert memories == {"recycling": "after 8"}
    read.clear()
    decoded.clear()
    rows, texts = bench.decode_category(given, model, engines, [[1], [2]], 0.0, None, memories)
    first, second = [(1, None), (1, "after 8")], [(2, None), (2, "after 1")]
    assert read == [*first, *second]  # once, whatever the repeats
    # Backwards first, then the timed turn.
    assert decoded == [*first[::-1], *first, *second[::-1], *second]
    assert memories == {"recycling": "after 8"}  # the next category begins as this one did
    assert texts == {"none": [[5], [5]], "recycling": [[5], [5]]}
    assert rows["recycling"]["tokens_per_second"]["samples"] == [1.0]  # 2 tokens in 2 seconds


def test_a_prompt_that_was_read_once_is_decoded_again_and_again(model: Model):
    engine = bench.make_engines(model, {"none": (NoDrafter(), None)})["none"]
    decode = measure.prefilled(engine, [[1, 2, 3]], 6, SamplingParams.make(), ())
    texts = [generated(decode()[1], [[1, 2, 3]]) for _ in range(3)]
    assert texts == [engine.generate([[1, 2, 3]], 6).tokens] * 3


@pytest.mark.slow
def test_a_search_ends_before_it_is_timed(folder: pathlib.Path, model: Model, monkeypatch):
    monkeypatch.setattr(bench, "other_prompts", lambda settings, model: [[1, 2], [3]])
    names = ("found:swift:3", "swift:3")
    given = settings(folder, drafters=names, new_tokens=48)  # a set is judged by 33 tokens
    engines = bench.make_engines(model, bench.make_sides(given, model, {}))
    memories = bench.experience(given, model, engines, 128)
    assert int(memories["found:swift:3"].search.iterations) > 0
    ended = bench.after_search(engines)
    assert [getattr(ended[name].drafter, "search", None) for name in given.drafters] == [
        False,
        True,
    ]
    greedy = SamplingParams.make()
    for name, engine in ended.items():
        if name != "none":
            before = memories[name].search
            _, state = measure.prefilled(engine, [[4]], 48, greedy, (), 128, memories[name])()
            looked_on = state.drafter.search.iterations > before.iterations
            assert looked_on == (name == "swift:3")
    with pytest.raises(ValueError, match="lookup does not search"):
        bench.make_sides(settings(folder, drafters=("found:lookup",)), model, {})


def test_a_draft_that_ends_itself_costs_by_what_it_drafts(model: Model):
    draft = AdaptiveDraftModel(model.cfg, 4, rule=Fixed())
    params = AdaptiveParams(decoder.unstack(model.params), Limits.make(longest=4))
    fixed, each = measure.draft_costs(model, draft, params, [1, 2, 3])
    assert 0.9 < each < 1.1  # the model drafts for itself, a pass per token
    # Its own cache takes in what the last round kept, four tokens at most.
    assert 0.5 < fixed < 5
    with pytest.raises(ValueError, match="depends on its tokens"):
        measure.draft_cost(model, draft, params, [1, 2, 3])
    assert measure.draft_costs(model, NoDrafter(), None, [1, 2, 3]) == (0, 0)


def test_texts_that_are_not_greedy_are_not_summarised(folder: pathlib.Path):
    with pytest.raises(ValueError, match="add 0"):
        bench.run(settings(folder, temperatures=("1",)))


def test_the_bare_loop_decodes_the_same_tokens(model: Model):
    shares = loop_overhead(model, tokens=20, repeats=2)
    assert len(shares) == 2
    assert all(-1 < share < 20 for share in shares)


@pytest.mark.parametrize("entry", ["prose", "prose="])
def test_a_category_without_a_source_is_refused(entry: str, folder: pathlib.Path, model: Model):
    with pytest.raises(ValueError, match="is not NAME=SOURCE"):
        bench.categories(settings(folder, prompts=(entry,)), model, "test")


def test_lines_may_be_continued_rather_than_answered(
    folder: pathlib.Path, model: Model, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[str, bool]] = []

    def spy(sources, split, tokenizer, count, length, seed, chat):
        asked.append((sources[0], chat))
        return [[1]] * count

    monkeypatch.setattr(bench, "load_prompts", spy)
    given = ("a=FILE.jsonl:x", "b=raw:FILE.jsonl:x")
    bench.categories(settings(folder, prompts=given, chat=True), model, "test")
    assert asked == [("FILE.jsonl:x", True), ("FILE.jsonl:x", False)]
