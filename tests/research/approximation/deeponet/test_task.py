"""Training through the repository's loop: all forms of data and network, and equations alone."""

import importlib
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import defaults
from models import deeponet
from models.sharding import make_mesh
from research.approximation.deeponet import objective, physics
from research.approximation.deeponet.data import Aligned
from research.approximation.deeponet.problems import NAMED_INPUTS
from tests.source_tree import ROOT
from train import loop
from train.config import TrainConfig, build, build_task
from train.metrics import read_metrics
from train.task import Context

pytestmark = pytest.mark.slow  # a minute in all: networks are trained

PLACE = "research.approximation.deeponet."
ODE = {"name": "ode", "sensors": 12}
GRID = {"name": "diffusion_reaction", "sensors": 12, "nt": 9}


def config(task: str = "task:DeepONetTask", steps: int = 100, rows: int = 40, **fields: Any) -> Any:
    """A run of less than a second; ``fields`` are those of the task."""
    values = defaults.training()
    base = {
        "name": PLACE + task,
        "problem": ODE,
        "functions": 40,
        "test_functions": 16,
        "model": {"branch": (12, 16, 8), "trunk": (1, 16, 8)},
    }
    values.task.update(base | fields)
    values.steps, values.batch_size, values.steps_per_call = steps, rows, 50
    values.log_every, values.checkpoint_every = 50, 1000
    values.clip = "none"
    values.optimizer.update({"learning_rate": 5e-3, "schedule": "constant", "weight_decay": 0.0,
                             "beta2": 0.999})  # fmt: skip
    return build(TrainConfig, values.to_dict())


def losses(folder: pathlib.Path) -> list[float]:
    return [x["loss"] for x in read_metrics(folder / "metrics.jsonl") if "loss" in x]


def train(cfg: TrainConfig, folder: pathlib.Path, devices: int = 1) -> loop.Result:
    mesh = make_mesh(f"data={devices}", jax.devices()[:devices])
    return loop.train(cfg, folder, mesh)


