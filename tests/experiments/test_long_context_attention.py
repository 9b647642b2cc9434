"""Attention on the evidence, against softmax by hand and against windows that cannot see it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.long_context_attention import (
    EvidenceProbe,
    attention_map,
    evidence_mass,
    evidence_span,
    measure_set,
)
from experiments.long_context_tasks import PromptEncoder, make_task_set
from inference.policies.registry import make_policy
from models import decoder
from models.attention import Step
from models.load import Model
from train.data.long_tasks.registry import Materials
from train.data.long_tasks.text import made_up_source

LENGTH = 40
DATA = Materials(made_up_source(0, 400))


def probed(model: Model, policy: str, evidence: np.ndarray, lengths=(LENGTH, LENGTH)) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(3, model.cfg.vocab_size, evidence.shape)
    found = evidence_mass(
        model.params, model.cfg, make_policy(policy, model.cfg),
        jnp.asarray(tokens, jnp.int32), jnp.asarray(evidence), jnp.asarray(lengths, jnp.int32),
    )  # fmt: skip
    return np.asarray(found)


def marked(*places: int) -> np.ndarray:
    evidence = np.zeros((2, LENGTH), np.float32)
    evidence[:, list(places)] = 1
    return evidence


def test_mass_is_that_of_the_softmax():
    """One head, one query: logits 0, ln 2 and ln 5 give the middle key 2 of 8."""
    cfg = decoder.Config(
        vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4,
        intermediate_size=4, max_length=8,
    )  # fmt: skip
    logits = 2 * np.log([1.0, 2.0, 5.0])  # scaled by 1 / sqrt(4)
    k = np.zeros((1, 3, 1, 4), np.float32)
    k[0, :, 0, 0] = logits
    q = np.zeros((1, 3, 1, 4), np.float32)
    q[..., 0] = 1
    step = Step(jnp.arange(3, dtype=jnp.int32)[None])
    probe = EvidenceProbe(
        decoder.default_policy(cfg), jnp.asarray([[0.0, 1.0, 0.0]]), jnp.asarray([2])
    )
    v = jnp.ones((1, 3, 1, 4))
    got = probe.attend(None, None, jnp.asarray(q), jnp.asarray(k), v, None, step, None)
    np.testing.assert_allclose(got.aux["evidence"], [[0.25]], rtol=1e-5)


@pytest.mark.parametrize("policy", ["dense", "yarn:4", "dual_chunk:24:8", "window:16"])
def test_parts_make_up_the_whole(model: Model, policy: str):
    every = probed(model, policy, np.ones((2, LENGTH), np.float32))
    np.testing.assert_allclose(every, 1, atol=1e-5)
    assert every.shape == (model.cfg.num_layers, 2, model.cfg.num_heads)
    first, rest = (
        probed(model, policy, marked(*range(9))),
        probed(model, policy, marked(*range(9, LENGTH))),
    )
    np.testing.assert_allclose(first + rest, 1, atol=1e-5)


def test_a_window_gives_nothing_to_what_it_cannot_see(model: Model):
    far, near = marked(LENGTH - 17), marked(LENGTH - 16)
    assert (probed(model, "window:16", far) == 0).all() and probed(model, "dense", far).max() > 0.01
    assert probed(model, "window:16", near).max() > 0.01


def test_the_last_token_of_the_prompt_asks_and_padding_does_not(model: Model):
    """The first row is the same 20 tokens with and without twenty more behind them."""
    evidence = marked(3, 4)
    padded = probed(model, "dense", evidence, (20, LENGTH))[:, 0]
    alone = probed(model, "dense", evidence[:1, :20], (20,))[:, 0]
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    assert abs(padded - probed(model, "dense", evidence)[:, 0]).max() > 1e-4


def task_set(model: Model, name: str, length: int = 300):
    return make_task_set(name, PromptEncoder(model.tokenizer), length, 3, 2, (0, 1), DATA)


@pytest.mark.parametrize("task", ["passkey-short", "lines-lead", "variables", "position-paragraph"])
def test_the_evidence_is_the_text_up_to_its_answer(model: Model, task: str):
    encoder = PromptEncoder(model.tokenizer)
    for example in task_set(model, task, 700).examples[0]:
        ids = encoder.encode(example.prompt)
        start, end = evidence_span(example, ids, model.tokenizer)
        shown = model.tokenizer.decode(ids[start:end])
        assert example.answers[0] in shown
        assert example.answers[0] not in model.tokenizer.decode(ids[start : end - 1])
        assert len(shown) < len(example.answers[0]) + 60


@pytest.mark.parametrize(
    "policy",
    [
        "dense",
        "window:16",
        "dual_chunk:24:8",
        pytest.param("vertical_slash:24:8:3:5:16", marks=pytest.mark.slow),
    ],
)
def test_a_map_shows_every_block_of_keys(model: Model, policy: str):
    """14 blocks, the last of one key, for values 8 wide: each as evidence gets the same."""
    evidence = marked()
    tokens = np.random.default_rng(0).integers(3, model.cfg.vocab_size, evidence.shape)
    tokens, made = jnp.asarray(tokens, jnp.int32), make_policy(policy, model.cfg)
    found = np.asarray(attention_map(model.params, model.cfg, made, tokens, 3))
    assert model.cfg.head_dim == 8 and found.shape[:2] == (model.cfg.num_layers, 2)
    assert found.shape[2:] == (model.cfg.num_heads, LENGTH, 14)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    for block in (0, 7, 8, 13):
        one = probed(model, policy, marked(*range(3 * block, min(3 * block + 3, LENGTH))))
        np.testing.assert_allclose(found[..., -1, block], one, atol=1e-6)
    query, block = np.arange(LENGTH)[:, None], 3 * np.arange(14)[None]
    assert (found[..., block > query] == 0).all()
    if policy == "window:16":
        assert (found[..., block + 2 <= query - 16] == 0).all()


def test_evidence_without_a_place_is_refused(model: Model):
    example = task_set(model, "common-words", 400).examples[0][0]
    with pytest.raises(ValueError, match="'common-words' has no evidence at a place"):
        evidence_span(example, [1, 2, 3], model.tokenizer)
    gone = dataclasses.replace(task_set(model, "passkey-short").examples[0][0], answers=("none",))
    with pytest.raises(ValueError, match="has no evidence"):
        evidence_span(gone, PromptEncoder(model.tokenizer).encode(gone.prompt), model.tokenizer)


def test_a_window_gets_only_what_is_near_the_end(model: Model):
    """The window holds the last depth's evidence only, and its best head says so."""
    tasks, encoder = task_set(model, "passkey-short"), PromptEncoder(model.tokenizer)
    row = measure_set(model, make_policy("window:100", model.cfg), encoder, tasks, 4)
    depths = [sample["mean"] for sample in row["by_depth"]]
    assert depths[0] == depths[1] == 0 < depths[2]
    assert row["best"]["mean"] == pytest.approx(np.mean(depths))
    assert 0 < row["mass"]["mean"] < row["best"]["mean"] < 1
    assert 0.01 < row["share"]["mean"] < 0.2 and len(row["mass"]["samples"]) == 2
