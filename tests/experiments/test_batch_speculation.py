"""The study of batched speculation on a tiny real model that drafts for itself."""

import pathlib
from typing import Any

import numpy as np
import pytest

from experiments import batch_speculation, statements
from experiments.batch_statements import BATCHED
from inference.batching import Batching, Job
from models.load import Model


def settings(folder: pathlib.Path, **changes: Any) -> batch_speculation.Settings:
    """An experiment of seconds."""
    fields: dict[str, Any] = {
        "model": str(folder / "stories260k"),
        "draft_model": str(folder / "stories260k"),
        "prompts": (f"text:{folder / 'texts'}",),
        "seeds": (0,),
        "count": 6,
        "shortest": 3,
        "longest": 12,
        "new_tokens": 12,
        "k": 3,
        "batches": (1, 2),
        "window": 4,
        "compared": 2,
    }
    return batch_speculation.Settings(**(fields | changes))


@pytest.mark.slow
def test_the_experiment_runs(folder: pathlib.Path) -> None:
    rows = batch_speculation.run(settings(folder))
    by = {row["method"]: row for row in rows}
    assert by["static-2"]["outcome"]["wrong"] == by["poisoned"]["outcome"]["wrong"] == 0
    assert by["padded"]["outcome"]["exact"] == 2
    # The model drafts for itself, so every round but the last commits four tokens.
    assert by["static-1"]["passes_per_token"]["mean"] < 0.5
    assert by["plain-1"]["passes_per_token"]["mean"] == 1.0
    assert by["exspec-2"]["passes_per_token"]["mean"] >= by["static-1"]["passes_per_token"][
        "mean"
    ] / 2  # fmt: skip
    answers = {a["statement"]: a for a in statements.answer(rows, BATCHED, 1)}
    assert answers["every text is that of single decoding, but for near-ties"]["holds"]
    assert "poisoned" in batch_speculation.show(rows)


def test_static_batches_take_the_passes_of_their_slowest_row(
    folder: pathlib.Path, model: Model
) -> None:
    work = batch_speculation.make_work(settings(folder), model, model, 0)
    out = batch_speculation.decode_static(work.plain, work, 2)
    assert [len(t) for t in out.texts] == work.new
    slowest = [max(work.new[i : i + 2]) for i in range(0, 6, 2)]
    assert out.forwards == sum(slowest)
    pool = Batching(work.plain, 2, work.capacity, rounds_per_call=1)
    texts = pool.generate([Job(p, n) for p, n in zip(work.prompts, work.new, strict=True)])
    assert [t.tokens for t in texts] == out.texts
    assert pool.counters.forwards <= out.forwards


def test_narrow_requests_have_one_length(folder: pathlib.Path, model: Model) -> None:
    work = batch_speculation.make_work(settings(folder), model, model, 0)
    assert len({len(p) for p in work.prompts}) > 1
    assert {len(p) for p in batch_speculation.narrow(work).prompts} == {
        min(len(p) for p in work.prompts)
    }


def test_the_reference_of_shorter_answers() -> None:
    whole = batch_speculation.Reference([[1, 2, 3], [4]], [np.ones(3), np.ones(1)])
    short = batch_speculation.cut(whole, [2, 5])
    assert short.texts == [[1, 2], [4]] and [len(m) for m in short.margins] == [2, 1]


def row(method: str, **numbers: Any) -> dict[str, Any]:
    samples = {n: {"samples": [v], "mean": v} for n, v in numbers.items() if n != "outcome"}
    extra = {"outcome": numbers["outcome"]} if "outcome" in numbers else {}
    return {"method": method} | samples | extra


def test_statements_compare_every_batch_size() -> None:
    right = {"exact": 4, "near_ties": 1, "wrong": 0}
    rows = [
        row(f"{kind}-{n}", passes_per_token=p / n, tokens_per_second=1.0 * n, outcome=right)
        for kind, p in (("static", 0.4), ("exspec", 0.3), ("pool", 0.3), ("plain", 1.0))
        for n in (1, 2, 8)
    ]
    answers = {a["statement"]: a["holds"] for a in statements.answer(rows, BATCHED, 1)}
    fewer = "at every batch size EXSPEC takes at most as many target passes as static batches"
    assert answers[fewer] is True
    assert answers["every text is that of single decoding, but for near-ties"] is True
    assert answers["every mistake of the padded form is caught"] is None
    worse = [r for r in rows if r["method"] != "exspec-2"]
    worse += [row("exspec-2", passes_per_token=0.9, tokens_per_second=1.0, outcome=right)]
    worse[0]["outcome"] = right | {"wrong": 1}
    answers = {a["statement"]: a["holds"] for a in statements.answer(worse, BATCHED, 1)}
    assert answers[fewer] is False
    assert answers["every text is that of single decoding, but for near-ties"] is False
