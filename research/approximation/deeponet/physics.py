"""Physics-informed training: no solutions, only the equation and its known values.

Source: Wang, Wang, Perdikaris, arXiv 2103.10974. The loss is the mean squared residual at random
queries of each function plus the mean squared error where the solution is known beforehand: at the
start, and on the boundary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models import deeponet
from research.approximation.deeponet.data import OperatorData, choose, draw_rows
from research.approximation.deeponet.objective import (
    RESIDUALS,
    Batch,
    physics_residual,
    squared_error,
)
from research.approximation.deeponet.problems import (
    DiffusionReaction,
    OdeProblem,
    make_problem,
    make_space,
)
from research.approximation.deeponet.task import DeepONetTask
from train.task import Context


def collocation(
    problem: OdeProblem | DiffusionReaction, rng: np.random.Generator, n: int, points: int
) -> dict[str, np.ndarray]:
    """Functions with queries for the residual, and queries where the solution is known to be 0.

    Returns ``u`` (n, m), ``y`` (n, points, d), ``u_at_y`` (n, points) and ``known`` (n, k, d), with
    k = 1 for an ordinary equation (its start) and ``points`` for diffusion-reaction (a third each
    on its start and both ends).

    Raises:
        ValueError: an equation without a residual here.
    """
    if isinstance(problem, OdeProblem):
        if problem.equation != "antiderivative":
            raise ValueError(f"no residual of {problem.equation}: give antiderivative.")
        space = make_space(problem.space, problem.length)
        y = rng.uniform(0.0, problem.length, (n, points, 1))
        known, sensors = np.zeros((n, 1, 1)), problem.sensor_grid
    else:
        space = make_space(problem.space)
        y, known = rng.uniform(size=(2, n, points, 2))
        third = np.arange(points) % 3
        known[:, third == 0, 1] = 0.0
        known[:, third == 1, 0] = 0.0
        known[:, third == 2, 0] = 1.0
        sensors = np.linspace(0.0, 1.0, problem.sensors)
    features = space.sample(rng, n)
    arrays = {
        "u": space.evaluate(features, sensors),
        "y": y,
        "u_at_y": space.evaluate(features, y[..., 0]),
        "known": known,
    }
    return {name: value.astype(np.float32) for name, value in arrays.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhysicsTask(DeepONetTask):
    """A DeepONet trained on the residual of its equation.

    ``problem`` is the antiderivative or diffusion-reaction; ``queries`` counts residual points of
    each function. Test data are solved as for other tasks.
    """

    residual: str = "antiderivative"
    known_weight: float = 1.0

    def __post_init__(self):
        problem = make_problem(self.problem)
        fits = {"antiderivative": OdeProblem, "diffusion_reaction": DiffusionReaction}
        if self.residual not in RESIDUALS or not isinstance(problem, fits[self.residual]):
            raise ValueError(
                f"residual {self.residual!r} does not fit problem {self.problem.get('name')!r}: "
                f"known are {', '.join(RESIDUALS)}, each for its own."
            )
        if self.normalise or self.queries < 1:
            raise ValueError(
                "physics-informed training has residual points and no solutions: give queries=1 "
                "or more, and normalise=False."
            )

    @functools.cached_property
    def sets(self) -> tuple[OperatorData, OperatorData]:
        """The test data, twice: nothing else is solved."""
        test = self._draw(1, self.test_functions, self.test_queries)
        return test, test

    def fixed(self) -> None:
        """Nothing comes from data."""
        return None

    def resident(self, context: Context) -> Batch:
        """Functions with their collocation points."""
        rng = np.random.default_rng([self.data_seed, 0])
        problem: Any = make_problem(self.problem)
        arrays = collocation(problem, rng, self.functions, self.queries)
        rows = context.batch_sharding(self.functions)
        return {name: jax.device_put(value, rows) for name, value in arrays.items()}

    def generate(self, key: jax.Array, rows: int, resident: Batch) -> Batch:
        """Random functions, or all."""
        chosen = draw_rows(key, resident["u"].shape[0], rows)
        return {name: choose(value, chosen) for name, value in resident.items()}

    def loss(
        self, params: deeponet.Params, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared residual, plus ``known_weight`` times the error where s = 0 is known."""
        left = physics_residual(
            params, self.model, self.residual, batch["u"], batch["y"], batch["u_at_y"]
        )
        residual = jnp.mean(jnp.square(left))
        at_known = deeponet.batched(params, self.model, batch["u"], batch["known"])
        known, _ = squared_error(at_known, {"s": jnp.zeros_like(at_known)}, self.scale(params))
        return residual + self.known_weight * known, {"residual": residual, "known": known}
