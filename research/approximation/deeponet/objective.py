"""What is minimised and what is measured: squared errors, and residuals of equations."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models import deeponet, pod
from models.deeponet import DeepONetConfig, Params, partial

Batch = dict[str, Any]


def predict(params: Params, cfg: DeepONetConfig, form: str, batch: Batch) -> Array:
    """The network on a batch: ``u``, ``y``, and by form ``mask`` or ``rows`` of the POD basis."""
    if form == "batched":
        return deeponet.batched(params, cfg, batch["u"], batch["y"], batch["mask"])
    if cfg.kind == "pod":
        rows = batch.get("rows")
        params = params if rows is None else pod.at_rows(params, rows)
    run = deeponet.aligned if form == "aligned" else deeponet.cartesian
    return run(params, cfg, batch["u"], batch["y"])


def squared_error(
    predicted: Float[Array, "..."], batch: Batch, scale: Float[Array, " c"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(Mean squared error in units of the outputs' scale, number of values it is over)."""
    error = predicted - batch["s"]
    unit = scale[0] if scale.shape == (1,) else scale.reshape((1,) * (error.ndim - 1) + (-1,))
    square = jnp.square(error / unit)
    mask = batch.get("mask")
    if mask is None:
        return jnp.mean(square), jnp.asarray(float(square.size))
    mask = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (square.ndim - 2)), square.shape)
    count = jnp.sum(mask, dtype=square.dtype)
    return jnp.sum(jnp.where(mask, square, 0.0)) / jnp.maximum(count, 1.0), count


def error_metrics(predicted: np.ndarray, s: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean squared error, the same without the worst 0.1 percent, and the relative L2 error."""
    error = np.sort(np.square(predicted - s, dtype=np.float64)[mask].reshape(-1))
    kept = error[: len(error) - len(error) // 1000]
    size = np.mean(np.square(s, dtype=np.float64)[mask])
    return {
        "mse": float(np.mean(error)),
        "mse_without_outliers": float(np.mean(kept)),
        "relative_l2": float(np.sqrt(np.mean(error) / size)),
    }


Residual = Callable[[Callable[[Array], Array], Array, Array], Array]
"""``residual(G(u), y, u at y)``: what an equation leaves; G(u) is a function of the queries."""


def antiderivative(g: Callable[[Array], Array], y: Array, u: Array) -> Array:
    """``dG/dy - u(y)``."""
    return partial(g, 0)(y) - u


def diffusion_reaction(
    g: Callable[[Array], Array], y: Array, u: Array, diffusivity: float = 0.01, rate: float = 0.01
) -> Array:
    """``s_t - D s_xx - k s^2 - u(x)`` with queries (x, t)."""
    s_xx = partial(partial(g, 0), 0)(y)
    return partial(g, 1)(y) - diffusivity * s_xx - rate * g(y) ** 2 - u


RESIDUALS: dict[str, Residual] = {
    "antiderivative": antiderivative,
    "diffusion_reaction": diffusion_reaction,
}
"""Equations by the name that configs use."""


def physics_residual(
    params: Params, cfg: DeepONetConfig, name: str, u: Array, y: Array, u_at_y: Array
) -> Float[Array, "n q"]:
    """Residuals at queries y (n, q, d) of each function, whose input there is ``u_at_y`` (n, q).

    Derivatives go through the trunk net only.

    Raises:
        ValueError: an unknown equation, several outputs, or an activation whose second derivative
            is zero everywhere.
    """
    if name not in RESIDUALS:
        raise ValueError(f"unknown residual {name!r}: choose one of {', '.join(RESIDUALS)}.")
    if cfg.outputs != 1 or cfg.kind == "pod":
        raise ValueError("residuals need one output and a trunk net: give outputs=1, not pod.")
    if cfg.activation == "relu":
        raise ValueError("relu has no second derivative: give tanh, sin or gelu.")
    return RESIDUALS[name](deeponet.at_queries(params, cfg, u, "batched"), y, u_at_y)
