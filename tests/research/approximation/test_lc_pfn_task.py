"""Training LC-PFN through the loop, and what a short training must reach."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lc_pfn as config_module
from configs import lc_pfn_large
from models import lc_pfn, lc_pfn_io
from models.sharding import make_mesh
from ops import bar_distribution as bar
from research.approximation.lc_pfn import task as task_module
from research.approximation.lc_pfn.prior import sample_prior
from research.approximation.lc_pfn.task import Curves, LCPFNTask, by_epoch
from tests.goldens import golden
from train import export, loop
from train.config import TrainConfig, build, build_task
from train.metrics import read_metrics
from train.trained import read_trained

NETWORK = lc_pfn.Config(width=16, layers=1, heads=2, ffn=32, buckets=20, seq_len=12, dropout=0.0)
TASK = LCPFNTask(NETWORK, border_curves=200, eval_curves=32, eval_cutoffs=(2, 8))


def tiny() -> Any:
    """The shipped config, cut to a run of milliseconds per update."""
    config = config_module.get_config()
    config.task.network.update(dataclasses.asdict(NETWORK))
    config.task.update({"border_curves": 200, "eval_curves": 32, "eval_cutoffs": (2, 8)})
    config.batch_size, config.steps, config.steps_per_call, config.log_every = 8, 20, 10, 10
    config.optimizer.warmup_steps, config.checkpoint_every, config.evaluate_every = 5, 10, 20
    return config


def train(config: Any, folder: pathlib.Path) -> loop.Result:
    mesh = make_mesh("", jax.devices()[:1])
    return loop.train(build(TrainConfig, config.to_dict()), folder, mesh)


@pytest.mark.slow
def test_a_short_run_learns_and_exports(tmp_path: pathlib.Path):
    config = tiny()
    config.steps, config.optimizer.learning_rate = 100, 1e-2
    result = train(config, tmp_path / "run")
    losses = [x["loss"] for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in x]
    assert losses[-1] < losses[0] - 0.2
    assert set(result.evaluation) == {"log_likelihood/2", "log_likelihood/8"}
    export.export_run(tmp_path / "run", tmp_path / "out", export.Options())
    model = lc_pfn_io.load(tmp_path / "out")
    np.testing.assert_array_equal(model.borders, result.rest)
    jax.tree.map(np.testing.assert_array_equal, model.params, result.state.trained)
    assert model.cfg == NETWORK
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LC-PFN, which extrapolates learning curves, trained by" in card


@pytest.mark.slow
def test_runs_of_one_seed_are_the_same_and_borders_are_not_of_the_seed(tmp_path: pathlib.Path):
    config = tiny()
    one, two = (train(config, tmp_path / name).state.trained for name in ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    config.seed = 1
    other = train(config, tmp_path / "c")
    assert not np.array_equal(other.state.trained.out.w, one.out.w)
    np.testing.assert_array_equal(other.rest, TASK.borders)


@pytest.mark.slow
def test_the_large_config_takes_two_updates(tmp_path: pathlib.Path):
    config = lc_pfn_large.get_config()
    config.task.network.update({**dataclasses.asdict(NETWORK), "dropout": 0.2})
    config.task.update({"border_curves": 200, "eval_cutoffs": (2,), "epoch_steps": 1})
    config.batch_size, config.steps, config.steps_per_call = 4, 2, 1
    config.log_every = config.evaluate_every = config.checkpoint_every = 1
    config.optimizer.warmup_steps = 1
    result = train(config, tmp_path / "run")
    assert np.isfinite(list(result.evaluation.values())).all()


def test_the_large_config_is_the_papers():
    config = build(TrainConfig, lc_pfn_large.get_config().to_dict())
    task = build_task(config)
    assert task.network == lc_pfn.Config() and task.cutoff == "batch"
    assert config.steps * config.batch_size == 10_000_000
    assert config.optimizer.warmup_steps == 250 * task.epoch_steps


def test_the_schedule_changes_by_the_epoch():
    config = build(TrainConfig, lc_pfn_large.get_config().to_dict()).optimizer
    config = dataclasses.replace(config, learning_rate=1.0, warmup_steps=20)
    rule = by_epoch(config, steps=80, epoch_steps=10)
    params = jnp.zeros(())
    state = rule.init(params)
    rates = []
    for _ in range(80):
        update, state = rule.update(jnp.ones(()), state, params)
        rates.append(-float(update))  # Adam's step on a constant gradient is the rate itself
    expected = [0.0, 0.5, *(0.5 * (1 + np.cos(np.pi * e / 6)) for e in range(6))]
    np.testing.assert_allclose(rates, np.repeat(expected, 10), atol=1e-4)


def test_schedules_that_do_not_fit():
    config = build(TrainConfig, lc_pfn_large.get_config().to_dict()).optimizer
    with pytest.raises(ValueError, match="whole epochs of 7"):
        by_epoch(config, 100_000, 7)
    with pytest.raises(ValueError, match="adamw and a cosine"):
        by_epoch(dataclasses.replace(config, schedule="linear"), 100_000, 100)


def test_cutoffs_of_rows_and_batches():
    rows = TASK.generate(jax.random.key(0), 500, None)
    assert rows.y.shape == (500, 12)
    assert set(np.unique(rows.num_context)) == set(range(1, 12))
    task = dataclasses.replace(TASK, cutoff="batch")
    batches = [task.generate(jax.random.key(i), 5, None).num_context for i in range(80)]
    assert all(len(np.unique(b)) == 1 for b in batches)
    assert {int(b[0]) for b in batches} == set(range(1, 12))


def network() -> lc_pfn.Params:
    params = lc_pfn.specs(NETWORK)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def test_the_loss_is_the_mean_over_rows_of_their_later_points():
    params = task_module.TaskParams(network(), jnp.asarray(TASK.borders))
    batch = TASK.generate(jax.random.key(2), 6, None)
    value, _ = TASK.loss(params, batch, jax.random.key(0))
    x = jnp.tile(jnp.arange(1.0, 13.0)[None], (6, 1))
    logits = lc_pfn.forward(params.network, NETWORK, x, batch.y, batch.num_context)
    each = np.asarray(bar.log_prob(params.borders, logits, batch.y))
    rows = [each[i, int(s) :].mean() for i, s in enumerate(batch.num_context)]
    assert float(value) == pytest.approx(-np.mean(rows), rel=1e-5)
    # One cut-off for all rows: the mean over all later points of the batch.
    same = Curves(batch.y, jnp.full((6,), 4))
    logits = lc_pfn.forward(params.network, NETWORK, x, batch.y, same.num_context)
    each = np.asarray(bar.log_prob(params.borders, logits, batch.y))[:, 4:]
    value, _ = TASK.loss(params, same, jax.random.key(0))
    assert float(value) == pytest.approx(-each.mean(), rel=1e-5)


def test_the_loss_does_not_read_later_values_as_inputs():
    params = task_module.TaskParams(network(), jnp.asarray(TASK.borders))
    y = TASK.generate(jax.random.key(3), 1, None).y
    parts = []
    for shift in (0.0, 0.1):
        # Only the last point counts, and the one before it changes.
        moved = Curves(y.at[:, 10].add(shift), jnp.array([9]))
        parts.append(
            task_module._log_likelihood(params.network, NETWORK, params.borders, *_of(moved))
        )
    expected = bar.log_prob(params.borders, _logits(params, y, 9), y)[:, 10]
    moved = bar.log_prob(params.borders, _logits(params, y, 9), y.at[:, 10].add(0.1))[:, 10]
    np.testing.assert_allclose(3 * (parts[1] - parts[0]), moved - expected, atol=1e-4)


def _of(batch: Curves) -> tuple[jax.Array, jax.Array]:
    return batch.y, batch.num_context


def _logits(params: task_module.TaskParams, y: jax.Array, context: int) -> jax.Array:
    x = jnp.arange(1.0, 13.0)[None]
    return lc_pfn.forward(params.network, NETWORK, x, y, jnp.array([context]))


@pytest.mark.slow
def test_bfloat16_keeps_the_borders(tmp_path: pathlib.Path):
    config = tiny()
    config.compute_dtype = "bfloat16"
    result = train(config, tmp_path / "run")
    assert result.rest.dtype == jnp.float32 and (np.diff(result.rest) > 0).all()
    full = train(tiny(), tmp_path / "full").evaluation
    for name, value in result.evaluation.items():
        assert value == pytest.approx(full[name], abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": "both"}, "choose row or batch"),
        ({"eval_cutoffs": (12,)}, "from 1 to 11"),
        ({"families": ("exp4",)}, "no laws"),
        ({"kind": "flat"}, "unknown prior"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASK, **change)


@pytest.mark.slow
def test_training_approaches_the_posterior(tmp_path: pathlib.Path):
    """The protocol's 1,500 steps: log-likelihoods, and medians against importance sampling."""
    config = config_module.get_config()
    shape = {"width": 64, "layers": 3, "heads": 4, "ffn": 128, "buckets": 200}
    config.task.network.update(shape)
    config.batch_size, config.steps, config.steps_per_call = 32, 1500, 10
    config.optimizer.warmup_steps, config.evaluate_every, config.checkpoint_every = 150, 100, 100
    config.keep_checkpoints = 15
    result = train(config, tmp_path / "run")
    trace = read_metrics(tmp_path / "run" / "metrics.jsonl")
    values = {
        cutoff: [x[name] for x in trace if (name := f"evaluation/log_likelihood/{cutoff}") in x]
        for cutoff in config.task.eval_cutoffs
    }
    ends = [values[cutoff][-1] for cutoff in sorted(values)]
    assert np.all(np.diff(ends) > 0), ends  # more context, more certainty
    assert all(trace[-1] > trace[0] for trace in values.values())
    expected = np.array([1.10, 1.46, 1.85, 2.00, 2.08])
    np.testing.assert_allclose(ends, expected, atol=0.25)

    g = golden("lc_pfn", "posterior_reference")
    task = build_task(build(TrainConfig, config.to_dict()))
    early = read_trained(tmp_path / "run", 100).params
    gaps = [median_gap(task, params, g) for params in (early, result.state.trained)]
    assert gaps[1] < gaps[0] and gaps[1] < 0.06, gaps


