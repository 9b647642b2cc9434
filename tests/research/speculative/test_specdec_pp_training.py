"""SpecDec++'s data, loss and training on a tiny pair of models."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.defaults import training
from inference.drafters.registry import make_drafter
from models import acceptance_head, decoder
from models.acceptance_head import AcceptanceConfig
from models.layers import normalize
from models.load import Model
from models.sharding import make_mesh
from research.speculative.specdec_pp import dataset
from research.speculative.specdec_pp.collect import collect
from research.speculative.specdec_pp.dataset import AcceptanceWindows, write_acceptance
from research.speculative.specdec_pp.evaluation import score, summarise
from research.speculative.specdec_pp.objective import IGNORED, acceptance_loss
from research.speculative.specdec_pp.task import AcceptanceTask
from tests.inference.models import config, engine, letters, prompts, save_model, weights
from train import loop, trained
from train.config import TrainConfig, build
from train.data.hidden import HiddenTexts, Text, generate_texts
from train.task import Context

LENGTH, NEW = 8, 12
TARGET = Model(weights(config()), config(), letters(), "target")
DRAFT_CFG = config(num_layers=1)
DRAFT = Model(weights(DRAFT_CFG, 1), DRAFT_CFG, letters(), "draft")


def context(rows: int, **changes: Any) -> Context:
    values = training().to_dict() | {"batch_size": rows, "microbatches": 2, "steps": 4}
    return Context(
        build(TrainConfig, values | {"checkpoint_every": 2} | changes),
        make_mesh("", jax.devices()[:1]),
    )


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    """The target's own texts at temperature 1, of 40 prompts."""
    given = prompts(*[2 + i % 4 for i in range(40)])
    return generate_texts(engine(), given, NEW, (1.0,), batch=40)


