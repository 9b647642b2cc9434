"""Training for early exits: layer dropout, the losses at the exits, and whose turn it is."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.layer_runs import LayerChoice
from models.sharding import make_mesh
from research.speculative.del_exit.objective import (
    active_exits,
    draw_layers,
    dropout_rates,
    exit_weights,
    growth,
)
from tests.research.context.fine_tuning import batch_of, prepared, settings
from train.config import TrainConfig, build
from train.loop import train

NAME = "research.speculative.del_exit.task:LayerSkipTask"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("layerskip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(folder / "cache"))
        found = settings(folder)
        found.task.model.num_layers = 3
        yield found


def test_dropout_grows_with_depth_and_with_training():
    rates = dropout_rates(5, 0.2)
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)
    assert rates[2] == pytest.approx(0.2 * (math.sqrt(2) - 1))
    np.testing.assert_allclose([growth(jnp.asarray(t), 11) for t in (0, 5, 10, 99)],
                               [0, math.sqrt(2) - 1, 1, 1], atol=1e-6)  # fmt: skip
    rows = draw_layers(jax.random.key(0), jnp.asarray(rates, jnp.float32), 4000)
    np.testing.assert_allclose(1 - np.asarray(rows).mean(axis=1), rates, atol=0.02)
    assert np.asarray(rows)[0].all()


def test_the_exits_take_turns_and_their_weights_sum_to_one():
    np.testing.assert_allclose(exit_weights(5, 0.2), [0, 0.2, 0.6, 1.2, 4 + 0.2 * 6])
    seen = set()
    for step in range(4):
        exits, weights = active_exits(5, 2, 0.2, jnp.asarray(step))
        counted = np.asarray(exits)[np.asarray(weights) > 0].tolist()
        seen.add(tuple(counted))
        assert float(weights.sum()) == pytest.approx(1.0)
        chosen = exit_weights(5, 0.2)[counted]
        np.testing.assert_allclose(np.asarray(weights)[np.asarray(weights) > 0],
                                   chosen / chosen.sum(), rtol=1e-6)  # fmt: skip
    assert seen == {(2, 4), (1, 3, 4)}
    every = active_exits(3, 1, 0.0, jnp.asarray(7))
    np.testing.assert_array_equal(every[1], [0, 0, 1])
    assert float(active_exits(1, 2, 0.2, jnp.asarray(0))[1].sum()) == 1


def test_the_loss_is_the_weighted_mean_of_its_exits(config):
    task, context = prepared(config, NAME, dropout=0.0)
    params = task.init(jax.random.key(0), None, context)
    batch = batch_of([20, 12])
    nats = np.asarray(jax.jit(task.exit_nats)(params, batch)) / 32
    assert nats[-1] == pytest.approx(float(task.nats(params, batch)[0]) / 32, rel=1e-5)
    loss_of = jax.jit(task.loss)
    for number in (0, 1):
        numbered = batch | {"number": jnp.asarray([number])}
        loss, metrics = loss_of(params, numbered, jax.random.key(0))
        exits, weights = active_exits(3, 2, 0.2, jnp.asarray(number))
        assert float(loss) == pytest.approx(float(nats[np.asarray(exits)] @ weights), rel=1e-5)
        assert float(metrics["last"]) == pytest.approx(nats[-1], rel=1e-5)
        assert float(metrics["weight"]) == 32


@pytest.mark.parametrize("unrolled", [False, True])
def test_dropped_layers_pass_the_stream_of_their_rows(config, unrolled):
    task, context = prepared(config, NAME)
    params = task.init(jax.random.key(0), None, context)
    params = decoder.unstack(params) if unrolled else params
    batch = batch_of([16], seed=1)
    batch = {name: jnp.concatenate([x, x]) for name, x in batch.items()}
    rows = jnp.asarray([[True, True], [True, False], [True, True]])
    states = jax.jit(
        lambda p: task.run(p, batch, layers=LayerChoice(rows=rows), all_hidden=True).hidden_states
    )(params)
    np.testing.assert_array_equal(states[2, 1], states[1, 1])
    assert float(np.abs(states[2, 0] - states[1, 0]).max()) > 1e-3
    np.testing.assert_array_equal(states[1, 0], states[1, 1])


def test_a_short_run_trains_and_reports_every_exit(config, tmp_path: pathlib.Path):
    config = config.copy_and_resolve_references()
    config.task.name, config.evaluate_every = NAME, 3
    config.task.growing_steps = 3
    mesh = make_mesh("", jax.devices()[:1])
    found = train(build(TrainConfig, config.to_dict()), tmp_path, mesh).evaluation
    assert found["nats_per_token/exit3"] == pytest.approx(found["nats_per_token"], rel=1e-5)
    assert found["nats_per_token/exit1"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": 1.0}, "give a dropout in \\[0, 1\\)"),
        ({"exit_scale": -0.1}, "nothing negative"),
        ({"rotation": 0}, "rotation must be 1"),
    ],
)
def test_settings_are_checked(config, fields, message):
    with pytest.raises(ValueError, match=message):
        prepared(config, NAME, **fields)
