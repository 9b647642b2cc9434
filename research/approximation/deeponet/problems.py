"""The operators of the paper as sources of data: named, seeded, and of any size.

A problem draws input functions, solves them, and returns data either on its grid
(:meth:`Problem.cartesian`) or at random queries of each function (:meth:`Problem.batched`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from research.approximation.deeponet import data
from research.approximation.deeponet.data import Batched, Cartesian
from research.approximation.deeponet.interpolation import hermite
from research.approximation.deeponet.spaces import (
    SPACES,
    FunctionSpace,
    GaussianField,
    cholesky_factor,
)
from research.approximation.deeponet.systems import (
    integral,
    ode,
    reaction,
    stochastic,
    transport,
)
from train.config import build

CHUNK = 2000
"""Functions made at a time: their values on fine grids need memory."""


def make_space(values: Mapping[str, Any], length: float = 1.0) -> FunctionSpace:
    """A space from ``{"name": ..., field: ...}``; a Gaussian field is drawn on [0, ``length``].

    Raises:
        ValueError: an unknown space or field, or another space for an interval that is not [0, 1].
    """
    fields = dict(values)
    name = fields.pop("name", "gaussian")
    if name not in SPACES:
        raise ValueError(f"unknown space {name!r}: choose one of {', '.join(SPACES)}.")
    if name == "gaussian":
        return build(GaussianField, {"length": length, **fields}, "space")
    if length != 1.0:
        raise ValueError(f"space {name} lives on [0, 1]: give length 1 or space gaussian.")
    return build(SPACES[name], fields, "space")


def grid_points(*axes: Float[np.ndarray, " _"]) -> Float[np.ndarray, "q d"]:
    """All points of a tensor grid as rows, the last coordinate fastest."""
    return np.stack([x.reshape(-1) for x in np.meshgrid(*axes, indexing="ij")], axis=-1)


@runtime_checkable
class Problem(Protocol):
    """A source of operator data. Implementations are frozen dataclasses."""

    def cartesian(self, rng: np.random.Generator, n: int) -> Cartesian:
        """``n`` new functions, solved on the problem's grid."""
        ...

    def batched(self, rng: np.random.Generator, n: int, queries: int) -> Batched:
        """``n`` new functions with random queries of their own."""
        ...


class GridProblem:
    """A problem whose queries are points of its grid."""

    def cartesian(self, rng: np.random.Generator, n: int) -> Cartesian:
        """See :class:`Problem`."""
        parts = [self._solve(rng, min(CHUNK, n - i)) for i in range(0, n, CHUNK)]
        return data.concatenate(parts)

    def batched(self, rng: np.random.Generator, n: int, queries: int) -> Batched:
        """See :class:`Problem`."""
        parts = [self._solve(rng, min(CHUNK, n - i)).pick(rng, queries) for i in range(0, n, CHUNK)]
        return data.concatenate(parts)

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        raise TypeError(f"{type(self).__name__} must define _solve().")


EQUATIONS = {
    "antiderivative": ode.Antiderivative,
    "nonlinear": ode.Nonlinear,
    "pendulum": ode.Pendulum,
}

NAMED_INPUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x": lambda x: x,
    "sin(pi x)": lambda x: np.sin(np.pi * x),
    "sin(2 pi x)": lambda x: np.sin(2 * np.pi * x),
    "x sin(2 pi x)": lambda x: x * np.sin(2 * np.pi * x),
}


