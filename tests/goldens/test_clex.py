"""CLEX against the official code's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import clex
from models.attention import Step
from research.context.clex.scheme import CLEX
from tests.goldens import golden
from tests.models import tiny


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return golden("clex", "ode_frequencies")


def config(data, **changes) -> clex.CLEXConfig:
    fields = {
        "head_dim": int(data["head_dim"]),
        "base": 10000.0,  # of all arrays but base2_freqs, by their README
        "max_position": int(data["max_position"]),
        "max_factor": int(data["max_factor"]),
        "param_factor": float(data["param_factor"]),
        "activation": ("tanh", "silu")[int(data["act"][0])],
        "time_dt": round(float(data["time_dt"]), 6),
    }
    return clex.CLEXConfig(**(fields | changes))


def weights(data) -> clex.CLEXParams:
    return clex.CLEXParams(jnp.asarray(data["up_proj"]), jnp.asarray(data["down_proj"]))


def test_the_vector_field(data) -> None:
    found = jax.vmap(lambda t, z: clex.field(weights(data), config(data), t, z))(
        jnp.asarray(data["field_t"]), jnp.asarray(data["field_z"])
    )
    np.testing.assert_allclose(found, data["field_dz"], rtol=1e-4)


def test_frequencies_of_every_factor(data) -> None:
    cfg = config(data)
    found = np.asarray(clex.table(weights(data), cfg))
    np.testing.assert_allclose(found, data["freqs"], rtol=5e-5)
    np.testing.assert_array_equal(data["time_grid"], np.arange(1, cfg.max_factor + 1))
    np.testing.assert_allclose(found[0], data["inv_freq"], rtol=1e-6)
    # The step as it is stored, a little less than the number meant, changes nothing.
    stored = config(data, time_dt=float(data["time_dt"]))
    assert len(clex.nodes(stored)) == len(clex.nodes(cfg))
    np.testing.assert_allclose(clex.table(weights(data), stored), data["freqs"], rtol=5e-5)


def test_the_start_is_dynamic_ntk(data) -> None:
    still = weights(data)
    still = still.replace(w_down=jnp.zeros_like(still.w_down))
    found = clex.table(still, config(data))
    np.testing.assert_allclose(found, data["init_freqs"], rtol=5e-5)
    np.testing.assert_allclose(found, data["init_freqs_closed_form"], rtol=5e-5)


def test_frequencies_of_a_training_pass(data) -> None:
    cfg, t = config(data), float(data["train_t"])
    found = clex.frequencies(weights(data), cfg, jnp.asarray([t]), stop=t)[0]
    np.testing.assert_allclose(found, data["train_freq"], rtol=5e-5)
    drawn = clex.frequencies_at(weights(data), cfg, jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(drawn, data["train_freq"], rtol=5e-5)


def test_another_base(data) -> None:
    with jax.enable_x64(True):
        cfg = config(data, base=float(data["base2"]))
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), weights(data))
        exact = np.asarray(clex.table(params, cfg))
        assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, data["base2_freqs"], rtol=5e-5)
    np.testing.assert_allclose(clex.table(weights(data), cfg), data["base2_freqs"], rtol=5e-5)


@pytest.mark.parametrize("own", [False, True], ids=["given frequencies", "own frequencies"])
def test_tables_of_inference(data, own: bool) -> None:
    cfg, lengths = config(data), data["eval_seq_lens"]
    np.testing.assert_array_equal(clex.factor(lengths, cfg), data["eval_t"])
    np.testing.assert_array_equal([clex.factor(int(n), cfg) for n in lengths], data["eval_t"])
    freqs = clex.table(weights(data), cfg) if own else jnp.asarray(data["freqs"])
    at = np.stack([np.zeros_like(lengths), np.ones_like(lengths), lengths // 2, lengths - 1], 1)
    step = Step(jnp.asarray(at, jnp.int32), lengths=jnp.asarray(lengths, jnp.int32))
    rope = CLEX(freqs, cfg).rope(tiny.config(head_dim=cfg.head_dim), step, has_cache=False)
    tables = np.stack([np.asarray(x) for x in rope.q_angles], 1)
    rows = data["freqs"][data["eval_t"] - 1]
    angles = at[:, None, :, None] * np.concatenate([rows, rows], -1)[:, None, None]
    allowed = 1e-3 + (5e-5 * angles if own else 0.0)
    assert (np.abs(tables - data["eval_cos_sin"]) <= allowed).all()


def test_training_positions(data) -> None:
    sample, length = jnp.asarray(data["train_sampled"]), int(data["train_seq_len"])
    found = clex.pin_positions(sample, length, float(data["train_t"]), config(data))
    np.testing.assert_array_equal(found, data["train_positions"])
