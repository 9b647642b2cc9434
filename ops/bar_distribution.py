"""A predictive density over the real line as logits of bins: the bar or "Riemann" distribution.

Everything is a function of ``borders``, the ends of n adjacent bins in rising order, and of the
logits of the bins. Inside a bin the density is uniform. With ``full_support`` the first and the
last bin are half-normals instead, each with half of its mass beyond the outer border, so that
every real number has a density.

Source: Müller et al., arXiv 2112.10510, with the conventions of LC-PFN's code (arXiv 2310.20447).
That code leaves the half-normals out of its quantiles and its distribution function; so does the
default here, and ``exact_tails`` has them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfc, ndtri
from jaxtyping import Array, Float, Int

HALF_NORMAL_MEDIAN = 0.6744897501960817
"""Median of the half-normal of scale 1: the normal's quantile at 3/4."""


def fit_borders(values: Float[Array | np.ndarray, "..."], buckets: int) -> Float[np.ndarray, " m"]:
    """Borders, float32, of ``buckets`` bins that hold the same number of ``values``.

    The remainder of the number of values modulo ``buckets`` is dropped from their end. An inner
    border lies halfway between the neighbours on its two sides, the outer two at the extremes.

    Raises:
        ValueError: fewer than two bins, fewer values than bins, values that are not finite, or so
            many equal values that a bin would have no width.
    """
    flat = np.asarray(values, np.float32).reshape(-1)
    if buckets < 2 or flat.size < buckets:
        raise ValueError(
            f"{flat.size} values cannot give {buckets} bins: ask for at least 2, and give at "
            "least as many values."
        )
    if not np.isfinite(flat).all():
        raise ValueError("borders are made of finite values: remove the others first.")
    chunks = np.sort(flat[: flat.size - flat.size % buckets]).reshape(buckets, -1)
    inner = (chunks[:-1, -1] + chunks[1:, 0]) / 2
    borders = np.concatenate([chunks[:1, 0], inner, chunks[-1:, -1]]).astype(np.float32)
    if not (np.diff(borders) > 0).all():
        raise ValueError(
            f"the values repeat so often that some of {buckets} bins have no width: ask for fewer."
        )
    return borders