POD = {"kind": "pod", "branch": (12, 16, 5), "trunk": (2,), "modes": 5, "points": 108}
CASES = {
    "aligned": {},
    "batched": {"queries": 3, "test_queries": 2},
    "mini-batch": {"rows": 16},
    "cartesian": {"queries": 0, "test_queries": 0},
    "points": {"rows": 16, "queries": 0, "test_queries": 0, "batch_queries": 5},
    "stacked": {"model": {"branch": (12, 6, 8), "trunk": (1, 16, 8), "stacked": True}},
    "fnn": {"task": "task:FNNTask", "model": {"widths": (13, 16, 16, 1)}},
    "fnn-grid": {"task": "task:FNNTask", "model": {"widths": (13, 16, 16, 1)}, "queries": 0},
    "pod": {"problem": GRID, "model": POD, "queries": 0, "test_queries": 0},
    "pod-points": {"problem": GRID, "model": POD, "queries": 0, "test_queries": 0,
                   "batch_queries": 30},
    "scaled": {"problem": GRID, "model": {"branch": (12, 16, 8), "trunk": (2, 16, 8)},
               "queries": 4, "normalise": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_form_trains_through_the_loop(case: str, tmp_path: pathlib.Path) -> None:
    result = train(config(**CASES[case]), tmp_path)
    found = losses(tmp_path)
    assert found[-1] < 0.8 * found[0]
    assert {"mse", "mse_without_outliers", "relative_l2"} <= set(result.evaluation)
    assert 0 < result.evaluation["relative_l2"] < 1.5
    if "problem" not in CASES[case]:
        named = {f"relative_l2/{name}" for name in NAMED_INPUTS}
        assert named <= set(result.evaluation)


@pytest.mark.parametrize("name", ["deeponet", "deeponet_pod", "deeponet_physics"])
def test_the_configs_run_two_updates(name: str, tmp_path: pathlib.Path) -> None:
    values = importlib.import_module(f"configs.{name}").get_config()
    values.task.functions, values.task.test_functions, values.batch_size = 24, 5, 24
    values.steps = values.steps_per_call = values.log_every = values.checkpoint_every = 2
    values.evaluate_every = 0
    result = train(build(TrainConfig, values.to_dict()), tmp_path)
    assert len(losses(tmp_path)) == 1 and np.isfinite(result.evaluation["mse"])


@pytest.mark.slow
def test_the_command_trains(tmp_path: pathlib.Path) -> None:
    """As in the config's docstring, for a hundred updates on a few functions; then it resumes."""
    command = [
        sys.executable, "-m", "train", "--config=configs/deeponet.py", f"--workdir={tmp_path}",
        "--config.task.functions=50", "--config.task.test_functions=20", "--config.batch_size=50",
        "--config.steps=200", "--config.log_every=100", "--config.checkpoint_every=100",
        "--config.evaluate_every=0",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONWARNINGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished at step 200" in done.stderr and losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_normalisation_and_basis_are_kept_and_not_trained(tmp_path: pathlib.Path) -> None:
    cfg = config(**CASES["pod"], steps=50)
    task = build_task(cfg)
    result = train(cfg, tmp_path)
    assert jax.tree.leaves(result.rest) and result.state.trained.fixed is None
    np.testing.assert_array_equal(result.rest.basis, task.fixed().basis)
    # The loss is in units of the scale: of order one, though the solutions are of order 0.1.
    assert 0.1 < losses(tmp_path)[0] < 10 and float(result.rest.scale[0]) < 0.5
    assert float(jnp.mean(result.rest.mean)) == pytest.approx(
        float(np.mean(task.sets[0].s)), abs=1e-6
    )


def test_two_devices_train_like_one(tmp_path: pathlib.Path) -> None:
    """Functions are shared between the devices, full batch or not."""
    for case in ("aligned", "points"):
        cfg = config(**CASES[case], steps=50)
        ends = [
            train(cfg, tmp_path / f"{case}{devices}", devices).evaluation["mse"]
            for devices in (1, 2)
        ]
        assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    task, mesh = build_task(config()), make_mesh("data=2", jax.devices()[:2])
    kept = task.resident(Context(config(), mesh))
    assert kept["u"].sharding.shard_shape(kept["u"].shape) == (20, 12)


def test_test_functions_are_new_and_files_are_split_by_function(tmp_path: pathlib.Path) -> None:
    # Equally many with equally many queries: the same seed would draw the same.
    train_set, test_set = build_task(config(test_functions=40)).sets
    assert not {tuple(u) for u in train_set.u} & {tuple(u) for u in test_set.u}
    grid = np.linspace(0, 1, 6)
    u = np.random.default_rng(0).normal(size=(30, 4))
    np.savez(tmp_path / "x.npz", u=u, s=u[:, :1] * grid[None], v=u[:, 1:2] - grid[None])
    files = {"name": "file", "train": str(tmp_path / "x.npz"), "u": ("u",), "s": ("s", "v")}
    fields = {
        "problem": files,
        "functions": 24,
        "test_functions": 6,
        "queries": 0,
        "test_queries": 0,
        "model": {"branch": (4, 16, 16), "trunk": (1, 16, 8), "outputs": 2},
        "normalise": True,
    }
    fields["model"]["branch"] = (4, 16, 8)
    cfg = config(rows=24, **fields)
    parts = build_task(cfg).sets
    seen = [{tuple(u) for u in part.u} for part in parts]
    assert [len(x) for x in seen] == [24, 6] and not seen[0] & seen[1]
    result = train(cfg, tmp_path / "run")
    assert result.evaluation["relative_l2"] < 0.9
    with pytest.raises(ValueError, match="the file has 24 functions, asked for 25"):
        build_task(config(**(fields | {"functions": 25}))).sets  # noqa: B018


def test_bad_settings_are_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="batch_size 41 exceeds the 40 training"):
        train(config(rows=41), tmp_path / "a")
    with pytest.raises(ValueError, match="batch_queries needs shared queries"):
        train(config(batch_queries=3), tmp_path / "b")
    with pytest.raises(ValueError, match="a POD basis needs solutions on one grid"):
        train(config(problem=GRID, model=POD, queries=4), tmp_path / "c")
    with pytest.raises(ValueError, match="the branch reads 11 sensor values, got 12"):
        train(config(model={"branch": (11, 8), "trunk": (1, 8)}), tmp_path / "d")


def test_the_loss_is_in_units_of_the_scale_and_leaves_padding_out() -> None:
    batch = {"s": jnp.zeros((2, 2, 2)), "mask": jnp.asarray([[True, True], [True, False]])}
    predicted = jnp.ones((2, 2, 2)).at[..., 1].set(6.0).at[1, 1].set(1e6)
    loss, count = objective.squared_error(predicted, batch, jnp.asarray([1.0, 3.0]))
    assert float(loss) == pytest.approx((1 + 4) / 2) and float(count) == 6
    single = {"s": jnp.zeros((2,))}
    loss, count = objective.squared_error(jnp.asarray([2.0, 6.0]), single, jnp.asarray([2.0]))
    assert float(loss) == pytest.approx((1 + 9) / 2) and float(count) == 2


def test_error_metrics() -> None:
    s, predicted = np.ones(2000), np.ones(2000)
    predicted[:2], predicted[2] = 11.0, 2.0
    found = objective.error_metrics(predicted, s, np.ones(2000, bool))
    assert found["mse"] == pytest.approx(201 / 2000)
    assert found["mse_without_outliers"] == pytest.approx(1 / 1998)
    assert found["relative_l2"] == pytest.approx(np.sqrt(201 / 2000))
    part = objective.error_metrics(predicted, s, np.arange(2000) > 1)
    assert part["mse"] == pytest.approx(1 / 1998)


SMOOTH = {"branch": (12, 16, 8), "trunk": (1, 16, 8), "activation": "tanh"}
SMOOTH_2 = {"branch": (12, 16, 16, 8), "trunk": (2, 16, 16, 8), "activation": "tanh",
            "kind": "modified"}  # fmt: skip


@pytest.mark.parametrize("name", ["antiderivative", "diffusion_reaction"])
def test_equations_alone_train_a_network(name: str, tmp_path: pathlib.Path) -> None:
    ode = name == "antiderivative"
    fields = {
        "problem": ODE if ode else GRID,
        "residual": name,
        "queries": 8,
        "test_queries": 4,
        "model": SMOOTH if ode else SMOOTH_2,
    }
    steps = 600 if ode else 200
    result = train(config("physics:PhysicsTask", steps=steps, **fields), tmp_path)
    found = losses(tmp_path)
    assert found[-1] < 0.3 * found[0]
    if ode:  # no solution was seen; an untrained network is at 1 or above
        assert result.evaluation["relative_l2"] < 0.5


def test_the_residual_of_a_known_solution_is_zero() -> None:
    """s = x t solves the equation with the source that makes it so, and u = cos has sin."""
    y = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 5, 2)), jnp.float32)
    x, t = y[..., 0], y[..., 1]
    wave = lambda y: jnp.sin(2.0 * y[..., 0]) * y[..., 1] ** 2
    s, s_t = jnp.sin(2 * x) * t**2, 2 * t * jnp.sin(2 * x)
    source = s_t + 0.3 * 4 * s - 0.2 * s**2
    left = objective.diffusion_reaction(wave, y, source, diffusivity=0.3, rate=0.2)
    np.testing.assert_allclose(left, 0, atol=1e-5)
    left = objective.antiderivative(lambda y: jnp.sin(y[..., 0]), y[..., :1], jnp.cos(x))
    np.testing.assert_allclose(left, 0, atol=1e-6)


