"""Training of Clover, Medusa and the EAGLE-like drafter on a tiny target's hidden states."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from configs.defaults import training
from models import clover, decoder, eagle, medusa
from models import params as params_
from models.drafter_io import load_settings, load_weights, save_drafter
from models.layers import normalize
from models.load import Model
from models.sharding import make_mesh
from models.tokenizer import Tokenizer
from research.speculative.clover import objective
from research.speculative.clover.evaluation import count_hits, eagle_rollout
from research.speculative.clover.task import (
    CloverTask,
    DrafterTask,
    EagleTask,
    MedusaTask,
    TaskParams,
    examples,
)
from tests.inference.models import config, engine, prompts, weights
from train import loop, trained
from train.config import TrainConfig, build
from train.data.hidden import generate_texts, write_hidden
from train.task import Context


def context(rows: int) -> Context:
    """One device, batches of ``rows``."""
    values = training().to_dict() | {"batch_size": rows, "steps": 4, "checkpoint_every": 2}
    values |= {"clip": "value", "clip_threshold": 0.5, "log_every": 2}
    return Context(build(TrainConfig, values), make_mesh("", jax.devices()[:1]))


TARGET = config(vocab_size=12, tied=False, num_layers=1)
LENGTH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Hidden states of texts that the tiny target wrote, greedily and at temperature 1."""
    path = tmp_path_factory.mktemp("hidden") / "states"
    given = [[t % 12 for t in p] for p in prompts(*[3 + i % 4 for i in range(40)])]
    texts = generate_texts(engine(TARGET), given, 17, batch=40)
    write_hidden(path, weights(TARGET), TARGET, texts, batch=40)
    return path


def model() -> Model:
    words = {f"w{i}": i for i in range(12)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return Model(weights(TARGET), TARGET, Tokenizer(backend), "tiny")


def start(task: DrafterTask) -> TaskParams:
    """The task's parameters before training."""
    return task.init(jax.random.key(0), None, context(4))


def clover_task(folder: pathlib.Path, **changes: Any) -> CloverTask:
    cfg = clover.CloverConfig(**({"num_heads": 3, "num_layers": 1} | changes))
    return CloverTask(cfg, model(), str(folder), LENGTH)


def tasks(folder: pathlib.Path) -> dict[str, DrafterTask]:
    shared = medusa.MedusaConfig(num_heads=3, shared_head=True, rank=2)
    own = medusa.MedusaConfig(num_heads=3, draft_vocab=8)
    return {
        "clover": clover_task(folder),
        "clover tokens": clover_task(folder, distill=False),
        "medusa": MedusaTask(own, model(), str(folder), LENGTH, draft_vocab=8),
        "medusa shared": MedusaTask(shared, model(), str(folder), LENGTH, draft_vocab=8),
        "eagle": EagleTask(eagle.EagleConfig(), model(), str(folder), LENGTH, eval_heads=3),
    }


@pytest.mark.parametrize("name", ["clover", "clover tokens", "medusa", "medusa shared", "eagle"])
def test_training_lowers_the_loss(folder: pathlib.Path, name: str) -> None:
    task = tasks(folder)[name]
    params = start(task)
    optimizer = optax.chain(optax.clip(0.5), optax.adam(3e-3))
    batch = next(iter(task.data(context(16))))

    @jax.jit
    def step(params: TaskParams, state: Any, key: jax.Array) -> Any:
        trained, rest = task.partition(params)

        def of(trained: Any) -> Any:
            return task.loss(task.combine(trained, rest), batch, key)

        (loss, _), slopes = jax.value_and_grad(of, has_aux=True)(trained)
        updates, state = optimizer.update(slopes, state)
        return task.combine(optax.apply_updates(trained, updates), rest), state, loss

    state, losses = optimizer.init(params.heads), []
    for i in range(30):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["clover", "medusa shared", "eagle"])