def bucket_index(borders: Float[Array, " m"], y: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
    """The bin of each value; on a border it is the lower bin, beyond the ends the nearest."""
    found = jnp.searchsorted(borders, y, side="left") - 1
    return jnp.clip(found, 0, borders.shape[0] - 2).astype(jnp.int32)


def log_prob(
    borders: Float[Array, " m"],
    logits: Float[Array, "*batch n"],
    y: Float[Array, "*batch"],
    full_support: bool = True,
) -> Float[Array, "*batch"]:
    """Log density of ``y``, in nats; without full support it is -inf beyond the borders."""
    _check(borders, logits)
    width = jnp.diff(borders)
    index = bucket_index(borders, y)
    log_mass = jnp.take_along_axis(jax.nn.log_softmax(logits), index[..., None], axis=-1)[..., 0]
    log_density = -jnp.log(width)[index]
    if not full_support:
        inside = (y >= borders[0]) & (y <= borders[-1])
        return jnp.where(inside, log_mass + log_density, -jnp.inf)
    low, high = _scales(borders)
    lowest, highest = index == 0, index == width.shape[0] - 1
    # A harmless argument where the half-normal is not chosen: its gradient must be finite there.
    below = jnp.where(lowest, borders[1] - y, 1.0)
    above = jnp.where(highest, y - borders[-2], 1.0)
    log_density = jnp.where(lowest, _half_normal(below, low), log_density)
    log_density = jnp.where(highest, _half_normal(above, high), log_density)
    return log_mass + log_density


def mean(
    borders: Float[Array, " m"], logits: Float[Array, "*batch n"], full_support: bool = True
) -> Float[Array, "*batch"]:
    """The mean. With full support the wide tails pull at it: for point estimates see `median`."""
    _check(borders, logits)
    centres = _centres(borders)
    if full_support:
        low, high = _scales(borders)
        offset = math.sqrt(2 / math.pi)
        centres = centres.at[0].set(borders[1] - offset * low)
        centres = centres.at[-1].set(borders[-2] + offset * high)
    return jax.nn.softmax(logits) @ centres


def variance(
    borders: Float[Array, " m"], logits: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    """The variance with uniform bins throughout."""
    _check(borders, logits)
    probs, centres = jax.nn.softmax(logits), _centres(borders)
    around = centres.reshape(*[1] * (logits.ndim - 1), -1) - (probs @ centres)[..., None]
    # Centred, so that narrow distributions lose no digits: E[y^2] - E[y]^2 would.
    return jnp.sum(probs * jnp.square(around), -1) + probs @ (jnp.square(jnp.diff(borders)) / 12)


def mode(borders: Float[Array, " m"], logits: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """The centre of the bin with the most mass (not with the highest density)."""
    _check(borders, logits)
    return _centres(borders)[jnp.argmax(logits, -1)]


def cdf(
    borders: Float[Array, " m"],
    logits: Float[Array, "*batch n"],
    y: Float[Array, "*batch"],
    exact_tails: bool = False,
) -> Float[Array, "*batch"]:
    """The probability of a value of at most ``y``."""
    _check(borders, logits)
    probs, index = jax.nn.softmax(logits), bucket_index(borders, y)
    upto = jnp.cumsum(probs, -1)
    share = jnp.clip((y - borders[index]) / (borders[index + 1] - borders[index]), 0.0, 1.0)
    if exact_tails:
        low, high = _scales(borders)
        below = _half_normal_tail(borders[1] - y, low)
        above = 1 - _half_normal_tail(y - borders[-2], high)
        share = jnp.where(index == 0, below, share)
        share = jnp.where(index == probs.shape[-1] - 1, above, share)
    mass = jnp.take_along_axis(probs, index[..., None], -1)[..., 0]
    before = jnp.take_along_axis(upto, index[..., None], -1)[..., 0] - mass
    return jnp.clip(before + share * mass, 0.0, 1.0)


def icdf(
    borders: Float[Array, " m"],
    logits: Float[Array, "*batch n"],
    levels: Float[Array, " q"],
    exact_tails: bool = False,
) -> Float[Array, "*batch q"]:
    """The values below which the shares ``levels`` of the mass lie.

    With ``exact_tails`` the levels 0 and 1 are at infinity.
    """
    _check(borders, logits)
    probs = jax.nn.softmax(logits)
    upto = jnp.cumsum(probs, -1)
    flat = upto.reshape(-1, upto.shape[-1])
    index = jax.vmap(lambda row: jnp.searchsorted(row, levels, side="left"))(flat)
    index = jnp.minimum(index, probs.shape[-1] - 1).reshape(*probs.shape[:-1], -1)
    mass = jnp.take_along_axis(probs, index, -1)
    level = levels.reshape(*[1] * (probs.ndim - 1), -1)
    before = jnp.take_along_axis(upto, index, -1) - mass
    share = jnp.clip((level - before) / jnp.maximum(mass, 1e-30), 0.0, 1.0)
    y = borders[index] + share * (borders[index + 1] - borders[index])
    if exact_tails:
        low, high = _scales(borders)
        above = jnp.clip((1 - level) / jnp.maximum(mass, 1e-30), 0.0, 1.0)
        y = jnp.where(index == 0, borders[1] + low * ndtri(share / 2), y)
        y = jnp.where(index == probs.shape[-1] - 1, borders[-2] - high * ndtri(above / 2), y)
    return y


def median(
    borders: Float[Array, " m"], logits: Float[Array, "*batch n"], exact_tails: bool = False
) -> Float[Array, "*batch"]:
    """The value with half of the mass below it."""
    return icdf(borders, logits, jnp.array([0.5], jnp.float32), exact_tails)[..., 0]


def quantile(
    borders: Float[Array, " m"],
    logits: Float[Array, "*batch n"],
    center_prob: float = 0.682,
    exact_tails: bool = False,
) -> Float[Array, "*batch 2"]:
    """Both ends of the interval that holds ``center_prob`` with as much mass on either side."""
    side = (1 - center_prob) / 2
    return icdf(borders, logits, jnp.array([side, 1 - side], jnp.float32), exact_tails)


def expected_improvement(
    borders: Float[Array, " m"], logits: Float[Array, "*batch n"], best: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Mean of ``max(y - best, 0)`` as LC-PFN's code has it, with uniform bins.

    In the bin that holds ``best`` it takes the mean of the part above and leaves out what share of
    the bin that part is, so that this bin counts too much.
    """
    _check(borders, logits)
    low, high, best = borders[:-1], borders[1:], best[..., None]
    lead = [1] * (logits.ndim - 1)
    low, high = low.reshape(*lead, -1), high.reshape(*lead, -1)
    gain = jnp.maximum((high + jnp.maximum(low, best)) / 2 - best, 0.0)
    return jnp.sum(jax.nn.softmax(logits) * gain, -1)


def probability_of_improvement(
    borders: Float[Array, " m"], logits: Float[Array, "*batch n"], best: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Probability of a value above ``best``, with uniform bins."""
    _check(borders, logits)
    lead = [1] * (logits.ndim - 1)
    low, width = borders[:-1].reshape(*lead, -1), jnp.diff(borders).reshape(*lead, -1)
    below = jnp.clip((best[..., None] - low) / width, 0.0, 1.0)
    return jnp.sum(jax.nn.softmax(logits) * (1 - below), -1)


def _check(borders: Array, logits: Array) -> None:
    if borders.shape[0] != logits.shape[-1] + 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"{borders.shape[0]} borders do not bound {logits.shape[-1]} bins: give logits of at "
            "least 2 bins and one border more."
        )


def _centres(borders: Float[Array, " m"]) -> Float[Array, " n"]:
    return (borders[:-1] + borders[1:]) / 2


def _scales(borders: Float[Array, " m"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Scales of the two half-normals: half of their mass lies within the outer bins."""
    first, last = borders[1] - borders[0], borders[-1] - borders[-2]
    return first / HALF_NORMAL_MEDIAN, last / HALF_NORMAL_MEDIAN


def _half_normal(z: Float[Array, "*batch"], scale: Float[Array, ""]) -> Float[Array, "*batch"]:
    """Log density of a half-normal at ``z`` of at least 0."""
    z = jnp.maximum(z, 1e-8)
    return 0.5 * math.log(2 / math.pi) - jnp.log(scale) - 0.5 * jnp.square(z / scale)


def _half_normal_tail(z: Float[Array, "*batch"], scale: Float[Array, ""]) -> Float[Array, "*batch"]:
    """Mass of a half-normal beyond ``z``."""
    return erfc(jnp.maximum(z, 0.0) / (scale * math.sqrt(2)))
