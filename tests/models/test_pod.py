"""POD bases: exact at full rank, orthonormal, shared as outputs share features, told off-grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import deeponet, pod
from models.deeponet import DeepONetConfig, Params

CFG = DeepONetConfig((5, 7, 4), (2,), kind="pod", modes=4, points=12)
GRID = (np.linspace(0, 1, 3), np.linspace(0, 2, 4))
POINTS = np.stack([x.reshape(-1) for x in np.meshgrid(*GRID, indexing="ij")], axis=1)


def solutions(*shape: int, rank: int = 4) -> np.ndarray:
    """Samples of a space of that dimension (plus a mean)."""
    rng = np.random.default_rng(len(shape))
    modes = rng.normal(size=(rank, *shape[1:]))
    return 1.0 + np.tensordot(rng.normal(size=(shape[0], rank)), modes, 1)


def network(cfg: DeepONetConfig, s: np.ndarray) -> Params:
    specs = deeponet.specs(cfg)
    draw = np.random.default_rng(1)
    random = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), specs)
    return dataclasses.replace(random, fixed=pod.fixed_from_solutions(cfg, s))


def test_modes_are_orthonormal_and_reproduce_their_samples() -> None:
    s = solutions(20, 12)
    mean, basis, energy = pod.pod_basis(s, 4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(mean, s.mean(0))
    assert energy.sum() == pytest.approx(1.0) and np.all(np.diff(energy) < 0)
    coefficients = (s - mean) @ basis
    np.testing.assert_allclose(mean + coefficients @ basis.T, s, atol=1e-10)
    assert pod.truncation_error(mean, basis, s) < 1e-20
    left = pod.truncation_error(mean, basis[:, :3], s)
    variance = np.mean(np.square(s - mean))
    assert left == pytest.approx(energy[3] * variance)


def with_coefficients(params: Params, cfg: DeepONetConfig, values: np.ndarray) -> Params:
    """The network whose branch says ``values`` (n, width) for one-hot inputs of n sensors."""
    from models import fnn
    from models.layers import Linear

    layer = Linear(jnp.asarray(values, jnp.float32), jnp.zeros(values.shape[1]))
    return dataclasses.replace(params, branch=fnn.Params((layer,)))


@pytest.mark.parametrize("mode", ["split_both", "independent", "split_trunk", "split_branch"])
def test_true_coefficients_give_the_training_outputs(mode: str) -> None:
    """With as many modes as the rank, however several outputs share basis and coefficients."""
    n, q, c = 6, 12, 2
    s = solutions(n, q, c)
    cfg = DeepONetConfig((n, 5), (2,), kind="pod", modes=5, points=q, outputs=c, multi_output=mode)
    if mode == "split_branch":  # one basis for both outputs needs the rank of both
        cfg = dataclasses.replace(cfg, branch=(n, 10), modes=10)
    fixed = pod.fixed_from_solutions(cfg, s)
    basis, mean, scale = (np.asarray(x, np.float64) for x in (fixed.basis, fixed.mean, fixed.scale))
    unit = (s - mean) / scale
    np.testing.assert_allclose(np.mean(basis**2, axis=0 if mode != "split_trunk" else (0, 1)), 1.0)
    if mode == "split_trunk":  # joint modes: shared coefficients
        flat = basis.reshape(q * c, -1)
        values = unit.reshape(n, q * c) @ flat / (q * c)
    else:
        values = np.einsum("nqc,qcp->ncp", unit, np.broadcast_to(basis, (q, c, cfg.modes))) / q
    params = dataclasses.replace(network(cfg, s), fixed=fixed)
    if mode == "independent":
        from models import fnn
        from models.layers import Linear

        stack = jnp.asarray(np.moveaxis(values, 1, 0), jnp.float32)
        params = dataclasses.replace(
            params, branch=fnn.Params((Linear(stack, jnp.zeros((c, cfg.width))),))
        )
    else:
        params = with_coefficients(params, cfg, values.reshape(n, -1))
    found = deeponet.cartesian(params, cfg, jnp.eye(n), jnp.asarray(POINTS, jnp.float32))
    np.testing.assert_allclose(found, s, atol=2e-5)


def test_rows_and_interpolation() -> None:
    s = solutions(20, 12)
    params = network(CFG, s)
    u = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    y = jnp.asarray(POINTS, jnp.float32)
    whole = deeponet.cartesian(params, CFG, u, y)
    rows = np.array([7, 0, 7])
    some = deeponet.cartesian(pod.at_rows(params, rows), CFG, u, y[rows])
    np.testing.assert_allclose(some, whole[:, rows], atol=1e-6)
    same = pod.interpolate(params, GRID, POINTS[rows])
    np.testing.assert_allclose(deeponet.cartesian(same, CFG, u, y[rows]), some, atol=1e-6)
    between = 0.5 * (POINTS[:1] + POINTS[1:2])
    middle = pod.interpolate(params, GRID, between)
    found = deeponet.cartesian(middle, CFG, u, jnp.asarray(between, jnp.float32))
    np.testing.assert_allclose(found[:, 0], 0.5 * (whole[:, 0] + whole[:, 1]), atol=1e-5)


def test_bad_input_is_told() -> None:
    s = solutions(20, 12)
    params = network(CFG, s)
    with pytest.raises(ValueError, match=r"query 1 has coordinate 1 = 2.5, outside"):
        pod.interpolate(params, GRID, np.array([[0.5, 1.0], [0.5, 2.5]]))
    with pytest.raises(ValueError, match="does not carry a basis on 12"):
        pod.interpolate(params, (GRID[0],), POINTS)
    with pytest.raises(ValueError, match="at most 3 modes, asked for 4"):
        pod.pod_basis(s[:3], 4)
    with pytest.raises(ValueError, match="not finite"):
        pod.pod_basis(np.where(s == s.max(), np.nan, s), 4)
    with pytest.raises(ValueError, match="change points and outputs"):
        pod.fixed_from_solutions(CFG, s[:, :5])


SMOOTH = (
    DeepONetConfig((30, 8, 6), (1, 8, 6), activation="tanh"),
    DeepONetConfig((30, 8, 6), (1, 8, 6), stacked=True, outputs=2),
    DeepONetConfig((30, 8, 6), (1, 8, 6), outputs=2, multi_output="independent"),
    DeepONetConfig((30, 8, 8, 6), (1, 8, 8, 6), kind="modified", activation="sin"),
)


@pytest.mark.parametrize("cfg", SMOOTH, ids=lambda c: f"{c.kind}{c.stacked}{c.outputs}")
def test_a_basis_of_the_inputs_changes_neither_outputs_nor_gradients(cfg: DeepONetConfig) -> None:
    rng = np.random.default_rng(3)
    u = rng.normal(size=(50, 7)) @ rng.normal(size=(7, 30))
    basis = pod.input_basis(u.astype(np.float32))
    assert basis is not None and basis.shape == (7, 30)
    np.testing.assert_allclose(basis @ basis.T, np.eye(7), atol=1e-12)
    specs = deeponet.specs(cfg)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), specs)
    y = jnp.asarray(rng.uniform(size=(50, 1)), jnp.float32)

    def whole(params: Params) -> jax.Array:
        return jnp.mean(jnp.square(deeponet.aligned(params, cfg, jnp.asarray(u, jnp.float32), y)))

    def projected(params: Params) -> jax.Array:
        inner, small = pod.on_coefficients(params, cfg, basis)
        assert small.branch == (7, *cfg.branch[1:])
        coefficients = jnp.asarray(u @ basis.T, jnp.float32)
        return jnp.mean(jnp.square(deeponet.aligned(inner, small, coefficients, y)))

    both = [jax.value_and_grad(f)(params) for f in (whole, projected)]
    values, gradients = zip(*both, strict=True)
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-5)
    for exact, found in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5 * float(jnp.abs(exact).max() + 1))


def test_inputs_without_a_small_basis_have_none() -> None:
    rng = np.random.default_rng(0)
    assert pod.input_basis(rng.normal(size=(40, 12))) is None
    few = pod.input_basis(rng.normal(size=(5, 12)))
    assert few is not None and few.shape == (5, 12)
    noisy = np.outer(rng.normal(size=40), np.ones(12)) + 1e-5 * rng.normal(size=(40, 12))
    assert pod.input_basis(noisy) is None  # more than rounding would be lost
    assert pod.input_basis(np.zeros((4, 6))) is not None
    basis = np.eye(3, 12)
    with pytest.raises(ValueError, match="the branch reads 30 sensor values, got 12"):
        pod.on_coefficients(deeponet.specs(SMOOTH[0]), SMOOTH[0], basis)
