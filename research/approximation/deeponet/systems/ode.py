"""Ordinary differential equations ``s' = f(s, u(t))`` driven by an input function.

Labels are solved to a relative tolerance of 1e-9 by Runge-Kutta steps of fixed size, for all
functions at once, in float64; functions that need it are solved again with half the step. (The
authors' solver at its default tolerance leaves errors of 1e-5 to 1e-3 in the labels.)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Input = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``u(rows, t)``: values of the functions ``rows`` at times ``t``."""


@runtime_checkable
class Equation(Protocol):
    """A right-hand side; implementations are frozen dataclasses."""

    @property
    def size(self) -> int:
        """Components of the state; the first is the output."""
        ...

    def slope(self, state: Float[Array, "size n"], u: Float[Array, " n"]) -> Float[Array, "size n"]:
        """``f(s, u)``."""
        ...


@dataclasses.dataclass(frozen=True)
class Antiderivative:
    """``s' = u``."""

    size = 1

    def slope(self, state: Float[Array, "size n"], u: Float[Array, " n"]) -> Float[Array, "size n"]:
        """See :class:`Equation`."""
        return u[None]


@dataclasses.dataclass(frozen=True)
class Nonlinear:
    """``s' = -s^2 + u``; where u stays low enough, s runs off to minus infinity in finite time."""

    size = 1

    def slope(self, state: Float[Array, "size n"], u: Float[Array, " n"]) -> Float[Array, "size n"]:
        """See :class:`Equation`."""
        return u[None] - state**2


@dataclasses.dataclass(frozen=True)
class Pendulum:
    """``s1' = s2, s2' = -k sin(s1) + u``: angle and angular velocity."""

    k: float = 1.0

    size = 2

    def slope(self, state: Float[Array, "size n"], u: Float[Array, " n"]) -> Float[Array, "size n"]:
        """See :class:`Equation`."""
        return jnp.stack([state[1], u - self.k * jnp.sin(state[0])])


@dataclasses.dataclass(frozen=True)
class Solution:
    """Solutions on a shared time grid.

    Attributes:
        t: the grid, from 0.
        s: the whole state.
        slope: its derivative.
        resolved: whether halving the step changed the solution by less than the tolerance.
    """

    t: Float[np.ndarray, " k"]
    s: Float[np.ndarray, "n k size"]
    slope: Float[np.ndarray, "n k size"]
    resolved: Bool[np.ndarray, " n"]


@partial(jax.jit, static_argnums=(0, 2))
def runge_kutta(
    equation: Equation,
    u: Float[Array, "n twice"],
    every: int,
    h: Float[Array, ""],
    start: Float[Array, "size n"],
) -> Float[Array, "kept size n"]:
    """The classical method of fourth order.

    Args:
        equation: the right-hand side.
        u: inputs at the steps and half-way between them, ``2 * steps + 1`` values.
        every: keep the start and every so many steps.
        h: the step.
        start: the initial state.
    """
    f = equation.slope

    def step(s: Array, inputs: Array) -> tuple[Array, None]:
        left, middle, right = inputs
        k1 = f(s, left)
        k2 = f(s + 0.5 * h * k1, middle)
        k3 = f(s + 0.5 * h * k2, middle)
        k4 = f(s + h * k3, right)
        return s + (h / 6.0) * (k1 + 2.0 * (k2 + k3) + k4), None

    def several(s: Array, inputs: Array) -> tuple[Array, Array]:
        s, _ = jax.lax.scan(step, s, inputs)
        return s, s

    columns = u.T
    triples = jnp.stack([columns[:-1:2], columns[1::2], columns[2::2]], axis=1)
    _, kept = jax.lax.scan(several, start, triples.reshape(-1, every, *triples.shape[1:]))
    return jnp.concatenate([start[None], kept])


def solve(
    equation: Equation,
    u: Input,
    n: int,
    length: float = 1.0,
    points: int = 1001,
    tolerance: float = 1e-9,
    start: Float[np.ndarray, " size"] | None = None,
    doublings: int = 4,
) -> Solution:
    """Solve for ``n`` input functions on ``points`` equispaced times in [0, ``length``].

    Steps are halved, from one per interval, until the solution changes by less than ``tolerance *
    (1 + |s|)``, at most ``doublings`` times; each function by itself. ``start`` is zero by default.
    """
    t = np.linspace(0.0, length, points)
    start = np.zeros(equation.size) if start is None else np.asarray(start, np.float64)

    def run(rows: np.ndarray, doubling: int) -> np.ndarray:
        steps = (points - 1) * 2**doubling
        values = u(rows, np.linspace(0.0, length, 2 * steps + 1))
        initial = np.broadcast_to(start[:, None], (equation.size, len(rows)))
        with jax.enable_x64(True):
            out = runge_kutta(
                equation, jnp.asarray(values), 2**doubling, jnp.asarray(length / steps),
                jnp.asarray(initial),
            )  # fmt: skip
            return np.transpose(np.asarray(out), (2, 0, 1))

    rows = np.arange(n)
    s = run(rows, 0).copy()
    resolved = np.zeros(n, bool)
    for doubling in range(1, doublings + 1):
        finer = run(rows, doubling)
        with np.errstate(invalid="ignore", over="ignore"):
            # A method of fourth order: the finer solution is off by a fifteenth of the change.
            change = np.abs(finer - s[rows]) / 15.0
            good = np.all(change <= tolerance * (1.0 + np.abs(finer)), axis=(1, 2))
        s[rows] = finer
        resolved[rows] = good
        rows = rows[~good]
        if not len(rows):
            break
    inputs = u(np.arange(n), t)
    with jax.enable_x64(True):
        state = jnp.asarray(np.moveaxis(s, 2, 0).reshape(equation.size, -1))
        slope = np.asarray(equation.slope(state, jnp.asarray(inputs.reshape(-1))))
    slope = np.moveaxis(slope.reshape(equation.size, n, points), 0, 2)
    return Solution(t, s, slope, resolved)