@pytest.mark.slow
def test_bfloat16_is_close_to_float32(folder: pathlib.Path, name: str) -> None:
    """Loss, slopes and evaluation run on every platform when the loop computes in bfloat16."""
    task = tasks(folder)[name]
    batch = next(iter(task.data(context(8))))
    full = start(task)

    @jax.jit
    def run(params: TaskParams) -> Any:
        trained, rest = task.partition(params)
        of = lambda trained: task.loss(task.combine(trained, rest), batch, jax.random.key(0))[0]
        loss, slopes = jax.value_and_grad(of)(trained)
        x = examples(params.frozen, TARGET, batch)
        return (
            loss,
            optax.tree.norm(slopes),
            count_hits(task.outputs(params, x), task.matrices(params), x.labels, x.mask),
        )

    want, got = run(full), run(params_.cast(full, jnp.bfloat16))
    np.testing.assert_allclose(got[0], want[0], rtol=0.03)
    np.testing.assert_allclose(got[1], want[1], rtol=0.1)
    np.testing.assert_array_equal(got[2].total, want[2].total)


def test_gradient_reaches_no_part_of_the_target(folder: pathlib.Path) -> None:
    """Through head and embeddings the loss depends on the target, but sends no gradient there."""
    task = clover_task(folder)
    params = start(task)
    batch = next(iter(task.data(context(4))))
    allowed = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), params.frozen)

    def loss(frozen: Any) -> jax.Array:
        return task.loss(TaskParams(params.heads, frozen), batch, jax.random.key(0))[0]

    slopes = jax.jit(jax.grad(loss, allow_int=True))(params.frozen)
    for slope, real in zip(jax.tree.leaves(slopes), jax.tree.leaves(allowed), strict=True):
        if real:
            np.testing.assert_array_equal(slope, 0.0)


def test_batches_pair_state_token_and_target(folder: pathlib.Path) -> None:
    task = clover_task(folder)
    frozen = start(task).frozen
    windows = task.data(context(8))
    seen = 0
    batch = next(iter(windows))
    x = jax.device_get(examples(frozen, TARGET, batch))
    for row in range(8):
        text, prompt_length, first = _text_of(task, batch, row)
        padded = np.zeros(32, np.int32)
        padded[: len(text)] = text
        out = _forward(jnp.asarray(padded)[None])
        for s in np.flatnonzero(x.mask[row]):
            at = first + s
            np.testing.assert_allclose(x.pre_norm[row, s], out.pre_norm[0, at], atol=2e-2)
            np.testing.assert_allclose(x.target[row, s], out.hidden[0, at + 1], atol=2e-2)
            assert x.next_tokens[row, s] == text[at + 1]
            assert x.labels[row, s] == text[at + 2]
            assert at + 2 >= prompt_length
            seen += 1
        reach = min(len(text) - 2, first + LENGTH) - max(first, prompt_length - 2)
        assert x.mask[row].sum() == max(reach, 0)
    assert seen > 20


_forward = jax.jit(lambda tokens: decoder.forward(weights(TARGET), TARGET, tokens))


def _text_of(task: CloverTask, batch: Any, row: int) -> tuple[np.ndarray, int, int]:
    """The stored text that a window was cut from, its prompt's length, and the window's start."""
    stored, offsets = np.asarray(task.texts.pre_norm), task.texts.offsets
    same = np.all(stored == batch["pre_norm"][row, 0], axis=1)
    for at in np.flatnonzero(same).tolist():
        text = int(np.searchsorted(offsets, at, side="right")) - 1
        first = at - int(offsets[text])
        tokens = np.asarray(task.texts.tokens[offsets[text] : offsets[text + 1]])
        here = tokens[first : first + LENGTH + 2]
        if first % LENGTH == 0 and np.array_equal(here, batch["tokens"][row, : len(here)]):
            return tokens, int(task.texts.prompts[text, 1]), first
    raise AssertionError("no stored text has these states")


def _dense_losses(task: CloverTask, out: Any, x: Any, rows: Any) -> tuple[list, list]:
    """The definition, head by head in float64."""
    out, target, rows = (np.asarray(v, np.float64) for v in (out, x.target, rows))
    mask, labels = np.asarray(x.mask), np.asarray(x.labels)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

    soft, hard = [], []
    t = out.shape[2]
    for i in range(out.shape[0]):
        log_q = log_softmax(out[i][:, : t - i] @ rows.T)
        p = np.exp(log_softmax(target[:, i:] @ rows.T))
        weight = mask[:, i:] / (mask[:, i:].sum() + 1)
        soft.append((-(p * log_q).sum(-1) * weight).sum())
        picked = np.take_along_axis(log_q, labels[:, i:, None], axis=-1)[..., 0]
        hard.append((-picked * weight).sum())
    return soft, hard