def median_gap(task: LCPFNTask, params: lc_pfn.Params, g: dict[str, np.ndarray]) -> float:
    """Mean absolute difference of medians over contexts with enough effective draws."""
    rows, middle = g["ess"] > 1000, int(np.flatnonzero(g["q"] == 0.5)[0])
    context, targets = g["context"][rows], g["targets"]
    length = context.shape[1]
    x = np.concatenate([np.arange(1, length + 1), targets]).astype(np.float32)
    # Shorter contexts: their tokens first, then queries.
    medians = []
    for values in context:
        s = int((~np.isnan(values)).sum())
        row = np.concatenate([x[:s], targets.astype(np.float32)])
        y = np.concatenate([values[:s], np.zeros(len(targets))]).astype(np.float32)
        logits = lc_pfn.forward(
            params, task.network, jnp.asarray(row)[None], jnp.asarray(y)[None], jnp.array([s])
        )
        medians.append(bar.median(jnp.asarray(task.borders), logits[0, s:]))
    return float(np.abs(np.asarray(medians) - g["post_quantiles"][rows, :, middle]).mean())


def test_borders_have_equal_mass():
    task = LCPFNTask(dataclasses.replace(NETWORK, seq_len=100, buckets=200))
    borders = jnp.asarray(task.borders)
    key = jax.random.fold_in(jax.random.key(task.border_seed), 0)
    values = sample_prior(key, task.border_curves).noisy.reshape(-1)
    counts = np.bincount(np.asarray(bar.bucket_index(borders, values)), minlength=200)
    assert counts.sum() == 1_000_000 and np.abs(counts - 5000).max() <= 2  # float32 has ties
