"""Training of LongSpec's layer beside a tiny target, and what is made of it."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.defaults import training
from inference.drafters.registry import make_drafter
from models import decoder, longspec
from models.attention import Step
from models.load import load
from models.longspec import LongSpecConfig
from models.sharding import make_mesh
from research.speculative.longspec.drafter import LongSpecDrafter
from research.speculative.longspec.evaluation import STEPS, outcomes
from research.speculative.longspec.task import LongSpecTask, TaskParams
from tests.inference.models import config, letters, save_model
from train import loop, trained
from train.config import TrainConfig, build
from train.task import Context

LENGTH = 12
STILL = LongSpecConfig(window=5, reach=0)


def context(rows: int = 4) -> Context:
    """One device, batches of ``rows``."""
    values = training().to_dict() | {"batch_size": rows, "steps": 4, "checkpoint_every": 2}
    return Context(build(TrainConfig, values | {"log_every": 2}), make_mesh("", jax.devices()[:1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model with its tokenizer, and texts of repeating letters."""
    path = tmp_path_factory.mktemp("longspec")
    save_model(path / "target", config(), letters())
    rng = np.random.default_rng(0)
    (path / "texts").mkdir()
    for i in range(40):
        words = ["abcd", "efg", "hij"]
        text = "".join(words[j] for j in rng.integers(0, 3, 12))
        (path / "texts" / f"{i}.txt").write_text(text)
    return path


@pytest.fixture(autouse=True)
def cache(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_DATA", str(folder / "cache"))


def task(folder: pathlib.Path, draft: LongSpecConfig = STILL, **changes: Any) -> LongSpecTask:
    corpus = f"text:{folder / 'texts'}"
    return LongSpecTask(draft, str(folder / "target"), corpus, LENGTH, **changes)


def start(one: LongSpecTask) -> tuple[TaskParams, dict[str, Any]]:
    """Parameters before training and a batch of rows that hold pieces of several documents."""
    params = one.init(jax.random.key(0), None, context())
    batch = jax.tree.map(jnp.asarray, next(iter(one.data(context()))))
    assert int(batch["segments"].max()) > 1
    return params, batch


def test_every_update_hides_one_to_four_entries(folder: pathlib.Path) -> None:
    one = task(folder)
    params, batch = start(one)
    loss = jax.jit(lambda key: one.loss(params, batch, key)[0])
    seen = {round(float(loss(jax.random.key(i))), 5) for i in range(40)}

    @jax.jit
    def plain(shift: Any) -> Any:
        hidden = one.hidden(params, batch, batch["positions"], shift)
        logits = decoder.unembed(params.target, one.model.cfg, hidden)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(nats * batch["mask"]) / jnp.sum(batch["mask"])

    wanted = [float(plain(shift)) for shift in range(1, 5)]
    assert len(set(np.round(wanted, 4))) == 4
    np.testing.assert_allclose(sorted(seen), sorted(wanted), atol=2e-5)
    quiet = task(folder, dataclasses.replace(STILL, max_shift=1))
    always = jax.jit(lambda key: quiet.loss(params, batch, key)[0])
    for i in range(3):
        np.testing.assert_allclose(always(jax.random.key(i)), wanted[0], atol=2e-5)


def test_layer_and_target_move_together(folder: pathlib.Path) -> None:
    """Where all tokens move alike nothing changes, since rotations are relative."""
    far = LongSpecConfig(window=5, reach=400, max_sink=0, max_shift=1)
    params, batch = start(task(folder))

    def losses(draft: LongSpecConfig) -> np.ndarray:
        one = task(folder, draft)
        run = jax.jit(lambda key: one.loss(params, batch, key)[0])
        return np.array([float(run(jax.random.key(i))) for i in range(4)])

    still = losses(dataclasses.replace(STILL, max_shift=1))
    np.testing.assert_allclose(losses(far), still, atol=1e-4)
    anchored = losses(dataclasses.replace(far, max_sink=4))
    assert np.abs(anchored - still).max() > 1e-3


def test_only_the_layer_learns(folder: pathlib.Path) -> None:
    one = task(folder)
    params, batch = start(one)
    slopes = jax.jit(jax.grad(lambda p: one.loss(p, batch, jax.random.key(0))[0]))(params)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(slopes.draft))
    assert not any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(slopes.target))
    assert one.partition(params)[0] is params.draft


