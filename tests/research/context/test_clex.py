"""CLEX's rotations in training and inference, and the training of decoder and ODE together."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.long_context import load_policies
from inference.cache import DenseLayer
from inference.policies.positions_file import read_positions, write_positions
from inference.policies.registry import make_policy
from inference.policies.split_tree import split_tree
from models import clex, decoder
from models.attention import Step
from models.load import load
from models.params import init
from models.positions import rope_theta
from models.sharding import make_mesh
from research.context.clex.scheme import CLEX, check_model, describe, draw_scheme, make_scheme
from tests.inference.models import config as decoder_config
from tests.inference.models import engine
from tests.models import tiny
from tests.research.context.fine_tuning import (
    LENGTH,
    amplified,
    batch_of,
    nats,
    prepared,
    settings,
    step_of,
)
from tests.research.context.test_decoding import clex_scheme
from train import loop
from train.config import TrainConfig, build
from train.export import Options, export_run
from train.metrics import read_metrics

NAME = "research.context.clex.task:CLEXTask"
CFG = decoder_config()


def ode(head_dim: int, base: float) -> dict:
    """Settings for texts of up to 4 times the rows of these tests."""
    return {
        "head_dim": head_dim, "base": base, "max_position": LENGTH, "max_factor": 4, "time_dt": 0.5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    """Settings of the runs."""
    folder = tmp_path_factory.mktemp("clex")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(folder / "cache"))
        config = settings(folder)
        config.task.name = NAME
        model = config.task.model
        head_dim = model.get("head_dim") or model.hidden_size // model.num_heads
        config.task.ode = ode(head_dim, model.get("rope_base", 10000.0))
        yield config


@pytest.fixture(scope="module")
def prepared_task(config):
    """The task and parameters whose positions matter."""
    task, context = prepared(config, NAME)
    return task, amplified(task, context)


# Inference.
def test_the_factor_grows_with_the_text():
    """Each row is rotated by the frequencies of its own length."""
    scheme = clex_scheme()
    lengths = jnp.asarray([16, 17, 40, 64], jnp.int32)
    step = Step(jnp.full((4, 1), 5, jnp.int32), lengths=lengths)
    cos, sin = scheme.rope(CFG, step, False).q_angles
    half = CFG.rotary_dim // 2
    found = np.arctan2(sin[:, 0, :half], cos[:, 0, :half])
    turns = 5 * np.asarray(scheme.table)[[0, 1, 2, 3]]
    np.testing.assert_allclose(np.cos(found), np.cos(turns), atol=1e-5)
    np.testing.assert_allclose(np.sin(found), np.sin(turns), atol=1e-5)
    np.testing.assert_array_equal(
        np.asarray(scheme.table[0]), rope_theta(CFG.rotary_dim, CFG.rope_base).astype(np.float32)
    )


def test_without_lengths_the_last_position_tells():
    scheme = clex_scheme()
    step = Step(jnp.asarray([[3, 4], [15, 16]], jnp.int32))
    told = dataclasses.replace(step, lengths=jnp.asarray([5, 17], jnp.int32))
    for ours, theirs in zip(
        scheme.rope(CFG, step, False).q_angles, scheme.rope(CFG, told, False).q_angles, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_cached_keys_are_raw_and_turn_with_the_queries():
    step = Step(
        jnp.asarray([[20]], jnp.int32),
        start=jnp.asarray([20], jnp.int32),
        slot_positions=jnp.arange(32, dtype=jnp.int32)[None],
        lengths=jnp.asarray([21], jnp.int32),
    )
    rope = clex_scheme().rope(CFG, step, True)
    assert rope.rotate_cached_keys
    for q, k in zip(rope.q_angles, rope.k_angles, strict=True):
        np.testing.assert_allclose(q[0, 0], k[0, 20], atol=1e-6)


def test_a_layer_whose_factor_changes_equals_one_that_starts_anew():
    """Raw keys cached under one factor, all turned by the next: what a fresh pass mixes."""
    rng, total, cached = np.random.default_rng(0), 20, 16
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, total, heads, CFG.head_dim)), jnp.float32)
        for heads in (CFG.num_heads, CFG.num_kv_heads, CFG.num_kv_heads)
    )
    policy = decoder.default_policy(CFG, clex_scheme())
    row = jnp.arange(total, dtype=jnp.int32)[None]

    def attend(start, stop, cache):
        step = Step(
            row[:, start:stop],
            start=jnp.asarray([start], jnp.int32),
            slot_positions=row,
            lengths=jnp.asarray([stop], jnp.int32),
        )
        new_q, new_k, new_v = (x[:, start:stop] for x in (q, k, v))
        shared = policy.prepare(CFG, step)
        return policy.attend(None, shared, new_q, new_k, new_v, None, step, cache)

    empty = DenseLayer(*(jnp.zeros((1, CFG.num_kv_heads, total, CFG.head_dim)) for _ in "kv"))
    first = attend(0, cached, empty)
    second = attend(cached, total, first.cache)
    whole = Step(row, lengths=jnp.asarray([total], jnp.int32))
    want = policy.attend(None, policy.prepare(CFG, whole), q, k, v, None, whole, None).out
    np.testing.assert_allclose(second.out, want[:, cached:], atol=1e-5)
    # The factors do differ: what was mixed under the first is not what the second would give.
    assert np.abs(first.out - want[:, :cached]).max() > 1e-2


def test_queries_are_scaled_by_length_if_asked():
    step = Step(jnp.zeros((2, 1), jnp.int32), lengths=jnp.asarray([16, 40], jnp.int32))
    scale = clex_scheme(log_scale=True).rope(CFG, step, False).q_scale
    np.testing.assert_allclose(np.ravel(scale), [1.0, np.log(40) / np.log(16)], rtol=1e-6)
    assert clex_scheme().rope(CFG, step, False).q_scale is None


def test_texts_without_a_factor_are_refused():
    """The policy hands the scheme's limit on, to the engine and to the long-context harness."""
    policy = decoder.default_policy(CFG, clex_scheme())
    assert policy.max_length == split_tree(policy).max_length == 64 < CFG.max_length
    assert decoder.default_policy(CFG).max_length is None
    for limit in (None, 64):
        with pytest.raises(ValueError, match="beyond the context of 64"):
            engine(policy=policy, context_limit=limit).generate([[1] * 60], 20)
    longer = engine(policy=policy, context_limit=65)
    with pytest.raises(ValueError, match=r"context_limit is 65, .* positions end at 64 tokens"):
        longer.generate([[1] * 6], 2)