@pytest.fixture(scope="module")
def folder(texts: list[Text], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("acceptance") / "examples"
    write_acceptance(path, TARGET, DRAFT, texts, mix=0.3, batch=40)
    return path


def task(folder: pathlib.Path, **changes: Any) -> AcceptanceTask:
    return AcceptanceTask(AcceptanceConfig(**changes), DRAFT, str(folder), LENGTH)


def log_laws(model: Model, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of the successor of every token, by a pass over one text."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    out = _hidden(model.cfg)(model.params, jnp.asarray(padded))
    logits = np.asarray(decoder.unembed(model.params, model.cfg, out.hidden), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _hidden(cfg: decoder.Config) -> Any:
    return _PASSES.setdefault(cfg, jax.jit(lambda p, t: decoder.forward(p, cfg, t)))


_PASSES: dict[Any, Any] = {}


def test_labels_are_acceptance_probabilities_after_the_targets_text(texts, folder) -> None:
    stored = HiddenTexts(folder)
    labels, offsets = stored.per_token("labels"), stored.offsets
    seen = 0
    for i, text in enumerate(texts[:12]):
        here = slice(int(offsets[i]), int(offsets[i + 1]))
        mixed, y = np.asarray(stored.tokens[here]), np.asarray(labels[here])
        original = np.asarray(text.tokens)
        log_p, log_q = (log_laws(m, text.tokens) for m in (TARGET, DRAFT))
        assert np.all(y[: text.prompt_length] == IGNORED)
        np.testing.assert_array_equal(mixed[y == IGNORED], original[y == IGNORED])
        for at in np.flatnonzero(y != IGNORED):
            gap = log_p[at - 1, mixed[at]] - log_q[at - 1, mixed[at]]
            np.testing.assert_allclose(y[at], np.exp(min(0.0, gap)), atol=1e-4)
            seen += 1
    assert seen > 60
    kept = np.asarray(labels)[np.asarray(labels) != IGNORED]
    assert kept.min() >= 0 and kept.max() <= 1 and 0.3 < kept.mean() < 0.95
    answers = len(texts) * NEW
    assert 0.55 < len(kept) / answers < 0.85  # 0.3 of the tokens are the target's


def test_states_are_those_of_the_draft_model_over_the_mixed_text(texts, folder) -> None:
    stored = HiddenTexts(folder)
    for i in range(4):
        here = slice(int(stored.offsets[i]), int(stored.offsets[i + 1]))
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : here.stop - here.start] = stored.tokens[here]
        out = _hidden(DRAFT_CFG)(DRAFT.params, jnp.asarray(tokens)).pre_norm[0]
        np.testing.assert_allclose(stored.pre_norm[here], out[: here.stop - here.start], atol=2e-2)


def test_drafted_tokens_have_the_draft_models_law() -> None:
    tokens = jnp.tile(jnp.asarray([[3, 5]]), (4000, 1))
    drawn, _, _ = dataset.draw_drafts(
        TARGET.params, TARGET.cfg, DRAFT.params, DRAFT.cfg, tokens, jnp.arange(4000)
    )
    law = np.exp(log_laws(DRAFT, [3]))[0]
    shares = np.bincount(np.asarray(drawn)[:, 1], minlength=len(law)) / 4000
    assert np.all(np.abs(shares - law) < 4 * np.sqrt(law * (1 - law) / 4000) + 1e-3)
    np.testing.assert_array_equal(drawn[:, 0], 3)


def test_leaves_are_read_after_the_unmixed_text() -> None:
    rng = np.random.default_rng(0)
    tokens, leaves = rng.integers(0, 24, (2, 2, 7)).astype(np.int32)
    states = dataset.leaf_states(DRAFT.params, DRAFT_CFG, jnp.asarray(tokens), jnp.asarray(leaves))
    for row in range(2):
        for at in range(7):
            text = np.zeros((1, 32), np.int32)
            text[0, : at + 1] = [*tokens[row, :at], leaves[row, at]]
            want = _hidden(DRAFT_CFG)(DRAFT.params, jnp.asarray(text)).pre_norm[0, at]
            np.testing.assert_allclose(states[row, at], want, atol=5e-3)


@pytest.mark.slow
def test_without_mixing_every_position_of_an_answer_has_a_label(texts, tmp_path) -> None:
    write_acceptance(tmp_path / "leaves", TARGET, DRAFT, texts[:30], mix=1.0, batch=30)
    stored = HiddenTexts(tmp_path / "leaves")
    labels = stored.per_token("labels")
    for i, text in enumerate(texts[:30]):
        y = labels[stored.offsets[i] : stored.offsets[i + 1]]
        np.testing.assert_array_equal(y == IGNORED, np.arange(len(y)) < text.prompt_length)
        kept = stored.tokens[stored.offsets[i] : stored.offsets[i + 1]]
        np.testing.assert_array_equal(kept, text.tokens)


def test_a_model_that_drafts_for_itself_is_always_accepted(texts, tmp_path) -> None:
    write_acceptance(tmp_path / "same", TARGET, TARGET, texts[:30], batch=30)
    labels = np.asarray(HiddenTexts(tmp_path / "same").per_token("labels"))
    np.testing.assert_allclose(labels[labels != IGNORED], 1.0, atol=1e-5)


def test_bad_data_is_refused(texts, folder, tmp_path) -> None:
    other = dataclasses.replace(DRAFT, tokenizer=letters(1))
    with pytest.raises(ValueError, match="draft has another tokenizer than target"):
        write_acceptance(tmp_path / "x", TARGET, other, texts)
    few = config(vocab_size=8)
    with pytest.raises(ValueError, match="draft model has 8 tokens and the target 24"):
        write_acceptance(tmp_path / "x", TARGET, Model(weights(few), few, letters(), "d"), texts)
    with pytest.raises(ValueError, match="a share of tokens between 0 and 1"):
        write_acceptance(tmp_path / "x", TARGET, DRAFT, texts, mix=1.5)
    with pytest.raises(ValueError, match="of another target"):
        _ = dataclasses.replace(task(folder), draft=TARGET).texts
    with pytest.raises(ValueError, match="holds no law"):
        HiddenTexts(folder).per_token("law")
    with pytest.raises(ValueError, match="windows need a length"):
        AcceptanceWindows(HiddenTexts(folder), "train", 0)
    with pytest.raises(ValueError, match="for a batch of 4000"):
        task(folder).data(context(4000))


def test_windows_cover_every_answer_once(texts, folder) -> None:
    stored = HiddenTexts(folder)
    source = AcceptanceWindows(stored, "train", LENGTH, multiple=16)
    assert len(source) % 16 == 0
    rows = [source[i] for i in range(len(source))]
    labels = np.concatenate([row["labels"] for row in rows])
    chosen = stored.chosen("train")
    assert len(chosen) == 38 and np.all(source[len(source) - 1]["labels"] == IGNORED)
    want = np.concatenate(
        [stored.per_token("labels")[stored.offsets[i] : stored.offsets[i + 1]] for i in chosen]
    )
    np.testing.assert_array_equal(labels[labels >= 0], want[want >= 0])


def test_prompt_and_mixed_positions_do_not_touch_the_loss(folder) -> None:
    one = task(folder)
    params = one.init(jax.random.key(0), None, context(4))
    batch = next(iter(one.data(context(16))))
    ignored = batch["labels"] < 0
    assert 0 < ignored.mean() < 1
    loss = jax.jit(lambda p, b: one.loss(p, b, jax.random.key(0))[0])
    noisy = batch["pre_norm"] + 3 * ignored[..., None].astype(np.float16)
    np.testing.assert_array_equal(loss(params, batch), loss(params, batch | {"pre_norm": noisy}))
    moved = batch["pre_norm"] + 3 * (~ignored)[..., None].astype(np.float16)
    assert loss(params, batch) != loss(params, batch | {"pre_norm": moved})


def test_no_gradient_reaches_the_draft_model(folder) -> None:
    one = task(folder)
    params = one.init(jax.random.key(0), None, context(4))
    batch = next(iter(one.data(context(4))))
    slopes = jax.jit(jax.grad(lambda p: one.loss(p, batch, jax.random.key(0))[0]))(params)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(slopes.head))
    np.testing.assert_array_equal(slopes.final_norm.scale, 0.0)
    assert one.partition(params)[0] is params.head


def test_weight_one_and_hard_labels_are_the_plain_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 9, 2)), jnp.float32)
    labels = rng.integers(0, 2, (3, 9))
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()
    got = acceptance_loss(logits, jnp.asarray(labels, jnp.float32), 1.0)
    np.testing.assert_allclose(got, plain, rtol=1e-5)
    nothing = jnp.full((3, 9), IGNORED)
    assert acceptance_loss(logits, nothing, 6.0) == 0.0
    assert np.all(np.isfinite(jax.grad(acceptance_loss)(logits, nothing, 6.0)))