@pytest.mark.parametrize("chunk", [1, 16, 4096])
def test_chunked_losses_are_the_definition(folder: pathlib.Path, chunk: int) -> None:
    task = clover_task(folder)
    params = start(task)
    x = examples(params.frozen, TARGET, next(iter(task.data(context(4)))))
    out = task.outputs(params, x)
    rows = params.frozen.rows
    soft, hard = _dense_losses(task, out, x, rows)
    for cfg, expected in (
        (task.heads, soft),
        (dataclasses.replace(task.heads, distill=False), hard),
    ):
        _, parts = objective.clover_loss(cfg, out, x.target, x.labels, rows, x.mask, chunk)
        np.testing.assert_allclose(parts[:, 1], expected, rtol=1e-5)


def test_gradients_of_the_chunked_loss(folder: pathlib.Path) -> None:
    """The hand-written backward pass equals automatic differentiation of the plain formula."""
    keys = jax.random.split(jax.random.key(0), 4)
    out, target = (
        jax.random.normal(k, s) for k, s in zip(keys[:2], [(2, 3, 5, 8), (3, 5, 8)], strict=True)
    )
    rows = jax.random.normal(keys[2], (11, 8))
    weights_ = jax.random.uniform(keys[3], (2, 3, 5))
    by_head = jnp.asarray([1.0, -0.7])

    def chunked(out: jax.Array) -> jax.Array:
        return jnp.sum(by_head * objective.soft_cross_entropy(out, target, rows, weights_, 6))

    def plain(out: jax.Array) -> jax.Array:
        p = jax.nn.softmax(target @ rows.T)[None]
        each = -jnp.sum(p * jax.nn.log_softmax(out @ rows.T), axis=-1) * weights_
        return jnp.sum(by_head * jnp.sum(each, axis=(1, 2)))

    got, expected = (jax.jit(jax.value_and_grad(f))(out) for f in (chunked, plain))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_hits_by_hand() -> None:
    """Two heads over one-hot outputs: ranks are read off directly."""
    logits = np.zeros((2, 1, 3, 4), np.float32)
    logits[0, 0] = [[9, 1, 0, 0], [3, 9, 5, 4], [0, 0, 0, 9]]
    logits[1, 0] = [[0, 9, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]]
    labels, mask = jnp.asarray([[0, 0, 3]]), jnp.asarray([[1.0, 1.0, 1.0]])
    hits = count_hits(jnp.asarray(logits), jnp.eye(4)[None], labels, mask)
    # Head 2's rows 0 and 1 are about labels 1 and 2, its last row about none.
    np.testing.assert_array_equal(hits.total, [3, 2])
    np.testing.assert_array_equal(hits.top1, [2, 1])
    np.testing.assert_array_equal(hits.top3, [2, 2])
    assert (hits + hits).rates()["top1/head2"] == 0.5
    missing = count_hits(jnp.asarray(logits), jnp.eye(4)[None], labels - 4, mask)
    np.testing.assert_array_equal(missing.top3, [0, 0])


def test_rollout_equals_drafting_one_position_at_a_time() -> None:
    p = params_.init(eagle.specs(eagle.EagleConfig(), TARGET), jax.random.key(4))
    features, embeds = (
        jax.random.normal(jax.random.key(i), (1, 6, TARGET.hidden_size)) for i in range(2)
    )
    rolled = jax.jit(lambda p, f, e: eagle_rollout(p, TARGET, f, e, 3))(p, features, embeds)
    step = jax.jit(lambda p, f, e: eagle.forward(p, TARGET, f, e)[0])
    at = 2
    known = features[:, : at + 1]
    for i in range(3):
        out = step(p, known, embeds[:, : at + 1 + i])
        np.testing.assert_allclose(rolled[i, 0, at], out[0, -1], atol=1e-4)
        known = jnp.concatenate([known, out[:, -1:]], axis=1)


