"""One update: accumulation, guard, average, frozen parts, random keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sharding import make_mesh
from tests.train.regression import Regression, make
from train.config import TrainConfig, build_task
from train.state import TrainState, create_state
from train.step import make_step
from train.task import Context


class Stepper:
    """A task's compiled step with its first state."""

    def __init__(self, config: TrainConfig):
        self.context = Context(config, make_mesh("", jax.devices()[:1]))
        self.task: Regression = build_task(config)
        specs, _ = self.task.partition(self.task.specs())
        optimizer = self.task.optimizer(config, specs)
        params = self.task.init(jax.random.key(config.seed), None, self.context)
        trained, self.rest = self.task.partition(params)
        self.state: TrainState = create_state(trained, optimizer, config.ema_decay > 0)
        self.step = jax.jit(make_step(self.task, config, optimizer, self.context))
        dataset = self.task.data(self.context)
        self.data = None if dataset is None else iter(dataset)
        self.calls = config.steps_per_call

    def run(self, calls: int) -> list[dict[str, Any]]:
        seen = []
        for _ in range(calls):
            batches = None
            if self.data is not None:
                parts = [next(self.data) for _ in range(self.calls)]
                batches = jax.tree.map(lambda *xs: np.stack(xs), *parts)
            self.state, metrics = self.step(self.state, self.rest, batches)
            seen += [{k: float(v[i]) for k, v in metrics.items()} for i in range(self.calls)]
        return seen


def trained_after(calls: int, config: TrainConfig) -> Any:
    stepper = Stepper(config)
    stepper.run(calls)
    return stepper.state.trained


def assert_close(a: Any, b: Any, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


SGD = {"name": "sgd", "beta1": 0.0, "schedule": "constant", "weight_decay": 0.0}


def config(task: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Plain gradient descent, whose update shows the gradient itself."""
    base = dataclasses.asdict(make().optimizer)
    return make(task, **{"optimizer": {**base, **SGD}, "clip": "none", **changes})


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_the_big_batch(parts: int):
    """Parts hold different numbers of counted rows, so unweighted means would differ."""
    whole, split = Stepper(config()), Stepper(config(microbatches=parts))
    first, second = whole.run(3), split.run(3)
    assert_close(whole.state.trained, split.state.trained, 1e-6)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        assert a["weight"] == b["weight"]


@pytest.mark.parametrize("on_device", [False, True])
def test_several_updates_per_call_equal_single_ones(on_device: bool):
    task = {"on_device": on_device}
    changes = {"steps": 8, "log_every": 4, "checkpoint_every": 4}
    one, four = Stepper(config(task, **changes)), Stepper(config(task, steps_per_call=4, **changes))
    first, second = one.run(8), four.run(2)
    assert_close(one.state.trained, four.state.trained, 1e-6)
    np.testing.assert_allclose([m["loss"] for m in first], [m["loss"] for m in second], rtol=1e-5)


def test_batches_made_on_the_device_differ_between_updates():
    """With a rate of zero nothing but the batch can change the loss."""
    still = {**dataclasses.asdict(make().optimizer), **SGD, "learning_rate": 0.0}
    losses = [m["loss"] for m in Stepper(config({"on_device": True}, optimizer=still)).run(4)]
    assert len(set(losses)) == 4


def test_an_update_that_is_not_finite_changes_nothing_but_the_counts():
    stepper = Stepper(make({"poison": 16}, ema_decay=0.5))
    stepper.run(2)
    before = stepper.state
    metrics = stepper.run(3)
    assert [m["bad_in_row"] for m in metrics] == [1, 2, 3]
    assert int(stepper.state.step) == 5
    for name in ("trained", "optimizer", "average"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(before, name), getattr(stepper.state, name)
        )


def test_one_bad_part_spoils_the_whole_update():
    stepper = Stepper(make({"poison": 7}, microbatches=4))
    assert stepper.run(1)[0]["bad_in_row"] == 1


def test_clipping_bounds_the_update():
    fast = {**dataclasses.asdict(make().optimizer), **SGD, "learning_rate": 1.0}
    start = jax.tree.leaves(Stepper(config()).state.trained)
    moves = []
    for clip in ("none", "norm", "value"):
        after = trained_after(1, config(clip=clip, clip_threshold=0.1, optimizer=fast))
        pairs = zip(jax.tree.leaves(after), start, strict=True)
        moves.append(np.concatenate([np.ravel(a - b) for a, b in pairs]))
    assert np.abs(moves[0]).max() > 0.2
    np.testing.assert_allclose(np.linalg.norm(moves[1]), 0.1, rtol=1e-4)
    np.testing.assert_allclose(moves[2], np.clip(moves[0], -0.1, 0.1), atol=1e-6)


def test_the_average_follows_the_parameters():
    stepper = Stepper(make(ema_decay=0.75))
    average = stepper.state.average.first
    for _ in range(3):
        stepper.run(1)
        average = average + 0.25 * (stepper.state.trained.first - average)
    np.testing.assert_allclose(stepper.state.average.first, average, atol=1e-6)
    assert float(jnp.abs(average - stepper.state.trained.first).max()) > 1e-4


def test_frozen_parts_meet_neither_gradient_nor_optimiser():
    stepper = Stepper(make({"freeze": True}))
    stepper.run(3)
    assert stepper.state.trained.scale is None
    np.testing.assert_array_equal(stepper.rest, np.full(16, 2.0))
    names = jax.tree_util.tree_leaves_with_path(stepper.state)
    assert not [p for p, _ in names if "scale" in jax.tree_util.keystr(p)]


def test_bfloat16_computes_low_and_keeps_high():
    low, high = Stepper(make(compute_dtype="bfloat16")), Stepper(make())
    a, b = low.run(3)[-1]["loss"], high.run(3)[-1]["loss"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low.state.trained))
    assert a != b
    np.testing.assert_allclose(a, b, rtol=0.05)


def test_groups_reach_the_right_parameters():
    frozen = trained_after(2, config(groups={"last": {"learning_rate": 0.0}}))
    start = Stepper(config()).state.trained
    np.testing.assert_array_equal(frozen.second, start.second)
    assert float(jnp.abs(frozen.first - start.first).max()) > 1e-5


def test_named_parameters_are_not_rounded(monkeypatch: pytest.MonkeyPatch):
    """Of the trained ones, and of the rest, which here is one array without a name."""
    seen, loss = {}, Regression.loss

    def watched(self: Regression, params: Any, batch: Any, key: jax.Array) -> Any:
        seen.update({name: getattr(params, name).dtype for name in ("first", "second", "scale")})
        return loss(self, params, batch, key)

    monkeypatch.setattr(Regression, "loss", watched)
    monkeypatch.setattr(Regression, "full_precision", lambda self, name: name in (".first", ""))
    Stepper(config({"freeze": True}, compute_dtype="bfloat16")).run(1)
    assert seen == {"first": jnp.float32, "second": jnp.bfloat16, "scale": jnp.float32}
