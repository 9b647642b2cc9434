"""Diffusion-reaction ``s_t = D s_xx + k s^2 + u(x)`` on [0, 1] from zero, zero at both ends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@partial(jax.jit, static_argnums=3)
def _march(u: Array, diffusivity: Array, rate: Array, nt: int) -> Array:
    n, m = u.shape
    h, dt = 1.0 / (m - 1), 1.0 / (nt - 1)
    mass = 8.0 * h**2 / dt
    off = jnp.full((n, m - 2), -4.0 * diffusivity, u.dtype)
    lower, upper = off.at[:, 0].set(0.0), off.at[:, -1].set(0.0)
    source = u[:, 1:-1]

    def stiffness(s: Array) -> Array:
        padded = jnp.pad(s, ((0, 0), (1, 1)))
        return 4.0 * diffusivity * (2.0 * s - padded[:, :-2] - padded[:, 2:])

    def step(s: Array, _: None) -> tuple[Array, Array]:
        jacobian = 4.0 * h**2 * (2.0 * rate * s)
        right = mass * s - stiffness(s) - jacobian * s + 8.0 * h**2 * (source + rate * s**2)
        diagonal = mass + 8.0 * diffusivity - jacobian
        s = jax.lax.linalg.tridiagonal_solve(lower, diagonal, upper, right[..., None])[..., 0]
        return s, s

    first = jnp.zeros_like(source)
    _, later = jax.lax.scan(step, first, None, length=nt - 1)
    inner = jnp.concatenate([first[None], later])
    return jnp.pad(jnp.transpose(inner, (1, 2, 0)), ((0, 0), (1, 1), (0, 0)))


def solve_diffusion_reaction(
    u: Float[np.ndarray, "n m"], diffusivity: float = 0.01, rate: float = 0.01, nt: int = 100
) -> Float[np.ndarray, "n m nt"]:
    """Solutions on x, t = linspace(0, 1) for sources given on the grid of x; float64.

    The scheme of the authors' solver: Crank-Nicolson for diffusion, the reaction linearised once
    per step, the source averaged over the step (here it does not depend on time). Second order.
    """
    with jax.enable_x64(True):
        numbers = (jnp.asarray(x, jnp.float64) for x in (u, diffusivity, rate))
        return np.asarray(_march(*numbers, nt))
