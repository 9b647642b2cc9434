"""Signed distances as signals: shapes by name or file, training points, volume overlap."""

import pathlib

import numpy as np
from jaxtyping import Bool, Float32

from research.approximation.metric_grids.mesh import load_mesh
from research.approximation.metric_grids.shapes import SHAPES, Shape

NOISE = 0.01
"""Standard deviation of the points near the surface."""


def load_shape(name: str) -> Shape:
    """A shape by its name, or a mesh from an OBJ file, scaled into [-0.9, 0.9]^3.

    Warns (UserWarning) of an open mesh.

    Raises:
        ValueError: neither a known name nor an OBJ file, or a mesh that is empty or damaged.
        FileNotFoundError: there is no such file.
    """
    if name in SHAPES:
        return SHAPES[name]
    if not pathlib.Path(name).suffix:
        raise ValueError(f"unknown shape {name!r}: choose {', '.join(SHAPES)}, or an .obj file.")
    return load_mesh(name)


def training_points(
    shape: Shape, batches: int, size: int, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "batches size 3"], Float32[np.ndarray, "batches size 1"]]:
    """Batches of points and their signed distances.

    Of each batch 4/8 lie on the surface (distance 0), 3/8 near it, and 1/8 anywhere in [-1, 1]^3.

    Raises:
        ValueError: a size that is not a multiple of 8.
    """
    if size < 8 or size % 8:
        raise ValueError(f"a batch has {size} points: choose a multiple of 8.")
    count = batches * size
    on = shape.surface(count // 2, rng)
    near = shape.surface(count * 3 // 8, rng)
    near = np.clip(near + rng.normal(0, NOISE, near.shape), -1, 1)
    anywhere = rng.uniform(-1, 1, (count // 8, 3))
    # Distances are those of the points as float32 gives them to the model.
    others = [points.astype(np.float32).astype(np.float64) for points in (near, anywhere)]
    parts = [(on, np.zeros(len(on))), *((p, shape.distance(p)) for p in others)]
    points = [p.reshape(batches, -1, 3) for p, _ in parts]
    values = [v.reshape(batches, -1, 1) for _, v in parts]
    return (
        np.concatenate(points, axis=1).astype(np.float32),
        np.concatenate(values, axis=1).astype(np.float32),
    )


def cube(resolution: int) -> Float32[np.ndarray, "points 3"]:
    """A grid of ``resolution``^3 points of [-1, 1]^3, corners included; z changes fastest.

    Raises:
        ValueError: fewer than 2 points per axis.
    """
    if resolution < 2:
        raise ValueError(f"a grid needs at least 2 points per axis, got {resolution}.")
    line = np.linspace(-1, 1, resolution, dtype=np.float32)
    return np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1).reshape(-1, 3)


def overlap(inside: Bool[np.ndarray, " n"], target: Bool[np.ndarray, " n"]) -> float:
    """Intersection over union of two solids on the same points; 1 if both are empty."""
    union = np.sum(inside | target)
    return float(np.sum(inside & target) / union) if union else 1.0
