"""Proper orthogonal decomposition: bases of functions from samples.

Of the solutions, for POD-DeepONet (Lu et al., arXiv 2111.05512), and of the input functions, for
networks of any form: smooth functions fill only a few dimensions of their sensor values. All of it
runs once, on the host, in float64.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.interpolate import RegularGridInterpolator

from models.deeponet import DeepONetConfig, Fixed, Params
from models.layers import Linear


def pod_basis(
    s: Float[np.ndarray, "n q"], modes: int
) -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, "q p"], Float[np.ndarray, " p"]]:
    """Mean over the ``n`` samples, orthonormal modes as columns, and what each mode carries.

    Energies are squared singular values divided by the sum of all: shares of the total variance.

    Raises:
        ValueError: more modes than samples or points, or samples that are not finite.
    """
    s = np.asarray(s, np.float64)
    if not 1 <= modes <= min(s.shape):
        raise ValueError(
            f"{s.shape[0]} functions on {s.shape[1]} points have at most {min(s.shape)} modes, "
            f"asked for {modes}."
        )
    if not np.isfinite(s).all():
        raise ValueError(
            "the solutions hold values that are not finite: leave those functions out."
        )
    mean = s.mean(0)
    _, singular, vt = np.linalg.svd(s - mean[None], full_matrices=False)
    total = max(float(np.sum(singular**2)), np.finfo(np.float64).tiny)
    return mean, vt[:modes].T, singular[:modes] ** 2 / total


def truncation_error(
    mean: Float[np.ndarray, " q"], basis: Float[np.ndarray, "q p"], s: Float[np.ndarray, "n q"]
) -> float:
    """Mean squared error of the best approximation of ``s`` in the basis: no network beats it."""
    centred = s - mean[None]
    return float(np.mean(np.square(centred - centred @ basis @ basis.T)))


def fixed_from_solutions(cfg: DeepONetConfig, s: Float[np.ndarray, "n q *c"]) -> Fixed:
    """Mean, scale and basis of training solutions.

    Columns of the basis are rescaled to a mean square of 1 over the points, and ``scale`` is the
    root mean square of the centred solutions, so that coefficients are of order one. Outputs share
    modes as they share features: independent and split_both have a basis each, split_trunk one
    basis of all outputs together (shared coefficients), split_branch one that serves them all.

    Raises:
        ValueError: solutions of another number of points or outputs than the config's.
    """
    s = np.asarray(s, np.float64).reshape(*s.shape[:2], -1)
    n, q, c = s.shape
    if cfg.kind != "pod" or (q, c) != (cfg.points, cfg.outputs):
        raise ValueError(
            f"solutions on {q} points with {c} outputs do not fit a {cfg.kind} network for "
            f"{cfg.points} points and {cfg.outputs} outputs: change points and outputs."
        )
    mean = s.mean(0)
    centred = s - mean[None]
    scale = np.maximum(np.sqrt(np.mean(centred**2, axis=(0, 1))), np.finfo(np.float32).tiny)
    unit = centred / scale[None, None]
    if cfg.multi_output == "split_trunk":
        joint = pod_basis(unit.reshape(n, q * c), cfg.modes)[1]
        basis = joint.reshape(q, c, cfg.modes) * np.sqrt(q * c)
    else:
        shared = cfg.multi_output == "split_branch"
        rows = np.moveaxis(unit, 2, 0)  # (c, n, q)
        sets = [rows.reshape(c * n, q)] if shared else list(rows)
        # Each set is centred already, or nearly: the mean over all outputs of centred rows is 0.
        basis = np.stack([pod_basis(x, cfg.modes)[1] for x in sets], axis=1) * np.sqrt(q)
    return Fixed(*(jnp.asarray(x, jnp.float32) for x in (mean, scale, basis)))


def at_rows(params: Params, rows: Int[Array | np.ndarray, " k"]) -> Params:
    """The network with its basis and mean at some of the grid's points, in this order."""
    fixed = params.fixed
    mean, basis = (jnp.take(x, jnp.asarray(rows), axis=0) for x in (fixed.mean, fixed.basis))
    return dataclasses.replace(  # type: ignore[type-var]
        params, fixed=dataclasses.replace(fixed, mean=mean, basis=basis)
    )