def test_evaluation_covers_the_held_out_texts(folder: pathlib.Path) -> None:
    for name, task in tasks(folder).items():
        if name not in ("clover", "medusa"):
            continue
        rates = task.evaluate(start(task), context(4))
        assert set(rates) == {f"top{k}/head{i}" for k in (1, 3) for i in (1, 2, 3)}
        assert all(0 <= rates[f"top1/head{i}"] <= rates[f"top3/head{i}"] <= 1 for i in (1, 2, 3))


@pytest.mark.slow
def test_the_loop_trains_resumes_and_records_the_frozen_parts(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared loop: weights move, the target's parts are hashed but not in the checkpoint."""
    task, place = clover_task(folder), context(4)
    for module in (loop, trained):
        monkeypatch.setattr(module, "build_task", lambda config: task)
    result = loop.train(place.config, tmp_path, place.mesh)
    assert int(result.state.step) == 4
    assert set(result.evaluation) >= {"top1/head1", "top3/head3"}
    before = jax.tree.leaves(start(task).heads)
    after = jax.tree.leaves(result.state.trained)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(after, before, strict=True))
    jax.tree.map(np.testing.assert_array_equal, result.rest, start(task).frozen)
    jax.tree.map(
        np.testing.assert_array_equal,
        trained.read_trained(tmp_path).params,
        result.state.trained,
    )
    longer = dataclasses.replace(place.config, log_every=1)
    again = loop.train(longer, tmp_path, place.mesh)
    jax.tree.map(np.testing.assert_array_equal, again.state.trained, result.state.trained)


def test_medusa_reads_the_post_norm_state(folder: pathlib.Path) -> None:
    task = tasks(folder)["medusa"]
    frozen = start(task).frozen
    batch = next(iter(task.data(context(4))))
    x = examples(frozen, TARGET, batch)
    expected = normalize(x.pre_norm, weights(TARGET).final_norm, TARGET.norm_eps)
    np.testing.assert_allclose(x.hidden, expected, atol=1e-5)


def test_save_and_load(tmp_path: pathlib.Path) -> None:
    cfg = clover.CloverConfig(num_heads=3, num_layers=1)
    heads = clover.init_from_target(weights(TARGET), TARGET, cfg, jax.random.key(0))
    place = tmp_path / "heads"
    save_drafter(place, "clover", cfg, heads, TARGET, [3, 5])
    settings = load_settings(place, "clover", TARGET)
    assert clover.CloverConfig(**settings["config"]) == cfg
    assert settings["draft_vocabulary"] == [3, 5]
    back = load_weights(place, clover.specs(cfg, TARGET))
    jax.tree.map(np.testing.assert_array_equal, back, heads)
    with pytest.raises(ValueError, match="name another folder"):
        load_settings(place, "medusa", TARGET)
    with pytest.raises(ValueError, match="models they were made for"):
        load_settings(place, "clover", dataclasses.replace(TARGET, vocab_size=99))
    deeper = clover.specs(dataclasses.replace(cfg, num_layers=2), TARGET)
    with pytest.raises(ValueError, match="is missing from"):
        load_weights(place, deeper)
    with pytest.raises(FileExistsError):
        save_drafter(place, "clover", cfg, heads, TARGET)
    (place / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_settings(place, "clover", TARGET)
    with pytest.raises(FileNotFoundError, match="trained drafter"):
        load_settings(tmp_path, "clover", TARGET)


def test_eagles_loss_of_the_truth_is_the_entropy_of_the_target():
    target = jax.random.normal(jax.random.key(0), (2, 7, 8))
    rows = jax.random.normal(jax.random.key(1), (11, 8))
    mask = jnp.ones((2, 7)).at[1, 4:].set(0)
    loss, (v, p) = objective.eagle_loss(eagle.EagleConfig(), target, target, rows, mask)
    laws = jax.nn.softmax(target @ rows.T)
    entropy = -jnp.sum(laws * jnp.log(laws), axis=-1)
    assert v == 0
    np.testing.assert_allclose(p, jnp.sum(entropy * mask) / mask.sum(), rtol=1e-4)
    np.testing.assert_allclose(loss, 0.1 * p, rtol=1e-6)
    worse = objective.eagle_loss(eagle.EagleConfig(), target + 0.3, target, rows, mask)[1]
    assert worse[0] > 0 and worse[1] > p
