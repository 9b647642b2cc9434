"""Solvers against closed forms, conserved quantities and their orders of convergence."""

from collections.abc import Callable

import numpy as np
import pytest

from research.approximation.deeponet.spaces import GaussianField
from research.approximation.deeponet.systems import integral, ode, stochastic, transport
from research.approximation.deeponet.systems.reaction import solve_diffusion_reaction


def given(*functions: Callable[[np.ndarray], np.ndarray]) -> ode.Input:
    return lambda rows, t: np.stack([np.broadcast_to(functions[i](t), t.shape) for i in rows])


def test_antiderivative_of_cos_is_sin() -> None:
    out = ode.solve(ode.Antiderivative(), given(np.cos, lambda t: t), 2, length=3.0, points=31)
    np.testing.assert_allclose(out.s[0, :, 0], np.sin(out.t), atol=1e-9)
    np.testing.assert_allclose(out.s[1, :, 0], out.t**2 / 2, atol=1e-12)
    np.testing.assert_allclose(out.slope[0, :, 0], np.cos(out.t), atol=1e-12)


def test_nonlinear_equation_and_its_blow_up() -> None:
    """s' = -s^2 + a^2 is a tanh(a t); with u = -9 the solution ends at t = pi / 6."""
    inputs = given(lambda t: 4.0, lambda t: -9.0)
    out = ode.solve(ode.Nonlinear(), inputs, 2, points=101)
    np.testing.assert_allclose(out.s[0, :, 0], 2 * np.tanh(2 * out.t), atol=1e-9)
    assert out.resolved.tolist() == [True, False]


def test_pendulum_keeps_its_energy() -> None:
    start = np.array([1.0, 0.5])
    out = ode.solve(ode.Pendulum(k=2.0), given(lambda t: 0.0), 1, 5.0, 201, start=start)
    angle, velocity = out.s[0].T
    energy = velocity**2 / 2 - 2.0 * np.cos(angle)
    np.testing.assert_allclose(energy, energy[0], atol=1e-8)
    assert np.ptp(angle) > 1.5 and out.resolved.all()


def source(n: int) -> np.ndarray:
    """Flat enough at both ends to agree with the boundary from the start."""
    x = np.linspace(0.0, 1.0, n)
    return (np.sin(np.pi * x) ** 3 * np.exp(x))[None]


def orders(solve: Callable[[int], np.ndarray], exact: Callable[[int], np.ndarray]) -> np.ndarray:
    """log2 of how the largest error falls each time that the grid is refined twofold."""
    errors = [np.abs(solve(n) - exact(n)).max() for n in (26, 51, 101)]
    return np.log2(np.array(errors[:-1]) / errors[1:])


def test_diffusion_reaction_is_of_second_order() -> None:
    finest = solve_diffusion_reaction(source(401), 0.05, 0.5, 401)[0]

    def exact(n: int) -> np.ndarray:
        step = 400 // (n - 1)
        return finest[::step, ::step]

    rates = orders(lambda n: solve_diffusion_reaction(source(n), 0.05, 0.5, n)[0], exact)
    assert np.all((rates > 1.8) & (rates < 2.3)), rates


def test_diffusion_reaction_without_reaction_is_the_heat_equation() -> None:
    """u = sin(pi x): s = (1 - exp(-pi^2 D t)) / (pi^2 D) sin(pi x)."""
    x, t = np.linspace(0, 1, 101), np.linspace(0, 1, 101)
    s = solve_diffusion_reaction(np.sin(np.pi * x)[None], 0.1, 0.0, 101)[0]
    rate = np.pi**2 * 0.1
    exact = np.sin(np.pi * x)[:, None] * (-np.expm1(-rate * t) / rate)[None]
    np.testing.assert_allclose(s, exact, atol=1e-4)
    np.testing.assert_array_equal(s[[0, -1]], 0)