def interpolate(
    params: Params,
    axes: Sequence[Float[np.ndarray, " _"]],
    y: Float[np.ndarray, "q d"],
    method: str = "linear",
) -> Params:
    """The network with its basis and mean brought from a tensor grid to other points.

    Args:
        params: with a basis on the grid, whose last coordinate runs fastest.
        axes: the grid's coordinates, one ascending array per dimension.
        y: where to ask; give the same array as queries.
        method: linear, cubic, or another of scipy's ``RegularGridInterpolator``.

    Raises:
        ValueError: a grid of another number of points than the basis, or a query outside it.
    """
    fixed = params.fixed
    shape = tuple(len(axis) for axis in axes)
    if int(np.prod(shape)) != fixed.basis.shape[0]:
        raise ValueError(
            f"a grid of {shape} points does not carry a basis on {fixed.basis.shape[0]}."
        )
    for i, axis in enumerate(axes):
        low, high = float(axis[0]), float(axis[-1])
        outside = ~((y[:, i] >= low) & (y[:, i] <= high))
        if outside.any():
            raise ValueError(
                f"query {int(np.argmax(outside))} has coordinate {i} = {y[outside][0, i]}, outside "
                f"the training grid {low} to {high}: a POD basis is not known there."
            )

    def bring(x) -> jnp.ndarray:
        values = np.asarray(x, np.float64).reshape(*shape, -1)
        out = RegularGridInterpolator(tuple(axes), values, method=method)(y)
        return jnp.asarray(out.reshape(len(y), *x.shape[1:]), jnp.float32)

    return dataclasses.replace(  # type: ignore[type-var]
        params,
        fixed=dataclasses.replace(fixed, mean=bring(fixed.mean), basis=bring(fixed.basis)),
    )


INPUT_TOLERANCE = 4 * float(np.finfo(np.float32).eps)
"""Of :func:`input_basis`: root mean square of what may be lost, relative to the values'."""


def input_basis(u: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "r m"] | None:
    """Orthonormal rows that carry all input functions as exactly as float32 holds a sum over them.

    As few as leave no more than ``INPUT_TOLERANCE``; None if that takes more than half as many as
    there are sensors, since a network then gains nothing by :func:`on_coefficients`.
    """
    u = np.asarray(u, np.float64)
    _, singular, vt = np.linalg.svd(u, full_matrices=False)
    left = np.sqrt(np.cumsum(singular[::-1] ** 2)[::-1])  # with so many rows or more left out
    needed = max(1, int(np.sum(left > INPUT_TOLERANCE * left[0])))
    return None if needed > u.shape[1] // 2 else vt[:needed]


def on_coefficients(
    params: Params, cfg: DeepONetConfig, basis: Float[np.ndarray, "r m"]
) -> tuple[Params, DeepONetConfig]:
    """The same network for functions given by coefficients: ``u = coefficients @ basis``.

    Layers that read u have their weights multiplied by the basis, once for all functions, which
    leaves fewer columns for each. Outputs, and gradients with respect to ``params``, are those on
    ``u`` to rounding.

    Raises:
        ValueError: a basis for another number of sensors than the config's.
    """
    if basis.shape[1] != cfg.branch[0]:
        raise ValueError(
            f"the branch reads {cfg.branch[0]} sensor values, got {basis.shape[1]}: give the "
            "config the number of sensors that the data have."
        )
    rows = jnp.asarray(basis, jnp.float32)

    def project(layer: Linear) -> Linear:
        return Linear(jnp.matmul(rows.astype(layer.w.dtype), layer.w), layer.b)

    first, *others = params.branch.layers
    branch = dataclasses.replace(params.branch, layers=(project(first), *others))
    encoders = params.encoders
    if encoders is not None:
        encoders = (project(encoders[0]), encoders[1])
    return (
        dataclasses.replace(params, branch=branch, encoders=encoders),  # type: ignore[type-var]
        dataclasses.replace(cfg, branch=(len(basis), *cfg.branch[1:])),
    )