def test_training_lowers_loss_and_divergence(folder) -> None:
    one = task(folder, rejection_weight=1.0)
    params = one.init(jax.random.key(0), None, context(4))
    optimizer = optax.adam(3e-3)
    batches = iter(one.data(context(16)))

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        head, rest = one.partition(params)
        of = lambda head: one.loss(one.combine(head, rest), batch, jax.random.key(0))[0]
        loss, slopes = jax.value_and_grad(of)(head)
        updates, state = optimizer.update(slopes, state)
        return one.combine(optax.apply_updates(head, updates), rest), state, loss

    # Random models leave nothing to be learnt for other texts: it is the trained ones that count.
    seen = next(iter(one.data(context(40))))
    hidden = normalize(
        jnp.asarray(seen["pre_norm"], jnp.float32), params.final_norm, DRAFT_CFG.norm_eps
    )
    labels = jnp.asarray(seen["labels"])
    scores = jax.jit(lambda h: score(acceptance_head.logits(h, one.head, hidden), labels))
    state, losses, before = optimizer.init(params.head), [], summarise(scores(params.head))
    for _ in range(60):
        params, state, loss = step(params, state, next(batches))
        losses.append(float(loss))
    after = summarise(scores(params.head))
    assert np.mean(losses[-10:]) < 0.97 * np.mean(losses[:5])
    assert after["kl"] < 0.8 * before["kl"] and after["auc"] > before["auc"] + 0.05
    assert after["calibration_error"] < before["calibration_error"]
    assert set(one.evaluate(params, context(4))) == set(after)