def test_advection_diffusion_of_a_wave() -> None:
    """sin(2 pi x) decays as exp(-4 pi^2 D t) and is carried along; error O(h^2)."""

    def solve(n: int) -> np.ndarray:
        x = np.linspace(0.0, 1.0, n)
        return transport.solve_advection_diffusion(np.sin(2 * np.pi * x)[None], 0.1, n)[0]

    def exact(n: int) -> np.ndarray:
        x, t = np.linspace(0.0, 1.0, n)[:, None], np.linspace(0.0, 1.0, n)[None]
        return np.exp(-4 * np.pi**2 * 0.1 * t) * np.sin(2 * np.pi * (x - t))

    assert np.abs(solve(101) - exact(101)).max() < 2e-3
    rates = orders(solve, exact)
    assert np.all((rates > 1.9) & (rates < 2.1)), rates


def test_circulant_powers_are_the_marched_scheme() -> None:
    """The Fourier form against one dense Crank-Nicolson step after the other."""
    rng = np.random.default_rng(0)
    initial = rng.normal(size=(1, 12))
    initial[:, -1] = initial[:, 0]
    k, h, dt = 11, 1 / 11, 1 / (3 * 4)
    shift = np.roll(np.eye(k), 1, axis=1)
    operator = -(shift - shift.T) / (2 * h) + 0.1 * (shift + shift.T - 2 * np.eye(k)) / h**2
    left, right = (np.eye(k) + sign * dt / 2 * operator for sign in (-1, 1))
    s = initial[0, :-1]
    found = transport.solve_advection_diffusion(initial, 0.1, nt=5, substeps=3)[0]
    for i in range(5):
        np.testing.assert_allclose(found[:-1, i], s, atol=1e-12)
        for _ in range(3):
            s = np.linalg.solve(left, right @ s)
    np.testing.assert_array_equal(found[0], found[-1])


def test_box_scheme_with_inflow_is_of_second_order() -> None:
    """A constant speed of 0.8 carries s(0, t) = sin(t) inwards: s = sin(t - x / 0.8)."""

    def solve(n: int) -> np.ndarray:
        x = np.linspace(0, 1, n)
        inflow = np.sin(np.linspace(0, 1, n))
        return transport.wendroff(-np.sin(x / 0.8)[None], np.full((1, n), 0.8), n, inflow)[0]

    def exact(n: int) -> np.ndarray:
        x, t = np.linspace(0.0, 1.0, n)[:, None], np.linspace(0.0, 1.0, n)[None]
        return np.sin(t - x / 0.8)

    rates = orders(solve, exact)
    assert np.all((rates > 1.9) & (rates < 2.1)), rates


def test_periodic_box_scheme_is_of_second_order_and_closes() -> None:
    def solve(n: int) -> np.ndarray:
        x = np.linspace(0, 1, n)
        return transport.wendroff(np.sin(2 * np.pi * x)[None], np.full((1, n), 0.8), n, None)[0]

    def exact(n: int) -> np.ndarray:
        x, t = np.linspace(0.0, 1.0, n)[:, None], np.linspace(0.0, 1.0, n)[None]
        return np.sin(2 * np.pi * (x - 0.8 * t))

    rates = orders(solve, exact)
    assert np.all((rates > 1.8) & (rates < 2.2)), rates
    found = solve(51)
    np.testing.assert_array_equal(found[0], found[-1])
    # The scheme's own equations hold around the circle.
    r = 0.8
    c = (1 - r) / (1 + r)
    s = found[:-1]
    ahead = np.roll(s, -1, axis=0)
    np.testing.assert_allclose(ahead[:, 1:], s[:, :-1] + c * (ahead[:, :-1] - s[:, 1:]), atol=1e-12)


