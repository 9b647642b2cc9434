"""Training under Giraffe's bases."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.policies.registry import make_policy
from models.load import load
from models.params import cast
from models.sharding import make_mesh
from research.context.giraffe.task import GiraffeParams, Slide, sliding
from tests.research.context.fine_tuning import (
    LENGTH,
    amplified,
    batch_of,
    nats,
    part,
    prepared,
    settings,
    step_of,
)
from train import loop
from train.config import TrainConfig, build
from train.export import Options, export_run
from train.metrics import read_metrics

NAME = "research.context.giraffe.task:GiraffeTask"
XPOS = {"basis": {"xpos": True}, "slide": {"start": 64.0, "end": 16.0, "step": 20.0}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    """Settings of the runs."""
    folder = tmp_path_factory.mktemp("giraffe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(folder / "cache"))
        yield settings(folder)


def test_the_slide_of_xpos_goes_on_after_every_update(config, tmp_path: pathlib.Path):
    """A run that is launched again goes on where it stood."""
    config = config.copy_and_resolve_references()
    config.task.name, config.task.basis = NAME, {"xpos": True}
    config.steps, config.evaluate_every = 4, 3
    built, mesh = build(TrainConfig, config.to_dict()), make_mesh("", jax.devices()[:1])
    first = loop.train(built, tmp_path, mesh, watch=lambda step, values: True)
    assert first.given_up and float(first.state.trained.scale_base) == 8168
    second = loop.train(built, tmp_path, mesh)
    assert float(second.state.trained.scale_base) == 8160
    # An exported run is read under the base that it reached.
    export_run(tmp_path, out := tmp_path / "out", Options())
    policy = make_policy(f"giraffe:{out}", load(out).cfg)
    assert float(policy.scheme.scale_base) == 8160
    assert float(policy.scheme.center) == LENGTH / 2
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [x["scale_base"] for x in lines if "scale_base" in x] == [8192, 8184, 8176, 8168]


def test_the_slide_ends_whatever_the_slopes():
    rule, b = sliding(Slide(64.0, 16.0, 20.0)), jnp.asarray(64.0)
    found = []
    for slope in (1.0, -3.0, 0.0, 5.0):
        update, _ = rule.update(jnp.asarray(slope), rule.init(b), b)
        b = b + update
        found.append(float(b))
    assert found == [44.0, 24.0, 16.0, 16.0]


def test_the_base_is_the_one_that_was_reached(config):
    """In training and in an evaluation, exact in low precision, and without a slope of its own."""
    task, _ = prepared(config, NAME, **XPOS)
    params = GiraffeParams(None, jnp.asarray(8184.0))
    low = cast({"scale_base": jnp.ones(1)}, jnp.bfloat16, task.full_precision)
    assert low["scale_base"].dtype == jnp.bfloat16  # another tree's leaf of that name
    assert cast(params, jnp.bfloat16, task.full_precision).scale_base == 8184
    step = step_of(batch_of([LENGTH]))
    for key in (None, jax.random.key(0)):
        scheme = task.policy(params, step, key).scheme
        assert float(scheme.scale_base) == 8184 and float(scheme.center) == LENGTH / 2
    slope = jax.grad(lambda p: task.policy(p, step, None).scheme.scale_base)(params)
    assert float(slope.scale_base) == 0


@pytest.fixture(scope="module")
def randomised(config):
    """A task with random positions, and parameters."""
    task, context = prepared(config, NAME, basis={"randomize": True, "scale": 2.0})
    return task, amplified(task, context)


def test_positions_are_random_in_training_only(randomised):
    task, params = randomised
    batch = batch_of([LENGTH])
    drawn = [nats(task, params, batch, key) for key in (0, 1)]
    assert drawn[0] != drawn[1] and drawn[0] == nats(task, params, batch, 0)
    assert task.policy(params, step_of(batch), None).scheme.positions is None
    scheme = task.policy(params, step_of(batch), jax.random.key(0)).scheme
    assert scheme.positions.shape == (1, LENGTH) and scheme.positions[0, 0] == 0


def test_random_positions_of_packed_documents(randomised):
    """A document does not see what follows in its row."""
    task, params = randomised
    batch = batch_of([16, 16])
    split = {**batch, "mask": batch["mask"].at[:, 16:].set(0.0)}
    other = {**split, "tokens": split["tokens"].at[:, 16:].set(3)}
    assert nats(task, params, split, 5) == nats(task, params, other, 5)
    assert nats(task, params, split, 5) != nats(task, params, split, 6)
    scheme = task.policy(params, step_of(batch), jax.random.key(5)).scheme
    at = np.asarray(scheme.positions)[0]
    assert at[0] == at[16] == 0
    assert (np.diff(at[:16]) > 0).all() and (np.diff(at[16:]) > 0).all()


@pytest.mark.parametrize("fields", [{"basis": {"scale": 4.0, "truncate": 16}}, XPOS])
def test_packed_documents_are_read_as_if_alone(config, fields: dict):
    task, context = prepared(config, NAME, **fields)
    params, batch = amplified(task, context), batch_of([16, 16])
    apart = [nats(task, params, part(batch, *ends)) for ends in ((0, 16), (16, 32))]
    assert nats(task, params, batch) == pytest.approx(sum(apart), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": {"scale": 0.5}}, r"scale is 0.5: give 1"),
        ({"basis": {"truncate": -3}}, r"truncate is -3"),
        ({"basis": {"xpos": True}, "slide": {"start": 8.0, "end": 16.0}}, r"start >= end > 0"),
        (
            {"basis": {"xpos": True}, "slide": {"end": 0.1}},
            r"scale_base 0.1 reaches \d+ tokens in float32, and the length is 32",
        ),
    ],
)
def test_bad_settings_are_refused(config, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        prepared(config, NAME, **fields)


def test_a_rope_type_goes_with_the_plain_basis_only(config):
    config = config.copy_and_resolve_references()
    config.task.model.rope = {"rope_type": "linear", "factor": 2.0}
    task, _ = prepared(config, NAME)
    assert task.policy(GiraffeParams(None), step_of(batch_of([4])), None) is None
    for basis in ({"scale": 2.0}, {"randomize": True}):
        with pytest.raises(ValueError, match="use one scheme or the other"):
            prepared(config, NAME, basis=basis)
    assert Slide() == Slide(8192.0, 128.0, 8.0)
