"""Schedules, clipping, decay and groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.params import Constant, ParamSpec, init
from tests.train.regression import make
from train.config import OptimizerConfig
from train.optimizer import clip_gradients, decayed, make_optimizer, make_schedule


def settings(**changes) -> OptimizerConfig:
    values = dict(
        name="adamw", learning_rate=1.0, schedule="cosine", warmup_steps=10, final_fraction=0.1,
        weight_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-8,
    )  # fmt: skip
    return OptimizerConfig(**{**values, **changes})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule: str):
    rate = make_schedule(settings(schedule=schedule), 110)
    values = np.array([float(rate(jnp.asarray(i))) for i in range(110)])
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert values.max() == 1.0
    end = 1.0 if schedule == "constant" else 0.1
    np.testing.assert_allclose(values[-1], end, rtol=1e-5)
    assert np.all(np.diff(values[10:]) <= 0)
    done = (60 - 10) / (109 - 10)
    middle = {
        "linear": 1 - 0.9 * done,
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * done)),
        "constant": 1.0,
    }[schedule]
    np.testing.assert_allclose(values[60], middle, rtol=1e-5)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="unknown schedule"):
        make_schedule(settings(schedule="step"), 100)
    with pytest.raises(ValueError, match="warmup_steps 10 leaves nothing"):
        make_schedule(settings(), 10)


def test_clip_by_norm_by_value_and_not_at_all():
    grads = {"a": jnp.array([3.0, -0.1]), "b": jnp.array([4.0])}
    norm = optax.tree.norm(grads)
    by_norm = clip_gradients(grads, norm, make(clip="norm", clip_threshold=1.0))
    np.testing.assert_allclose(optax.tree.norm(by_norm), 1.0, rtol=1e-6)
    np.testing.assert_allclose(by_norm["a"] / by_norm["b"], grads["a"] / 4.0, rtol=1e-6)
    small = clip_gradients(grads, norm, make(clip="norm", clip_threshold=100.0))
    np.testing.assert_array_equal(small["a"], grads["a"])
    by_value = clip_gradients(grads, norm, make(clip="value", clip_threshold=0.5))
    np.testing.assert_array_equal(by_value["a"], np.array([0.5, -0.1], np.float32))
    assert clip_gradients(grads, norm, make(clip="none")) is grads


SPECS = {
    "matrix": ParamSpec((2, 3), ("embed", "mlp"), Constant(1.0)),
    "stack": ParamSpec((4, 3), ("layers", "embed"), Constant(1.0)),
}


def test_decay_acts_on_matrices_only():
    assert decayed(SPECS) == {"['matrix']"}
    params = init(SPECS, jax.random.key(0))
    config = make(
        optimizer=dict(vars(settings(weight_decay=0.5, schedule="constant", warmup_steps=0)))
    )
    rule = make_optimizer(config, SPECS, lambda name: "main")
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = rule.update(zero, rule.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.5 * np.ones((2, 3)))
    np.testing.assert_array_equal(updates["stack"], np.zeros((4, 3)))


def test_groups_have_their_own_rate_and_rule():
    params = init(SPECS, jax.random.key(0))
    plain = settings(name="sgd", beta1=0.0, schedule="constant", warmup_steps=0)
    config = make(
        optimizer=dict(vars(plain)), groups={"other": {"learning_rate": 0.25, "weight_decay": 1.0}}
    )
    rule = make_optimizer(config, SPECS, lambda name: "other" if "matrix" in name else "main")
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = rule.update(ones, rule.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.5 * np.ones((2, 3)))
    np.testing.assert_allclose(updates["stack"], -np.ones((4, 3)))


def test_groups_that_do_not_exist_and_unknown_rules_are_refused():
    with pytest.raises(ValueError, match=r"groups\.head matches no parameter: this task has main"):
        make_optimizer(make(groups={"head": {}}), SPECS, lambda name: "main")
    with pytest.raises(ValueError, match="unknown optimizer"):
        make_optimizer(make(optimizer=dict(vars(settings(name="lion")))), SPECS, lambda n: "main")


def test_groups_are_clipped_by_themselves():
    """The norm of one group does not shrink the other's gradients."""
    params = init(SPECS, jax.random.key(0))
    plain = settings(name="sgd", beta1=0.0, schedule="constant", warmup_steps=0, weight_decay=0.0)
    config = make(optimizer=dict(vars(plain)), clip="group_norm", clip_threshold=1.0)
    rule = make_optimizer(config, SPECS, lambda name: "other" if "matrix" in name else "main")
    grads = {"matrix": jnp.full((2, 3), 100.0), "stack": jnp.full((4, 3), 0.01)}
    same = clip_gradients(grads, jnp.asarray(250.0), config)
    updates, _ = rule.update(same, rule.init(params), params)
    rate = plain.learning_rate
    np.testing.assert_allclose(jnp.linalg.norm(updates["matrix"]), rate, rtol=1e-5)
    np.testing.assert_allclose(updates["stack"], -rate * grads["stack"], rtol=1e-5)