def test_the_four_advection_cases_begin_as_they_should() -> None:
    x = np.linspace(0, 1, 41)
    v = GaussianField(points=100).evaluate(
        GaussianField(points=100).sample(np.random.default_rng(0), 2), x
    )
    periodic = np.stack([np.cos(2 * np.pi * x), np.sin(4 * np.pi * x)])
    starts = {"I": periodic, "II": x * v, "III": [x**2] * 2, "IV": [np.sin(2 * np.pi * x)] * 2}
    for case, start in starts.items():
        s = transport.advect(case, v, periodic, nt=81)
        assert s.shape == (2, 41, 81)
        np.testing.assert_allclose(s[:, :, 0], start, atol=1e-12)
    s = transport.advect("I", v, periodic, nt=81)
    np.testing.assert_allclose(s[0, :, 40], np.cos(2 * np.pi * (x - 0.5)), atol=1e-4)
    s = transport.advect("III", v, periodic, nt=81)
    np.testing.assert_allclose(s[:, 0], np.sin(np.pi * np.linspace(0, 1, 81))[None] * [[1], [1]])
    with pytest.raises(ValueError, match="choose I, II, III or IV"):
        transport.advect("V", v, periodic)
    with pytest.raises(ValueError, match="all speeds must be positive"):
        transport.wendroff(v, v, 81, None)


def test_legendre_transform_of_polynomials() -> None:
    """P_2 has the coefficient 2 / 5 and no other."""
    space = GaussianField(length=2.0, points=200)
    x = space.grid - 1.0
    found = integral.legendre_transform(space, (1.5 * x**2 - 0.5)[None], orders=6)[0]
    np.testing.assert_allclose(found, [0, 0, 0.4, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_caputo_of_powers(alpha: float) -> None:
    """The derivative of x^2 is 2 / Gamma(3 - alpha) x^(2 - alpha), that of a constant 0."""
    from scipy.special import gamma

    grid, y = np.linspace(0, 1, 50), np.linspace(0, 1, 9)
    found = integral.caputo(grid, np.stack([grid**2, np.ones(50)]), y, alpha)
    exact = 2 / gamma(3 - alpha) * y ** (2 - alpha)
    np.testing.assert_allclose(found, np.stack([exact, 0 * y]), atol=1e-10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        integral.caputo(grid, grid[None], y, 1.0)


def test_stochastic_statistics_are_those_of_paths() -> None:
    """Of 4,000 paths of the truncated field; its neglected modes carry two percent."""
    scales, t = np.array([1.0, 1.7]), np.linspace(0, 1, 60)
    bases = stochastic.kl_basis("matern12", scales, 30, 60)
    rng = np.random.default_rng(0)
    for basis, mean, square in zip(
        bases, stochastic.sode_mean(scales, t), stochastic.sode_second_moment(scales, t),
        strict=True,
    ):  # fmt: skip
        paths = stochastic.sode_path(rng.standard_normal((4000, 30)) @ basis)
        np.testing.assert_allclose(paths.mean(0), mean, rtol=0.08)
        np.testing.assert_allclose((paths**2).mean(0), square, rtol=0.4)


def test_elliptic_path_solves_its_equation() -> None:
    """With b = 0: s = 5 x (1 - x); in general the flux e^b s' falls by the force."""
    x = np.linspace(0, 1, 201)
    np.testing.assert_allclose(stochastic.spde_path(0 * x), 5 * x * (1 - x), atol=1e-12)
    b = np.sin(3 * x)
    s = stochastic.spde_path(b, force=7.0)
    middle = 0.5 * (b[1:] + b[:-1])
    flux = np.exp(middle) * np.diff(s) / (x[1] - x[0])
    np.testing.assert_allclose(np.diff(flux) / (x[1] - x[0]), -7.0, atol=2e-2)
    assert s[0] == 0 and abs(s[-1]) < 1e-12


def test_sensor_values_list_one_eigenfunction_after_the_other() -> None:
    bases = np.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    found = stochastic.sensor_values(bases, 3)
    np.testing.assert_allclose(found[1], bases[1][:, ::2].reshape(-1))