def test_scores_by_hand() -> None:
    p = np.array([0.9, 0.8, 0.8, 0.3, 0.1, 0.5])
    y = np.array([1.0, 1.0, 0.0, 0.0, 0.5, IGNORED])
    logits = jnp.asarray(np.log(np.stack([1 - p, p], axis=-1)), jnp.float32)
    one = score(logits, jnp.asarray(y, jnp.float32))
    got = summarise(one)
    # Accepted 0.9 and 0.8 and half of 0.1 against rejected 0.8, 0.3 and half of 0.1.
    pairs = (2.5 + 0.5 * 1 + 1.5 + 0.5 * 0.5 * 0.5) / (2.5 * 2.5)
    assert got["auc"] == pytest.approx(pairs, abs=1e-6)
    gaps = abs(1 - 0.9) + abs(1 - 0.8 - 0.8) + 0.3 + abs(0.5 - 0.1)
    assert got["calibration_error"] == pytest.approx(gaps / 5, abs=1e-5)
    assert got["label"] == pytest.approx(0.5) and got["prediction"] == pytest.approx(2.9 / 5)
    kl = -np.log(0.9) - np.log(0.8) - np.log(0.2) - np.log(0.7)
    kl += 0.5 * np.log(0.5 / 0.1) + 0.5 * np.log(0.5 / 0.9)
    assert got["kl"] == pytest.approx(kl / 5, rel=1e-5)
    assert summarise(one + one) == pytest.approx(got)
    # A head that says y / (y + 6 (1 - y)) is calibrated for six times the rejections.
    y = np.linspace(0.05, 0.95, 400)
    tilted = y / (y + 6 * (1 - y))
    logits = jnp.asarray(np.log(np.stack([1 - tilted, tilted], axis=-1)), jnp.float32)
    scores = score(logits, jnp.asarray(y, jnp.float32))
    assert summarise(scores, 6.0)["calibration_error"] < 1e-4
    assert summarise(scores)["calibration_error"] > 0.2


def test_a_saved_head_is_loaded_by_name(folder, tmp_path) -> None:
    one = task(folder, num_layers=2, tie_blocks=True)
    params = one.init(jax.random.key(3), None, context(4))
    one.save(params.head, tmp_path / "head", jnp.float32)
    save_model(tmp_path / "draft", DRAFT_CFG, letters())
    drafter, got = make_drafter(f"specdec:{tmp_path / 'draft'}:{tmp_path / 'head'}", TARGET)
    assert drafter.cfg == DRAFT_CFG and drafter.rule.head == one.head
    jax.tree.map(np.testing.assert_array_equal, got.rule, params.head)
    wide = config(hidden_size=32)
    save_model(tmp_path / "wide", wide, letters())
    with pytest.raises(ValueError, match="models they were made for"):
        make_drafter(f"specdec:{tmp_path / 'wide'}:{tmp_path / 'head'}", TARGET)
    save_model(tmp_path / "other", DRAFT_CFG, letters(1))
    with pytest.raises(ValueError, match="another tokenizer than target"):
        make_drafter(f"specdec:{tmp_path / 'other'}:{tmp_path / 'head'}", TARGET)
    with pytest.raises(FileNotFoundError, match="trained drafter"):
        make_drafter(f"specdec:{tmp_path / 'draft'}:{tmp_path / 'none'}", TARGET)
    with pytest.raises(ValueError, match="lacks an argument: write 'specdec:DIR:HEADS'"):
        make_drafter("specdec:draft", TARGET)


@pytest.mark.slow
def test_data_collection_and_the_loop(tmp_path, monkeypatch) -> None:
    """From prompts to an exported head, by the parts that the commands call."""
    tokens = collect(TARGET, DRAFT, prompts(*[3] * 40), str(tmp_path / "examples"), NEW, batch=20)
    assert tokens <= 40 * (3 + NEW)
    one, place = task(tmp_path / "examples"), context(8)
    for module in (loop, trained):
        monkeypatch.setattr(module, "build_task", lambda config: one)
    result = loop.train(place.config, tmp_path / "run", place.mesh)
    assert set(result.evaluation) == {"auc", "calibration_error", "kl", "label", "prediction"}
    back = trained.read_trained(tmp_path / "run").params
    jax.tree.map(np.testing.assert_array_equal, back, result.state.trained)
    one.save(back, tmp_path / "head", jnp.float32)
    assert (tmp_path / "head" / "config.json").is_file()
    assert isinstance(back, acceptance_head.Params)


def test_the_head_reads_states_after_the_final_norm(folder) -> None:
    one = task(folder)
    params = one.init(jax.random.key(0), None, context(4))
    batch = next(iter(one.data(context(4))))
    hidden = normalize(
        jnp.asarray(batch["pre_norm"], jnp.float32), DRAFT.params.final_norm, DRAFT_CFG.norm_eps
    )
    want = acceptance_loss(
        acceptance_head.logits(params.head, one.head, hidden),
        jnp.asarray(batch["labels"]),
        one.head.rejection_weight,
    )
    np.testing.assert_allclose(one.loss(params, batch, jax.random.key(0))[0], want, rtol=1e-5)
