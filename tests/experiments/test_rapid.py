"""The experiment on RAPID: its cases, its measures, and a run on a tiny model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rapid, statements
from inference.loop import init_stats
from models.load import Model, load
from tests.inference.models import config

SETTINGS = rapid.Settings(
    model="records-11m",
    drafter="",
    policy="",
    tasks=("lines-short",),
    methods=("long", "retrieved", "average", "eta-0", "eta-10"),
    seeds=(0,),
    count=2,
    length=128,
    chunk=16,
    budget=32,
    draft_length=4,
    retriever="bm25",
)


@pytest.fixture(scope="module")
def records() -> Model:
    return load("records-11m")


@pytest.fixture(scope="module")
def cases(records: Model) -> list[rapid.Case]:
    return rapid.make_cases(SETTINGS, records, "lines-short", 0)


def test_the_drafter_reads_the_question_and_the_lines_that_answer_it(records, cases):
    for case in cases:
        assert len(case.draft) < len(case.prompt) <= SETTINGS.length - 8
        assert case.draft[-1] == case.prompt[-1] == case.irrelevant[-1]
        text = records.tokenizer.decode(case.draft)
        assert case.example.answer in text and text.endswith(case.example.prompt.rsplit("\n", 2)[2])
        assert case.example.answer not in records.tokenizer.decode(case.irrelevant)


def test_likelihood_is_the_mean_log_probability_of_true_answers(records, cases):
    prompts = [case.prompt for case in cases]
    laws = rapid.reference_laws(records, None, prompts, cases)
    assert [law.shape[0] for law in laws] == [len(case.answer) for case in cases]
    np.testing.assert_allclose([law.sum(1).mean() for law in laws], 1, rtol=1e-4)
    flat = [np.full_like(law, 0.25) for law in laws]
    assert rapid.likelihood(flat, cases) == pytest.approx(np.log(0.25))


def test_bytes_count_the_target_once_a_round_and_the_drafter_once_a_token(cases):
    stats = init_stats(2, 4, 5)
    stats = dataclasses.replace(stats, rounds=jnp.asarray([3, 1]), emitted=jnp.asarray([6, 2]))
    cfg = config()
    slot = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * 4
    sizes = [slot * len(c.prompt) + 4 * 24 * len(c.draft) for c in cases]
    want = (3 * sizes[0] + sizes[1]) / 8
    assert rapid.kv_bytes(cfg, stats, cases, 4 * 24) == pytest.approx(want)


@pytest.mark.slow
def test_the_experiment_runs():
    rows = rapid.run(SETTINGS)
    by = {row["method"]: row for row in rows}
    assert tuple(by) == SETTINGS.methods
    assert by["eta-0"]["same_as_long"]["mean"] == 1
    assert by["eta-0"]["likelihood"]["mean"] == pytest.approx(
        by["long"]["likelihood"]["mean"], abs=1e-3
    )
    assert 0 < by["eta-10"]["acceptance"]["mean"] <= 1
    answers = statements.answer(rows, rapid.STATEMENTS, 1)
    assert sum(a["holds"] is None for a in answers) == 3
    assert "eta-10" in rapid.show(rows)


@pytest.mark.slow
def test_a_stronger_model_may_draft():
    """Upward speculation: the weaker model's text as long as nothing is transferred."""
    given = dataclasses.replace(SETTINGS, model="python-5m", drafter="records-11m")
    by = {row["method"]: row for row in rapid.run(given)}
    assert by["eta-0"]["same_as_long"]["mean"] == 1
    # What the drafter answers from its own context is not what the target does.
    assert by["retrieved"]["likelihood"]["mean"] > by["long"]["likelihood"]["mean"]
