"""The main comparison on a tiny real model: from its own texts to rows, and on after a stop."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from experiments import measure, replay, speculative
from experiments.exactness import is_exact
from experiments.speculative_statements import SPECULATIVE
from experiments.statements import answer
from inference.drafters.eagle import EagleDrafter
from inference.drafters.eagle_tree import EagleTreeDrafter
from inference.drafters.registry import make_drafter
from models.eagle import EagleConfig
from models.load import Model
from ops.tree import EAGLE_25


def settings(place: pathlib.Path, **changes: Any) -> speculative.Settings:
    """A comparison of seconds."""
    values: dict[str, Any] = {
        "model": str(place / "stories260k"),
        "folder": str(place / "run"),
        "prompts": (f"text:{place / 'texts'}",),
        "chat": False,
        "methods": ("none", "clover"),
        "seeds": (0, 1),
        "texts": 80,
        "prompt_tokens": 12,
        "text_tokens": 24,
        "steps": 4,
        "batch_size": 4,
        "heldout": 3,
        "new_tokens": 24,
        "draft_model": "",
        "draft_vocab": None,
        "variant": "",
        "speed_prompts": 1,
    }
    return speculative.Settings(**values | changes)


@pytest.mark.slow
def test_the_comparison_runs_and_goes_on_where_it_was(
    folder: pathlib.Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = speculative.run(settings(folder))
    by = {r["method"]: r for r in rows}
    assert list(by) == ["none", "clover"]
    assert all(map(is_exact, rows))
    assert by["none"]["tokens_per_pass@0"]["samples"] == [1.0, 1.0]
    assert min(by["clover"]["tokens_per_pass@0"]["samples"]) >= 1.0
    assert set(by["clover"]["accuracy"]) == {f"top{k}/head{i}" for k in (1, 3) for i in range(1, 6)}
    assert by["none"]["draft_cost"]["mean"] == 0 < by["clover"]["draft_cost"]["mean"]
    assert by["none"]["measured_speedup@1"]["mean"] == 1
    holds = {a["statement"]: a["holds"] for a in answer(rows, SPECULATIVE, 2)}
    assert holds["every greedy text is exact"] and holds["regression helps"] is None
    assert "clover" in speculative.show(rows)

    # Nothing is trained or measured again, and a row that is missing is made alone.
    (folder / "run" / "none-1.json").unlink()
    made = []
    real = speculative.measure_method

    def count(*arguments: Any) -> dict[str, Any]:
        made.append(arguments[2:4])
        return real(*arguments)

    monkeypatch.setattr(speculative, "measure_method", count)
    again = speculative.run(settings(folder))
    assert made == [("none", 1)]
    assert [r["tokens_per_pass@1"] for r in again] == [r["tokens_per_pass@1"] for r in rows]


def test_methods_may_share_heads_and_differ_in_their_trees(folder: pathlib.Path) -> None:
    eagle = EagleDrafter(EagleConfig())
    chain = speculative.reshaped("eagle-chain", eagle)
    assert (chain.width, chain.max_depth) == (EAGLE_25.max_depth + 1, EAGLE_25.max_depth)
    grown = speculative.reshaped("eagle-2", eagle)
    assert (grown.width, grown.max_depth) == (eagle.width, eagle.max_depth)
    assert isinstance(grown, EagleTreeDrafter)
    assert speculative.reshaped("eagle-like", eagle) is eagle
    names = {speculative.drafter_name(settings(folder), m, 0) for m in ("eagle-like", "eagle-2")}
    assert len(names) == 1


def test_a_folder_keeps_to_its_settings(
    folder: pathlib.Path, model: Model, tmp_path: pathlib.Path
) -> None:
    begun = settings(folder, folder=str(tmp_path))
    speculative.open_folder(begun, model)
    speculative.open_folder(dataclasses.replace(begun, seeds=(5,), methods=("none",)), model)
    with pytest.raises(ValueError, match=r"other settings \(batch_size, steps\): name another"):
        speculative.open_folder(dataclasses.replace(begun, steps=5, batch_size=9), model)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1e-3, model.params))
    with pytest.raises(ValueError, match=r"\(weights\)"):
        speculative.open_folder(begun, other)


def test_heads_take_the_config_of_their_variant(folder: pathlib.Path) -> None:
    assert not speculative.head_config("clover-no-distill", "").task.heads.distill
    shared = speculative.head_config("medusa", "smollm2").task
    assert shared.heads.shared_head and shared.target == "smollm2-135m"
    with pytest.raises(ValueError, match=r"no configs/eagle_smollm2\.py: leave out eagle-like"):
        speculative.run(settings(folder, methods=("none", "eagle-like"), variant="smollm2"))


def test_prompts_of_seeds_differ_and_repeat(folder: pathlib.Path, model: Model) -> None:
    first = speculative.heldout_prompts(settings(folder), model, 0)
    assert [len(p) for p in first] == [12, 12, 12]
    assert first == speculative.heldout_prompts(settings(folder), model, 0)
    assert first != speculative.heldout_prompts(settings(folder), model, 1)


@pytest.mark.parametrize("name", ["recycling", "none"])
def test_the_replay_shows_every_pass(folder: pathlib.Path, model: Model, name: str) -> None:
    drafter, params = make_drafter(name, model)
    prompt = speculative.heldout_prompts(settings(folder), model, 0)[0]
    passes = replay.passes_of(model, drafter, params, prompt, 24)
    text = np.concatenate([one.emitted for one in passes]).tolist()
    plain = measure.generate(model, drafter, params, [prompt], 24, 0.0, 0)
    assert text == plain.tokens[0] and len(passes) == plain.stats.rounds[0]
    for one in passes:
        kept = replay.kept_nodes(one)
        # The last emitted token is the model's own; the rest and the root were drafted.
        assert len(kept) == len(one.emitted)
        assert all(one.parent[node] in kept for node in kept - {0})
    page = replay.page(model, name, prompt, passes)
    (shown,) = re.findall(r"const passes = (.*);\n", page)
    shown = json.loads(shown)
    assert "".join(t for one in shown for t in one["text"]) == model.tokenizer.decode(
        [*prompt, *text]
    ).removeprefix(model.tokenizer.decode(prompt))
    assert [sum(n["kept"] for n in one["draft"]) for one in shown] == [
        len(one.emitted) for one in passes
    ]
