"""Advection ``s_t + a(x) s_x = 0`` in four cases, and advection-diffusion; x, t in [0, 1]."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.approximation.deeponet.interpolation import interpolate


def advect_exactly(initial: Float[np.ndarray, "n m"], nt: int) -> Float[np.ndarray, "n m nt"]:
    """Unit speed and periodic: the initial values shifted, ``s(x, t) = s0((x - t) mod 1)``.

    As in the authors' code, a cubic spline of the m given values (both ends included) is read.
    """
    m = initial.shape[1]
    x, t = np.linspace(0.0, 1.0, m), np.linspace(0.0, 1.0, nt)
    at = np.mod(x[:, None] - t[None], 1.0).reshape(-1)
    return interpolate(x, initial, at).reshape(len(initial), m, nt)


@partial(jax.jit, static_argnums=3)
def _sweep(initial: Array, inflow: Array, c: Array, periodic: bool) -> Array:
    """Wendroff's box scheme ``s[j+1, new] = s[j] + c[j] (s[j+1] - s[j, new])``; arrays (x, n)."""

    def along(first: Array, old: Array, following: Array) -> Array:
        def cell(left: Array, values: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            here, there, factor = values
            new = here + factor * (there - left)
            return new, new

        return jax.lax.scan(cell, first, (old, following, c))[1]

    def inflow_step(s: Array, first: Array) -> tuple[Array, Array]:
        new = jnp.concatenate([first[None], along(first, s[:-1], s[1:])])
        return new, new

    def periodic_step(s: Array, _: Array) -> tuple[Array, Array]:
        # Around the circle the value at x = 0 comes back as an affine function of itself.
        following = jnp.roll(s, -1, axis=0)
        offset = along(jnp.zeros_like(s[0]), s, following)[-1]
        first = offset / (1.0 - jnp.prod(-c, axis=0))
        new = along(first, s, following)
        new = jnp.concatenate([first[None], new[:-1]])
        return new, new

    step = periodic_step if periodic else inflow_step
    start = initial[:-1] if periodic else initial
    _, later = jax.lax.scan(step, start, inflow[1:])
    s = jnp.concatenate([start[None], later])  # (t, x, n)
    return jnp.concatenate([s, s[:, :1]], axis=1) if periodic else s


def wendroff(
    initial: Float[np.ndarray, "n m"],
    speed: Float[np.ndarray, "n m"],
    nt: int,
    inflow: Float[np.ndarray, " nt"] | None,
) -> Float[np.ndarray, "n m nt"]:
    """Wendroff's scheme of second order for speeds above 0 given on the grid of x; float64.

    ``inflow`` are the values at x = 0 over time; None closes the interval to a circle (x = 1 is
    x = 0), and each step solves its equations cyclically. Speeds are averaged to cell midpoints.

    Raises:
        ValueError: a speed that is not positive.
    """
    if not (speed > 0).all():
        raise ValueError("the box scheme sweeps along the flow: all speeds must be positive.")
    n, m = initial.shape
    r = 0.5 * (speed[:, 1:] + speed[:, :-1]) * (m - 1) / (nt - 1)
    given = np.zeros(nt) if inflow is None else inflow
    with jax.enable_x64(True):
        arrays = (initial.T, np.broadcast_to(given[:, None], (nt, n)), ((1 - r) / (1 + r)).T)
        s = _sweep(*(jnp.asarray(x, jnp.float64) for x in arrays), inflow is None)
        return np.transpose(np.asarray(s), (2, 1, 0))


def advect(
    case: str, v: Float[np.ndarray, "n m"], v_periodic: Float[np.ndarray, "n m"], nt: int = 100
) -> Float[np.ndarray, "n m nt"]:
    """The four cases of the paper's notes.

    - I: a = 1, periodic, s(x, 0) = V(sin^2(pi x)), given as ``v_periodic``; exact;
    - II: a = 1, nothing flows in, s(x, 0) = x V(x);
    - III: a = 1 + V(x) / 10, s(x, 0) = x^2, s(0, t) = sin(pi t);
    - IV: a = 1 + (V(x) + V(1 - x)) / 20, periodic, s(x, 0) = sin(2 pi x).

    Raises:
        ValueError: an unknown case.
    """
    x, t = np.linspace(0.0, 1.0, v.shape[1])[None], np.linspace(0.0, 1.0, nt)
    rows = lambda values: np.broadcast_to(values, v.shape)
    if case == "I":
        return advect_exactly(v_periodic, nt)
    if case == "II":
        return wendroff(x * v, np.ones_like(v), nt, np.zeros(nt))
    if case == "III":
        return wendroff(rows(x**2), 1.0 + 0.1 * v, nt, np.sin(np.pi * t))
    if case == "IV":
        speed = 1.0 + 0.05 * (v + v[:, ::-1])
        return wendroff(rows(np.sin(2 * np.pi * x)), speed, nt, None)
    raise ValueError(f"unknown advection case {case!r}: choose I, II, III or IV.")


def solve_advection_diffusion(
    initial: Float[np.ndarray, "n m"], diffusivity: float = 0.1, nt: int = 100, substeps: int = 10
) -> Float[np.ndarray, "n m nt"]:
    """``s_t + s_x - D s_xx = 0``, periodic: Crank-Nicolson with central differences; float64.

    On the m - 1 distinct points (x = 1 copies x = 0), with ``substeps`` steps per output step. The
    scheme's matrix is circulant, so a discrete Fourier transform applies all its steps at once.
    """
    distinct = initial.shape[1] - 1
    h, dt = 1.0 / distinct, 1.0 / (substeps * (nt - 1))
    angle = 2.0 * np.pi * np.fft.fftfreq(distinct)
    operator = -1j * np.sin(angle) / h + diffusivity * (2.0 * np.cos(angle) - 2.0) / h**2
    growth = (1.0 + 0.5 * dt * operator) / (1.0 - 0.5 * dt * operator)
    powers = growth[:, None] ** (substeps * np.arange(nt))[None]
    modes = np.fft.fft(np.asarray(initial[:, :-1], np.float64), axis=1)
    s = np.fft.ifft(modes[:, :, None] * powers[None], axis=1).real
    return np.concatenate([s, s[:, :1]], axis=1)
