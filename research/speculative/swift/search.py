"""Which sub-layers SWIFT skips: sets, proposals, and the rule that keeps the best one seen.

Source: Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
arXiv 2410.06916. Runs on the host, in numpy. Layers count from 0; the first and the last are never
skipped, so a model of L layers has ``2 (L - 2)`` candidates: attention of layers 1 .. L-2, then
their MLPs.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from research.speculative.swift.gaussian_process import suggest

Number = Any


@struct.dataclass
class SkipSet:
    """Sub-layers that the draft leaves out."""

    attention: Any  # (layers,) bool
    mlp: Any  # (layers,) bool


@struct.dataclass
class Search:
    """Where the search stands. ``points`` are what was proposed, as the process has seen it."""

    skip: SkipSet  # in force: that of the best score
    best_score: Any  # float32
    iterations: Any  # int32
    tolerance: Any  # int32, iterations since the last better one
    active: Any  # bool
    points: Any  # (m, candidates) float32, of which the first ``iterations`` count
    scores: Any  # (m,) float32


@struct.dataclass
class Proposal:
    """A set to try, and the vector it is registered as."""

    skip: SkipSet
    point: Float[np.ndarray, " candidates"]


def candidates(num_layers: int) -> int:
    """How many sub-layers may be skipped.

    Raises:
        ValueError: a model of fewer than three layers.
    """
    if num_layers < 3:
        raise ValueError(
            f"the first and the last layer are never skipped, so a model of {num_layers} layers "
            "has nothing to skip: draft with another method."
        )
    return 2 * (num_layers - 2)


def num_skipped(num_layers: int, ratio: float) -> int:
    """``int(2 (L - 2) r)`` sub-layers.

    Raises:
        ValueError: a ratio that skips none, or more than there are.
    """
    count = candidates(num_layers)
    skipped = int(count * ratio)
    if not 1 <= skipped <= count:
        raise ValueError(
            f"a skip ratio of {ratio} leaves out {skipped} of {count} sub-layers: give a ratio "
            f"from {1 / count:.2f} to 1."
        )
    return skipped


def uniform_set(num_layers: int) -> SkipSet:
    """Every second layer: 1, 3, 5, ... below the last, both sub-layers."""
    candidates(num_layers)
    layers = np.arange(num_layers)
    odd = (layers % 2 == 1) & (layers < num_layers - 1)
    return SkipSet(jnp.asarray(odd), jnp.asarray(odd))


def checked_set(num_layers: int, attention: Any, mlp: Any) -> SkipSet:
    """A set given as two vectors.

    Raises:
        ValueError: vectors of another length, or a set with the first or the last layer.
    """
    candidates(num_layers)
    skip = SkipSet(*(jnp.asarray(np.asarray(x, bool)) for x in (attention, mlp)))
    for name, vector in (("attention", skip.attention), ("MLP", skip.mlp)):
        if vector.shape != (num_layers,):
            raise ValueError(
                f"the {name} vector has shape {vector.shape} for {num_layers} layers: give one "
                "entry per layer."
            )
        if bool(vector[0]) or bool(vector[-1]):
            raise ValueError(
                f"the set skips the {name} of the first or the last layer, which are never "
                f"skipped: choose among layers 1 to {num_layers - 2}."
            )
    return skip


def vector_to_set(vector: Float[np.ndarray, " candidates"], skipped: int) -> SkipSet:
    """The set of the ``skipped`` largest entries (on ties the first ones)."""
    half = vector.shape[0] // 2
    chosen = np.zeros(vector.shape, bool)
    chosen[np.argsort(-vector, kind="stable")[:skipped]] = True
    ends = np.zeros(1, bool)
    attention, mlp = (np.concatenate([ends, part, ends]) for part in (chosen[:half], chosen[half:]))
    return SkipSet(jnp.asarray(attention), jnp.asarray(mlp))


def propose_random(rng: np.random.Generator, count: int, skipped: int) -> Proposal:
    """A uniform subset, registered as zeros and ones."""
    vector = np.zeros(count, np.float32)
    vector[rng.permutation(count)[:skipped]] = 1
    return Proposal(vector_to_set(vector, skipped), vector)


def propose_bayes(
    rng: np.random.Generator, search: Search, skipped: int, kappa: float, noise: float
) -> Proposal:
    """The point of the largest upper confidence bound, registered as it is."""
    seen = int(search.iterations)
    points, scores = (np.asarray(x, np.float64)[:seen] for x in (search.points, search.scores))
    vector = suggest(points, scores, rng, kappa, noise).astype(np.float32)
    return Proposal(vector_to_set(vector, skipped), vector)


def start_search(skip: SkipSet, max_iterations: int) -> Search:
    """Nothing tried, ``skip`` in force."""
    size = 2 * (skip.attention.shape[0] - 2)
    return Search(
        skip=skip,
        best_score=jnp.zeros((), jnp.float32),
        iterations=jnp.zeros((), jnp.int32),
        tolerance=jnp.zeros((), jnp.int32),
        active=jnp.ones((), bool),
        points=jnp.zeros((max_iterations + 1, size), jnp.float32),
        scores=jnp.zeros((max_iterations + 1,), jnp.float32),
    )


def update_search(
    search: Search, proposal: Proposal, score: Number, max_score: Number, max_tolerance: Number
) -> Search:
    """Adopt the proposal if it is strictly better than all before, and say whether to go on.

    The search ends for good at a score above ``max_score``, after more than ``max_tolerance``
    iterations without a better one, or when ``points`` are full.
    """
    score, done = np.float32(score), int(search.iterations)
    better = bool(score > np.float32(search.best_score))
    tolerance = 0 if better else int(search.tolerance) + 1
    enough = better and bool(score > np.float32(max_score))
    full = done + 1 >= search.scores.shape[0]
    active = bool(search.active) and not enough and not tolerance > int(max_tolerance) and not full
    return dataclasses.replace(
        search,
        skip=proposal.skip if better else search.skip,
        best_score=jnp.asarray(score) if better else search.best_score,
        iterations=jnp.asarray(done + 1, jnp.int32),
        tolerance=jnp.asarray(tolerance, jnp.int32),
        active=jnp.asarray(active),
        points=search.points.at[done].set(proposal.point),
        scores=search.scores.at[done].set(score),
    )
