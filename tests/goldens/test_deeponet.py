"""DeepONet's networks, input spaces and solvers against other implementations' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import deeponet, fnn
from models.deeponet import DeepONetConfig, Fixed, Params
from models.layers import Linear
from research.approximation.deeponet import interpolation, spaces
from research.approximation.deeponet.systems import ode, reaction, stochastic, transport
from tests.goldens import golden

deeponet_golden = functools.partial(golden, "deeponet")
aligned, cartesian, batched = (
    jax.jit(form, static_argnums=1)
    for form in (deeponet.aligned, deeponet.cartesian, deeponet.batched)
)
Arrays = dict[str, np.ndarray]


def _layer(g: Arrays, weight: str, bias: str) -> Linear:
    """A layer from (out, in) arrays."""
    return Linear(jnp.asarray(g[weight].T), jnp.asarray(g[bias]))


def _net(g: Arrays, name: str) -> fnn.Params:
    count = sum(key.startswith(f"{name}.linears.") and key.endswith("weight") for key in g)
    layers = (f"{name}.linears.{i}" for i in range(count))
    return fnn.Params(tuple(_layer(g, f"{x}.weight", f"{x}.bias") for x in layers))


def _widths(net: fnn.Params) -> tuple[int, ...]:
    return (net.layers[0].w.shape[0], *(layer.w.shape[1] for layer in net.layers))


def _plain() -> Fixed:
    return Fixed(jnp.zeros(1), jnp.ones(1))


def _vanilla(g: Arrays) -> tuple[Params, DeepONetConfig]:
    branch, trunk = _net(g, "net.branch"), _net(g, "net.trunk")
    cfg = DeepONetConfig(_widths(branch), _widths(trunk))
    return Params(branch, trunk, None, jnp.asarray(g["net.b.0"]).reshape(1), _plain()), cfg


def _close(a: jax.Array, b: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_vanilla() -> None:
    g = deeponet_golden("forward")
    params, cfg = _vanilla(g)
    u = jnp.asarray(g["branch_in"])
    _close(aligned(params, cfg, u, jnp.asarray(g["trunk_in_aligned"])),
           g["y_aligned"][:, 0])  # fmt: skip
    queries = jnp.asarray(g["trunk_in_cartesian"])
    _close(cartesian(params, cfg, u, queries), g["y_cartesian"])
    own = jnp.broadcast_to(queries[None], (u.shape[0], *queries.shape))
    _close(batched(params, cfg, u, own), g["y_cartesian"])


def test_pod() -> None:
    g = deeponet_golden("forward")
    u, queries = jnp.asarray(g["branch_in"]), jnp.asarray(g["trunk_in_cartesian"])
    basis = jnp.asarray(g["pod_basis"])[:, None]
    points, _, modes = basis.shape
    branch = _net(g, "net.branch")
    d = (queries.shape[1],)
    cfg = DeepONetConfig(_widths(branch), d, kind="pod", modes=modes, points=points)
    mean = jnp.asarray(g["pod_mean"])[:, None]
    params = Params(branch, None, None, None, Fixed(mean, jnp.ones(1), basis))
    _close(cartesian(params, cfg, u, queries), g["pod_mean"][None] + g["y_pod"])

    branch, trunk = _net(g, "podt.branch"), _net(g, "podt.trunk")
    cfg = DeepONetConfig(_widths(branch), _widths(trunk), kind="pod", modes=modes, points=points)
    fixed = Fixed(jnp.zeros_like(mean), jnp.ones(1), basis)
    params = Params(branch, trunk, None, jnp.asarray(g["podt.b"]).reshape(1), fixed)
    _close(cartesian(params, cfg, u, queries), g["y_pod_trunk"])


def test_stacked() -> None:
    g = deeponet_golden("forward")
    params, cfg = _vanilla(g)
    p, hidden, m = g["stacked_w"].shape
    layers = (
        Linear(jnp.asarray(np.swapaxes(g["stacked_w"], 1, 2)), jnp.asarray(g["stacked_b"])),
        Linear(jnp.asarray(g["stacked_c"][..., None]), jnp.asarray(g["stacked_cb"][:, None])),
    )
    cfg = DeepONetConfig((m, hidden, p), cfg.trunk, stacked=True)
    params = params.replace(branch=fnn.Params(layers))
    u = jnp.asarray(g["branch_in"])
    _close(deeponet.branch_features(params, cfg, u)[:, 0], g["stacked_branch_out"])
    y = jnp.asarray(g["trunk_in_aligned"])
    _close(aligned(params, cfg, u, y), g["y_stacked"][:, 0])


def test_modified() -> None:
    g = deeponet_golden("modified_forward")

    def net(name: str) -> fnn.Params:
        hidden = sum(key.startswith(name) and key.endswith("_w") for key in g) - 1
        names = [*(f"{name}{k}" for k in range(hidden)), f"{name}_out"]
        return fnn.Params(tuple(_layer(g, f"{x}_w", f"{x}_b") for x in names))

    branch, trunk = net("branch"), net("trunk")
    cfg = DeepONetConfig(_widths(branch), _widths(trunk), activation="tanh", kind="modified")
    encoders = tuple(_layer(g, f"enc_{x}_w", f"enc_{x}_b") for x in "uv")
    params = Params(branch, trunk, encoders, jnp.asarray(g["b"]), _plain())
    f = deeponet.at_queries(params, cfg, jnp.asarray(g["u"]), "aligned")
    y = jnp.asarray(g["y"])
    slopes = [deeponet.partial(f, i) for i in range(y.shape[1])]
    s, first, second = jax.jit(
        lambda y: (f(y), [slope(y) for slope in slopes], deeponet.partial(slopes[0], 0)(y))
    )(y)
    _close(s, g["s"])
    _close(jnp.stack(first, axis=1), g["ds_dy"], 1e-4)
    _close(second, g["d2s_dy0"], 1e-3)


def test_gaussian_fields() -> None:
    g = deeponet_golden("grf")
    # Stored in float32; the arrays were made with the decimal number.
    scale, jitter = round(float(g["length_scale"]), 6), float(g["jitter"])
    for kernel, matrix, values in (("rbf", "K", "u"), ("matern12", "K_matern12", "u_matern12")):
        found = spaces.covariance(kernel, g["grid"], g["grid"], scale)
        np.testing.assert_allclose(found, g[matrix], atol=1e-7, rtol=0)
        u = (spaces.cholesky_factor(kernel, g["grid"], scale, jitter) @ g["z"]).T
        np.testing.assert_allclose(u, g[values], atol=1e-5, rtol=0)
    for kind in ("cubic", "linear"):
        found = interpolation.interpolate(g["grid"], g["u"], g["sensors"], kind)
        np.testing.assert_allclose(found, g[f"u_sensors_{kind}"], atol=1e-6, rtol=0)


def test_karhunen_loeve() -> None:
    g = deeponet_golden("grf")
    scale, count = round(float(g["length_scale"]), 6), len(g["kl_eigval"])
    values, functions = spaces.kl_eigenpairs("rbf", g["grid"], scale, count)
    np.testing.assert_allclose(values, g["kl_eigval"], atol=1e-8 * g["kl_eigval"][0], rtol=0)
    signs = np.sign(np.sum(functions * g["kl_eigfun"], axis=0, keepdims=True))
    np.testing.assert_allclose(functions * signs, g["kl_eigfun"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("equation", "names"),
    [
        (ode.Antiderivative(), ("antiderivative",)),
        (ode.Nonlinear(), ("nonlinear",)),
        (ode.Pendulum(k=1.0), ("pendulum_angle", "pendulum_velocity")),
    ],
)
def test_ordinary_equations(equation: ode.Equation, names: tuple[str, ...]) -> None:
    g = deeponet_golden("ode_solutions")
    phase = g["phase"][:, None]

    def u(rows: np.ndarray, t: np.ndarray) -> np.ndarray:
        waves = np.sin(g["omega"] * t[:, None] + phase[rows])
        return np.einsum("nk,nqk->nq", g["amp"][rows], waves)

    t = g["t"]
    np.testing.assert_allclose(u(np.arange(len(g["amp"])), t), g["u"], atol=1e-12)
    assert np.allclose(np.diff(t), t[1] - t[0]) and t[0] == 0
    points = 20 * (len(t) - 1) + 1
    out = ode.solve(equation, u, len(g["amp"]), length=float(t[-1]), points=points, doublings=7)
    assert out.resolved.all()
    for i, name in enumerate(names):
        error = np.abs(out.s[:, ::20, i] - g[name]) / (1.0 + np.abs(g[name]))
        assert error.max() < 1e-6, name


def test_diffusion_reaction() -> None:
    g = deeponet_golden("pde_solutions")
    nt = g["diffusion_reaction"].shape[2]
    s = reaction.solve_diffusion_reaction(g["u"], float(g["D"]), float(g["k"]), nt)
    np.testing.assert_allclose(s, g["diffusion_reaction"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(s, g["diffusion_reaction_mol"], atol=5e-4, rtol=0)


def test_transport() -> None:
    g = deeponet_golden("pde_solutions")
    s = transport.advect("I", g["u"], g["u_periodic"], g["advection"].shape[2])
    np.testing.assert_allclose(s, g["advection"], atol=1e-5, rtol=0)
    nt = g["advection_diffusion"].shape[2]
    s = transport.solve_advection_diffusion(g["u_periodic"], nt=nt)
    np.testing.assert_allclose(s, g["advection_diffusion"], atol=1e-5, rtol=0)


def test_stochastic() -> None:
    g = deeponet_golden("pde_solutions")
    for found, name in (
        (stochastic.sode_mean(g["sode_l"], g["sode_t"]), "sode_mean"),
        (stochastic.sode_second_moment(g["sode_l"], g["sode_t"]), "sode_second_moment"),
        (stochastic.sode_path(g["path_rv"] @ g["path_bases"]), "sode_path"),
        (stochastic.spde_path(g["path_rv"] @ g["path_bases"]), "spde_path"),
    ):
        np.testing.assert_allclose(found, g[name], atol=1e-6, rtol=1e-6)