def test_the_harness_refuses_lengths_without_a_factor(tmp_path: pathlib.Path):
    base = load("records-11m")
    ode = clex.CLEXConfig(base.cfg.rotary_dim, base.cfg.rope_base, 256, 4, time_dt=0.5)
    params = init(clex.specs(ode), jax.random.key(0))
    write_positions(tmp_path, "clex", describe(params, ode))
    name = f"clex:{tmp_path}"
    assert load_policies([name], base, 1024)[name][1].max_length == 1024
    with pytest.raises(ValueError, match=r"longest text for 'clex:.*' is 1025, .* end at 1024"):
        load_policies([name], base, 1025)


def test_the_ode_of_another_model_is_refused():
    for head_dim, base, word in ((16, CFG.rope_base, "head_dim"), (8, 77.0, "base")):
        other = clex.CLEXConfig(head_dim, base, 16)
        with pytest.raises(ValueError, match=rf"set up for {word}"):
            check_model(CFG, other)
    scaled = tiny.config(position="learned", norm="layer", gated_mlp=False, activation="gelu")
    with pytest.raises(ValueError, match="use one scheme or the other"):
        check_model(scaled, clex.CLEXConfig(8, 1e4, 16))


# Training.
def test_one_draw_serves_all_rows_and_counts_within_documents(prepared_task):
    task, params = prepared_task
    positions = jnp.asarray([np.arange(LENGTH), np.r_[0 : LENGTH // 2, 0 : LENGTH // 2]], jnp.int32)
    t, key = jnp.asarray(3.0), jax.random.key(0)
    scheme = draw_scheme(params.ode, task.ode, Step(positions), t, key)
    at = np.asarray(scheme.positions)
    assert at[0, 0] == at[1, 0] == at[1, LENGTH // 2] == 0 and at[0, -1] == 3 * LENGTH - 1
    np.testing.assert_array_equal(at[0, : LENGTH // 2], at[1, : LENGTH // 2])
    np.testing.assert_array_equal(np.diff(at[0, LENGTH // 2 :]), np.diff(at[1, LENGTH // 2 :]))
    np.testing.assert_allclose(
        scheme.inv_freq, make_scheme(params.ode, task.ode).table[2], rtol=1e-6
    )


def test_positions_are_drawn_in_training_only(prepared_task):
    task, params = prepared_task
    batch = batch_of([LENGTH])
    drawn = {nats(task, params, batch, key) for key in range(6)}
    assert len(drawn) > 2 and nats(task, params, batch, 0) == nats(task, params, batch, 0)
    assert isinstance(task.policy(params, step_of(batch), None).scheme, CLEX)


def test_the_control_draws_the_same_positions_at_the_models_frequencies(prepared_task):
    task, params = prepared_task
    control = dataclasses.replace(task, plain_frequencies=True)
    step = step_of(batch_of([LENGTH]))
    keys = [jax.random.key(seed) for seed in range(6)]
    ours, theirs = ([t.policy(params, step, key).scheme for key in keys] for t in (control, task))
    theta = rope_theta(task.ode.head_dim, task.ode.base)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.positions, other.positions)
        np.testing.assert_allclose(mine.inv_freq, theta, rtol=1e-6)
    assert any(np.abs(other.inv_freq - theta).max() > 1e-3 for other in theirs)
    assert control.policy(params, step, None) is None and control.positions(params) is None


def slopes(task, params, t: float):
    """Gradient of the loss of a pass at one factor by the ODE's parameters."""
    batch, key = batch_of([LENGTH]), jax.random.key(1)

    def loss(ode_params):
        scheme = draw_scheme(ode_params, task.ode, step_of(batch), jnp.asarray(t), key)

        policy = decoder.default_policy(task.model, scheme)
        return task.nats(params, batch, policy=policy)[0]

    return jax.jit(jax.grad(loss))(params.ode)


def test_what_the_ode_learns_from(prepared_task):
    """At first only the last matrix; at the factor 1 nothing is solved."""
    task, params = prepared_task
    beyond, at_one = slopes(task, params, 2.0), slopes(task, params, 1.0)
    assert float(jnp.abs(beyond.w_down).max()) > 0 and float(jnp.abs(beyond.w_up).max()) == 0
    assert float(jnp.abs(at_one.w_down).max()) == float(jnp.abs(at_one.w_up).max()) == 0


def test_decoder_and_ode_are_trained_together(config, tmp_path: pathlib.Path):
    config = config.copy_and_resolve_references()
    config.groups = {"ode": {"learning_rate": 1e-2}}
    config.steps = 4
    built, mesh = build(TrainConfig, config.to_dict()), make_mesh("", jax.devices()[:1])
    task, context = prepared(config, NAME)
    first = task.init(jax.random.key(0), None, context)
    last = loop.train(built, tmp_path / "run", mesh).state.trained
    assert float(jnp.abs(last.ode.w_down).max()) > 1e-4
    assert float(jnp.abs(first.ode.w_down).max()) == 0
    factors = [
        x["factor"] for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "factor" in x
    ]
    assert len(factors) == 4 and set(factors) <= {1.0, 2.0, 3.0, 4.0}
    # An exported run is read under its own frequencies.
    export_run(tmp_path / "run", tmp_path / "out", Options())
    model = load(tmp_path / "out")
    policy = make_policy(f"clex:{tmp_path / 'out'}", model.cfg)
    np.testing.assert_array_equal(
        policy.scheme.table,
        make_scheme(last.ode, task.ode).table,  # pyright: ignore
    )
    np.testing.assert_array_equal(model.params.embed, last.trunk.embed)


def test_the_ode_alone_can_be_left_at_dynamic_ntk(config):
    """A learning rate of 0 for its group; the group has the ODE and nothing else."""
    task, _ = prepared(config, NAME)
    assert task.group(".ode.w_up") == task.group(".ode.w_down") == "ode"
    assert task.group(".trunk.embed") != "ode" and task.full_precision(".ode.w_up")
    assert not task.full_precision(".trunk.embed")


def test_an_ode_for_other_rotations_is_refused(config):
    wrong = dict(config.task.ode.to_dict(), base=5.0)
    with pytest.raises(ValueError, match=r"set up for base 5.0 and the model rotates with"):
        prepared(config, NAME, ode=wrong)


def test_a_folder_that_tells_no_ode_is_refused(tmp_path: pathlib.Path):
    name = f"clex:{tmp_path}"
    with pytest.raises(FileNotFoundError, match="export a run of clex there"):
        make_policy(name, CFG)
    write_positions(tmp_path, "giraffe", {})
    with pytest.raises(ValueError, match="is of 'giraffe': use that policy"):
        make_policy(name, CFG)
    write_positions(tmp_path, "clex", {"cfg": ode(8, CFG.rope_base), "w_up": [[1.0]]})
    with pytest.raises(ValueError, match=r"tells no ODE .*export it again"):
        make_policy(name, CFG)
    (tmp_path / "positions.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_positions(str(tmp_path), "clex")