def test_physics_reads_inputs_at_its_points_and_says_what_it_needs() -> None:
    fields = {"problem": GRID, "residual": "diffusion_reaction", "queries": 6, "model": SMOOTH_2}
    task = build_task(config("physics:PhysicsTask", **fields))
    problem = physics.make_problem(GRID)
    found = physics.collocation(problem, np.random.default_rng(0), 4, 6)
    x = np.linspace(0, 1, 12)
    near = np.stack(
        [np.interp(at[:, 0], x, u) for at, u in zip(found["y"], found["u"], strict=True)]
    )
    np.testing.assert_allclose(near, found["u_at_y"], atol=0.2)
    known = found["known"].reshape(-1, 2)
    assert np.all((known[:, 1] == 0) | np.isin(known[:, 0], (0, 1)))
    params = task.init(jax.random.key(0), None, Context(config(), make_mesh("", jax.devices()[:1])))
    assert isinstance(params, deeponet.Params)
    for changes, message in (
        ({"residual": "antiderivative"}, "does not fit problem"),
        ({"normalise": True}, "no solutions: give queries=1"),
    ):
        with pytest.raises(ValueError, match=message):
            build_task(config("physics:PhysicsTask", **(fields | changes)))
    relu = task.model.__class__((12, 8), (2, 8))
    with pytest.raises(ValueError, match="relu has no second derivative"):
        objective.physics_residual(
            deeponet.specs(relu), relu, "diffusion_reaction", jnp.zeros((1, 12)),
            jnp.zeros((1, 1, 2)), jnp.zeros((1, 1)),
        )  # fmt: skip


def test_triples_of_one_function_may_repeat() -> None:
    """A function in several rows: the loss is the mean over rows."""
    task = build_task(config())
    params = task.init(jax.random.key(0), None, Context(config(), make_mesh("", jax.devices()[:1])))
    part = Aligned(task.sets[0].u[[0, 0]], task.sets[0].y[:2], task.sets[0].s[:2])
    predicted = task.outputs(params, part)
    batch = {name: jnp.asarray(getattr(part, name)) for name in "uys"}
    loss, metrics = task.loss(params, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(np.mean((predicted - part.s) ** 2)), rel=1e-5)
    assert float(metrics["weight"]) == 2
