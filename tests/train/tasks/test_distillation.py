"""Distillation of draft models: the loss and its measures by hand, and a draft that gets better."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.defaults import training
from inference.drafters.registry import make_drafter
from models import decoder
from models.load import Model, load
from models.sharding import make_mesh
from tests.inference.models import NEW, config, engine, letters, prompts, weights
from train import loop
from train.config import TrainConfig, build
from train.data.hidden import generate_texts, write_hidden
from train.task import Context
from train.tasks.distillation import Distillation, TaskParams, principal_part

CFG = config()
TARGET = Model(weights(CFG), CFG, letters(), "target")
SMALL = config(num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=1)
LENGTH = 20
"""Longer than any text, so that every window is a whole one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Hidden states of texts that the tiny target wrote, greedily and at temperature 1."""
    path = tmp_path_factory.mktemp("hidden") / "states"
    texts = generate_texts(engine(), prompts(*[3 + i % 4 for i in range(40)]), 12, batch=40)
    write_hidden(path, TARGET.params, CFG, texts, batch=40)
    return path


def context(**changes: Any) -> Context:
    values = training().to_dict() | {"batch_size": 4, "steps": 60, "checkpoint_every": 100}
    values["optimizer"] = values["optimizer"] | {"learning_rate": 1e-2}
    built = build(TrainConfig, values | changes)
    return Context(built, make_mesh("", jax.devices()[:1]))


def task(folder: pathlib.Path, model: decoder.Config = SMALL) -> Distillation:
    return Distillation(model, TARGET, str(folder), LENGTH)


def batch_of(one: Distillation) -> dict[str, Any]:
    return next(iter(one.data(context())))


@functools.cache
def log_laws(cfg: decoder.Config) -> Any:
    def run(p: Any, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(decoder.unembed(p, cfg, decoder.forward(p, cfg, tokens).hidden))

    return jax.jit(run)


def test_the_loss_is_the_cross_entropy_of_whole_laws(folder):
    """Against passes of both models over the same texts, at the tokens that were generated."""
    one = task(folder)
    params, batch = one.init(jax.random.key(0), None, context()), batch_of(one)
    given = jnp.asarray(batch["tokens"])[:, :-1]
    whole = [log_laws(CFG)(TARGET.params, given), log_laws(SMALL)(params.draft, given)]
    p, q = (np.asarray(x, np.float64) for x in whole)
    mask = np.asarray(batch["mask"])
    assert mask.sum() > 40
    want = -np.sum(np.exp(p) * q, -1)[mask > 0].mean()
    loss, metrics = one.loss(params, batch, jax.random.key(1))
    assert float(metrics["weight"]) == mask.sum()
    np.testing.assert_allclose(loss, want, rtol=2e-3)  # states are stored in float16


def test_the_target_as_its_own_draft_agrees_with_itself(folder):
    one = task(folder, CFG)
    params = one.init(jax.random.key(0), None, context())
    found = one.evaluate(TaskParams(TARGET.params, params.laws), context())
    assert found["kl"] < 1e-3 and found["agreement"] > 0.97 and found["acceptance"] > 0.99
    fresh = one.evaluate(params, context())
    assert fresh["kl"] > 0.1 and fresh["agreement"] < 0.9 and fresh["acceptance"] < 0.9


def test_measures_by_hand(folder):
    one = task(folder)
    params, batch = one.init(jax.random.key(0), None, context()), batch_of(one)
    q = np.asarray(log_laws(SMALL)(params.draft, jnp.asarray(batch["tokens"])[:, :-1]), np.float64)
    states = np.asarray(batch["pre_norm"], np.float32)
    normed = np.asarray(one._states(params, batch))
    assert normed.shape == states.shape
    p = np.asarray(jax.nn.log_softmax(normed @ np.asarray(params.laws.rows).T), np.float64)
    mask = np.asarray(batch["mask"])
    want = [
        (p.argmax(-1) == q.argmax(-1)), np.minimum(np.exp(p), np.exp(q)).sum(-1),
        (np.exp(p) * (p - q)).sum(-1), np.ones(mask.shape),
    ]  # fmt: skip
    want = [float((x * mask).sum()) for x in want]
    np.testing.assert_allclose(one._sums(params, batch), want, rtol=1e-4)


def test_training_makes_drafts_better_and_leaves_the_target_alone(folder, tmp_path, monkeypatch):
    one, here = task(folder), context()
    start = one.init(jax.random.key(0), None, here)
    before = one.evaluate(start, here)
    monkeypatch.setattr(loop, "build_task", lambda config: one)
    result = loop.train(here.config, tmp_path / "run", here.mesh)
    after = result.evaluation
    assert after["kl"] < before["kl"] - 0.1 and after["acceptance"] > before["acceptance"] + 0.05
    jax.tree.map(np.testing.assert_array_equal, result.rest, start.laws)

    one.save(result.state.trained, tmp_path / "draft", jnp.float32)
    assert load(str(tmp_path / "draft")).tokenizer.fingerprint == TARGET.tokenizer.fingerprint
    drafter, params = make_drafter(f"draft:{tmp_path / 'draft'}", TARGET)
    got = engine(drafter=drafter, drafter_params=params).generate(prompts(), NEW)
    assert got.tokens == engine().generate(prompts(), NEW).tokens
    assert got.stats.accepted.sum() > 0


def test_projected_embeddings_keep_inner_products():
    """Of a table of low rank all of them, of any other the most that so few numbers can."""
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=(30, 4)) @ rng.normal(size=(4, 12)), jnp.float32)
    np.testing.assert_allclose(
        principal_part(low, 4) @ principal_part(low, 4).T, low @ low.T, atol=1e-3
    )
    table = jnp.asarray(rng.normal(size=(30, 12)), jnp.float32)
    small = principal_part(table, 5)
    kept = np.linalg.svd(np.asarray(table), compute_uv=False)[5:] ** 2
    error = np.linalg.norm(table @ table.T - small @ small.T)
    np.testing.assert_allclose(error, np.sqrt((kept**2).sum()), rtol=1e-3)


def test_what_cannot_work_is_refused(folder):
    with pytest.raises(ValueError, match="has its target's vocabulary"):
        task(folder, config(vocab_size=30)).specs()
    with pytest.raises(ValueError, match="wider than its target"):
        task(folder, config(hidden_size=32)).init(jax.random.key(0), None, context())
    other = Model(weights(CFG, 1), CFG, letters(), "other")
    with pytest.raises(ValueError, match="of another target"):
        _ = Distillation(SMALL, other, str(folder), LENGTH).texts