def test_training_lowers_the_loss(folder: pathlib.Path) -> None:
    one = task(folder, LongSpecConfig(window=5, reach=64), policy="yarn:2")
    params = one.init(jax.random.key(0), None, context())
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(draft: Any, state: Any, batch: Any, key: Any) -> Any:
        of = lambda draft: one.loss(one.combine(draft, params.target), batch, key)[0]
        loss, slopes = jax.value_and_grad(of)(draft)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(draft, updates), state, loss

    draft, losses = params.draft, []
    state = optimizer.init(draft)
    for i, batch in enumerate(itertools.islice(one.data(context()), 40)):
        batch = jax.tree.map(jnp.asarray, batch)
        draft, state, loss = step(draft, state, batch, jax.random.key(i))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_an_evaluation_reads_as_much_as_it_is_told(folder: pathlib.Path) -> None:
    one = task(folder)
    params, _ = start(one)
    got = one.evaluate(params, context(1))
    assert set(got) == {f"{name}/step{i}" for name in ("top1", "nats") for i in range(1, 5)}
    few = dataclasses.replace(one, evaluation_batches=1).evaluate(params, context(1))
    assert few != got and set(few) == set(got)


def test_outcomes_by_hand(folder: pathlib.Path) -> None:
    one = task(folder)
    params, batch = start(one)
    cfg, step = one.model.cfg, Step(batch["positions"], segments=batch["segments"])
    tokens, targets = batch["tokens"], batch["targets"]

    @jax.jit
    def both() -> Any:
        found = outcomes(
            params.draft, STILL, params.target, cfg, one.attention, tokens, targets, step
        )
        out = decoder.forward(params.target, cfg, tokens, step=step)
        best = decoder.unembed(params.target, cfg, out.hidden)
        hidden = [one.hidden(params, batch, step.positions, i + 1) for i in range(STEPS)]
        drafted = decoder.unembed(params.target, cfg, jnp.stack(hidden))
        return found, best, drafted

    found, best, drafted = both()
    np.testing.assert_array_equal(found.hits, drafted.argmax(-1) == best.argmax(-1)[None])
    ce = optax.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(found.target_nats, ce(best, targets), atol=1e-5)
    np.testing.assert_allclose(found.nats[2], ce(drafted[2], targets), atol=1e-5)


def test_a_saved_layer_drafts(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    one = task(folder)
    params = one.init(jax.random.key(0), None, context())
    one.save(params.draft, tmp_path / "layer", jnp.float32)
    drafter, given = make_drafter(f"longspec:{tmp_path / 'layer'}", load(folder / "target"))
    assert isinstance(drafter, LongSpecDrafter) and drafter.cfg == STILL
    jax.tree.map(np.testing.assert_array_equal, given, params.draft)
    assert one.about.startswith("LongSpec's draft layer for target")


def test_positions_that_the_target_lacks_are_refused(folder: pathlib.Path) -> None:
    learned = config(
        position="learned", norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True,
        gated_mlp=False, activation="gelu", num_kv_heads=4, head_dim=4,
    )  # fmt: skip
    save_model(folder / "learned", learned, letters())
    one = dataclasses.replace(task(folder), target=str(folder / "learned"))
    assert one.specs().draft is not None  # rows stand where they are
    far = dataclasses.replace(one, draft=dataclasses.replace(STILL, reach=learned.max_length + 1))
    with pytest.raises(ValueError, match=r"go up to 161 and the target's end at 160: set .* reach"):
        far.specs()
    squeezed = dataclasses.replace(far, policy="interpolated")
    assert squeezed.specs().draft is not None


@pytest.mark.slow
def test_the_loop_trains_and_goes_on(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, place = task(folder), context()
    for module in (loop, trained):
        monkeypatch.setattr(module, "build_task", lambda config: one)
    whole = loop.train(place.config, tmp_path / "whole", place.mesh)
    again = loop.train(place.config, tmp_path / "whole", place.mesh)  # from its checkpoint
    jax.tree.map(np.testing.assert_array_equal, again.state.trained, whole.state.trained)
    back = trained.read_trained(tmp_path / "whole").params
    assert isinstance(back, longspec.Params)
    jax.tree.map(np.testing.assert_array_equal, back, whole.state.trained)
    assert set(whole.evaluation) >= {"top1/step1", "nats/step4"}