@dataclasses.dataclass(frozen=True)
class OdeProblem:
    """``s' = f(s, u)``: from u at equispaced sensors of [0, length] to s at times y.

    Functions whose solution is not resolved to 1e-9, or exceeds ``largest``, are drawn again: for
    some inputs the nonlinear equation has no solution up to ``length``.
    """

    equation: str = "antiderivative"
    length: float = 1.0
    sensors: int = 100
    k: float = 1.0  # of the pendulum
    largest: float = 10.0
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.equation not in EQUATIONS:
            raise ValueError(
                f"unknown equation {self.equation!r}: choose one of {', '.join(EQUATIONS)}."
            )

    @property
    def sensor_grid(self) -> Float[np.ndarray, " m"]:
        """Where u is known."""
        return np.linspace(0.0, self.length, self.sensors)

    def cartesian(self, rng: np.random.Generator, n: int) -> Cartesian:
        """See :class:`Problem`; the grid is that of the sensors."""
        t = self.sensor_grid
        parts = [self._at(rng, min(CHUNK, n - i), t) for i in range(0, n, CHUNK)]
        u, s = (np.concatenate(x) for x in zip(*parts, strict=True))
        return Cartesian(u, t[:, None], s)

    def batched(self, rng: np.random.Generator, n: int, queries: int) -> Batched:
        """See :class:`Problem`; times are uniform in [0, length]."""
        y = rng.uniform(0.0, self.length, (n, queries))
        parts = [self._at(rng, len(y[i : i + CHUNK]), y[i : i + CHUNK]) for i in range(0, n, CHUNK)]
        u, s = (np.concatenate(x) for x in zip(*parts, strict=True))
        return Batched(u, y[..., None], s, np.ones(s.shape, bool))

    def named(self) -> Cartesian:
        """The four inputs of :data:`NAMED_INPUTS` on [0, length], on the sensors' grid."""
        functions = list(NAMED_INPUTS.values())
        u = lambda rows, t: np.stack([functions[i](t) for i in rows])
        solution = self._equation_solution(u, len(functions))
        t = self.sensor_grid
        at = np.broadcast_to(t, (len(functions), len(t)))
        s = hermite(solution.t, solution.s[..., 0], solution.slope[..., 0], at)
        return Cartesian(u(range(len(functions)), t), t[:, None], s)

    def _equation_solution(self, u: ode.Input, n: int) -> ode.Solution:
        cls = EQUATIONS[self.equation]
        equation = cls(self.k) if self.equation == "pendulum" else cls()
        points = 1 + int(np.ceil(1000 * self.length))
        return ode.solve(equation, u, n, self.length, points)

    def _at(self, rng: np.random.Generator, n: int, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sensor values and solutions at ``y``, redrawing what is not resolved."""
        space = make_space(self.space, self.length)
        y = np.broadcast_to(y, (n, y.shape[-1]))
        u, s = np.empty((n, self.sensors)), np.empty(y.shape)
        rows = np.arange(n)
        for _ in range(20):
            features = space.sample(rng, len(rows))
            solution = self._equation_solution(
                lambda i, t, f=features: space.evaluate(f[i], t), len(rows)
            )
            values = solution.s[..., 0]
            with np.errstate(invalid="ignore"):
                good = solution.resolved & np.all(np.abs(values) <= self.largest, axis=1)
            done = rows[good]
            u[done] = space.evaluate(features[good], self.sensor_grid)
            s[done] = hermite(solution.t, values[good], solution.slope[good, :, 0], y[done])
            rows = rows[~good]
            if not len(rows):
                return u, s
        raise ValueError(
            f"{len(rows)} of {n} functions found no solution within |s| <= {self.largest} up to "
            f"t = {self.length}: shorten the interval or raise `largest`."
        )


@dataclasses.dataclass(frozen=True)
class DiffusionReaction(GridProblem):
    """From the source u(x) to s(x, t)."""

    sensors: int = 100
    nt: int = 100
    diffusivity: float = 0.01
    rate: float = 0.01
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        x, t = np.linspace(0.0, 1.0, self.sensors), np.linspace(0.0, 1.0, self.nt)
        space = make_space(self.space)
        u = space.evaluate(space.sample(rng, n), x)
        s = reaction.solve_diffusion_reaction(u, self.diffusivity, self.rate, self.nt)
        return Cartesian(u, grid_points(x, t), s.reshape(n, -1))


@dataclasses.dataclass(frozen=True)
class Advection(GridProblem):
    """Cases I to IV of :func:`transport.advect`; the input is V, in case I V(sin^2(pi x))."""

    case: str = "I"
    sensors: int = 100
    nt: int = 100
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        x, t = np.linspace(0.0, 1.0, self.sensors), np.linspace(0.0, 1.0, self.nt)
        space = make_space(self.space)
        features = space.sample(rng, n)
        v, periodic = (space.evaluate(features, at) for at in (x, np.sin(np.pi * x) ** 2))
        s = transport.advect(self.case, v, periodic, self.nt)
        u = periodic if self.case == "I" else v
        return Cartesian(u, grid_points(x, t), s.reshape(n, -1))


@dataclasses.dataclass(frozen=True)
class AdvectionDiffusion(GridProblem):
    """From the initial value V(sin^2(pi x)) to s(x, t)."""

    sensors: int = 100
    nt: int = 100
    diffusivity: float = 0.1
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        x, t = np.linspace(0.0, 1.0, self.sensors), np.linspace(0.0, 1.0, self.nt)
        space = make_space(self.space)
        u = space.evaluate(space.sample(rng, n), np.sin(np.pi * x) ** 2)
        s = transport.solve_advection_diffusion(u, self.diffusivity, self.nt)
        return Cartesian(u, grid_points(x, t), s.reshape(n, -1))


@dataclasses.dataclass(frozen=True)
class Legendre(GridProblem):
    """From u on [-1, 1] to its Legendre coefficients; the query is their number, 0 to orders-1."""

    sensors: int = 100
    orders: int = 20
    length_scale: float = 0.2

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        space = GaussianField(length=2.0, length_scale=self.length_scale, points=2000)
        features = space.sample(rng, n)
        u = space.evaluate(features, np.linspace(0.0, 2.0, self.sensors))
        s = integral.legendre_transform(space, features, self.orders)
        return Cartesian(u, np.arange(float(self.orders))[:, None], s)


@dataclasses.dataclass(frozen=True)
class Caputo(GridProblem):
    """From u on [0, 1] to its fractional derivative; queries are (y, order)."""

    sensors: int = 100
    orders: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    points: int = 21
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        fine, y = np.linspace(0.0, 1.0, 1000), np.linspace(0.0, 1.0, self.points)
        space = make_space(self.space)
        features = space.sample(rng, n)
        u = space.evaluate(features, np.linspace(0.0, 1.0, self.sensors))
        values = space.evaluate(features, fine)
        s = np.stack([integral.caputo(fine, values, y, order) for order in self.orders], axis=2)
        return Cartesian(u, grid_points(y, np.array(self.orders)), s.reshape(n, -1))


@dataclasses.dataclass(frozen=True)
class _Stochastic(GridProblem):
    """An equation whose coefficient is a random field of a length scale in [low, high].

    The input is the field's law: its scaled eigenfunctions on the sensors. The output is the mean
    or the second moment over the grid (query: a point), or a path (query xi_1 .. xi_modes, point).
    """

    kernel: ClassVar[str]
    output: str = "mean"  # mean, second_moment or path
    sensors: int = 20
    modes: int = 5
    points: int = 100
    low: float = 1.0
    high: float = 2.0

    def __post_init__(self):
        if self.output not in ("mean", "second_moment", "path"):
            raise ValueError(f"unknown output {self.output!r}: choose mean, second_moment or path.")

    def batched(self, rng: np.random.Generator, n: int, queries: int) -> Batched:
        """See :class:`Problem`; paths draw their xi anew for every query."""
        if self.output != "path":
            return super().batched(rng, n, queries)
        _, bases = self._laws(rng, n)
        xi = rng.standard_normal((n, queries, self.modes))
        at = rng.integers(0, self.points, (n, queries))
        y = np.concatenate([xi, (at / (self.points - 1))[..., None]], axis=-1)
        s = self._along(bases, xi, at)
        return Batched(stochastic.sensor_values(bases, self.sensors), y, s, np.ones(s.shape, bool))

    def _laws(
        self, rng: np.random.Generator, n: int
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n modes points"]]:
        """Length scales of the fields and their scaled eigenfunctions."""
        scales = rng.uniform(self.low, self.high, n)
        return scales, stochastic.kl_basis(self.kernel, scales, self.modes, self.points)

    def _solve(self, rng: np.random.Generator, n: int) -> Cartesian:
        if self.output == "path":
            raise ValueError("paths have queries of their own: give queries per function.")
        scales, bases = self._laws(rng, n)
        at = np.linspace(0.0, 1.0, self.points)
        s = self._moments(rng, scales, at)
        return Cartesian(stochastic.sensor_values(bases, self.sensors), at[:, None], s)

    def _along(
        self,
        bases: Float[np.ndarray, "n modes points"],
        xi: Float[np.ndarray, "n q modes"],
        at: Int[np.ndarray, "n q"],
    ) -> Float[np.ndarray, "n q"]:
        """Values of the paths that ``xi`` gives at grid points ``at``."""
        raise TypeError(f"{type(self).__name__} must define _along().")

    def _moments(
        self, rng: np.random.Generator, scales: Float[np.ndarray, " n"], at: np.ndarray
    ) -> Float[np.ndarray, "n points"]:
        """The output's moment at the points ``at``."""
        raise TypeError(f"{type(self).__name__} must define _moments().")


@dataclasses.dataclass(frozen=True)
class StochasticOde(_Stochastic):
    """``dy = k(t; w) y dt``, k a field of covariance exp(-|r|/l) with l uniform in [low, high].

    Input and outputs as of :class:`_Stochastic`, whose points are times.
    """

    kernel = "matern12"

    def _along(self, bases: np.ndarray, xi: np.ndarray, at: np.ndarray) -> np.ndarray:
        # The integral of a path is the same mixture of the integrals of the eigenfunctions.
        integrals = stochastic.cumulative(bases)
        picked = np.take_along_axis(integrals, at[:, None], axis=2)
        return np.exp(np.einsum("nqk,nkq->nq", xi, picked))

    def _moments(self, rng: np.random.Generator, scales: np.ndarray, at: np.ndarray) -> np.ndarray:
        solve = stochastic.sode_mean if self.output == "mean" else stochastic.sode_second_moment
        return solve(scales, at)


@dataclasses.dataclass(frozen=True)
class StochasticElliptic(_Stochastic):
    """``-(e^b s')' = 10``, b = amplitude times a field of covariance rbf(l), l in [low, high].

    Input and outputs as of :class:`_Stochastic`; statistics are over ``samples`` paths.
    """

    kernel = "rbf"
    output: str = "path"
    sensors: int = 30
    modes: int = 8
    low: float = 0.2
    high: float = 2.0
    amplitude: float = 0.1
    samples: int = 20000

    def _along(self, bases: np.ndarray, xi: np.ndarray, at: np.ndarray) -> np.ndarray:
        s = np.empty(at.shape)
        for i, points in enumerate(at):
            paths = stochastic.spde_path(self.amplitude * xi[i] @ bases[i])
            s[i] = paths[np.arange(len(points)), points]
        return s

    def _moments(self, rng: np.random.Generator, scales: np.ndarray, at: np.ndarray) -> np.ndarray:
        power, s = 1 if self.output == "mean" else 2, np.empty((len(scales), self.points))
        for i, scale in enumerate(scales):
            # The whole field, not only the modes that the branch sees.
            factor = cholesky_factor("rbf", at, float(scale), jitter=1e-10)
            b = self.amplitude * rng.standard_normal((self.samples, self.points)) @ factor.T
            s[i] = np.mean(stochastic.spde_path(b) ** power, axis=0)
        return s


PROBLEMS = {
    "ode": OdeProblem,
    "diffusion_reaction": DiffusionReaction,
    "advection": Advection,
    "advection_diffusion": AdvectionDiffusion,
    "legendre": Legendre,
    "caputo": Caputo,
    "stochastic_ode": StochasticOde,
    "stochastic_elliptic": StochasticElliptic,
}
"""Problems by the name that configs use."""


def make_problem(values: Mapping[str, Any]) -> Problem:
    """A problem from ``{"name": ..., field: ...}``.

    Raises:
        ValueError: an unknown problem or field.
    """
    fields = dict(values)
    name = fields.pop("name", None)
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}: choose one of {', '.join(PROBLEMS)}.")
    return build(PROBLEMS[name], fields, "problem")
