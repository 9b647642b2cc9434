"""The prior over learning curves: weighted sums of parametric families that rise within [0, 1].

A curve is ``f(x) = sum_k w_k f_k(x)`` at epochs 1, 2, ..., with weights uniform on [0, 1] that are
not normalised, and is drawn anew unless it ends above its beginning and stays within [0, 1]. What
is observed is ``f(x)`` plus normal noise of one standard deviation per curve, and may leave [0, 1].

Source: arXiv 2310.20447 and its released code. The paper defines the noise's lognormal as its
variance; the code makes it the standard deviation and its authors say the code is right.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from research.approximation.lc_pfn.curves import FAMILIES

PRIOR_FAMILIES = ("pow3", "ilog2", "janoschek")
NOISE_LOG_MEAN, NOISE_LOG_STD = -4.0, 1.0

CANDIDATES = 8
"""Candidates per curve asked for and round: about a fifth of them is accepted."""

SURVIVORS = 3
"""Of these, the share of curves asked for that is looked at in full: those with good ends."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The uniform law on [low, high)."""

    low: float
    high: float

    def draw(self, key: Key[Array, ""], n: int) -> Float[Array, " n"]:
        """``n`` values."""
        return jax.random.uniform(key, (n,), jnp.float32, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """The law of ``exp`` of a normal of this mean and standard deviation."""

    mean: float
    std: float

    def draw(self, key: Key[Array, ""], n: int) -> Float[Array, " n"]:
        """``n`` values."""
        return jnp.exp(self.mean + self.std * jax.random.normal(key, (n,), jnp.float32))


Law = Uniform | LogNormal

PARAMETERS: dict[str, dict[str, dict[str, Law]]] = {
    "peaked": {
        "pow3": {"a": Uniform(-0.6, 0.6), "c": Uniform(0.0, 1.25), "alpha": LogNormal(0.0, 2.0)},
        "ilog2": {"a": Uniform(-0.5, 0.5), "c": Uniform(0.0, 1.0)},
        "janoschek": {
            "a": Uniform(0.0, 1.0),
            "beta": Uniform(0.0, 2.0),
            "k": LogNormal(-2.0, 1.0),
            "delta": LogNormal(0.0, 0.5),
        },
    },
    "uniform": {
        "pow3": {"a": Uniform(-1.0, 1.0), "c": Uniform(0.0, 1.0), "alpha": Uniform(0.0, 1.0)},
        "ilog2": {"a": Uniform(-1.0, 1.0), "c": Uniform(0.0, 1.0)},
        "janoschek": {
            "a": Uniform(0.0, 1.0),
            "beta": Uniform(0.0, 2.0),
            "k": Uniform(0.0, 1.0),
            "delta": Uniform(-5.0, 5.0),
        },
    },
}
"""Laws of the parameters by kind of prior and family. The uniform kind is for ablations."""


@struct.dataclass
class Sample:
    """Curves of the prior, without and with noise, and the noise's standard deviation."""

    clean: Any  # (n, seq_len)
    noisy: Any  # (n, seq_len)
    sigma: Any  # (n,)


def check_families(families: tuple[str, ...], kind: str) -> None:
    """Raise ValueError for an unknown kind of prior, or families that it has no laws for."""
    if kind not in PARAMETERS:
        raise ValueError(f"unknown prior {kind!r}: choose {' or '.join(PARAMETERS)}.")
    unknown = [name for name in families if name not in PARAMETERS[kind]]
    if unknown or not families:
        raise ValueError(
            f"the prior has no laws for families {unknown}: choose among "
            f"{', '.join(PARAMETERS[kind])}, at least one."
        )


def draw_parameters(
    key: Key[Array, ""], n: int, families: tuple[str, ...] = PRIOR_FAMILIES, kind: str = "peaked"
) -> dict[str, Float[Array, " n"]]:
    """Weights and parameters of ``n`` candidates, as ``pow3.weight`` and ``pow3.alpha``."""
    check_families(families, kind)
    names = [(f, p, law) for f in families for p, law in PARAMETERS[kind][f].items()]
    names += [(f, "weight", Uniform(0.0, 1.0)) for f in families]
    keys = jax.random.split(key, len(names))
    return {f"{f}.{p}": law.draw(k, n) for k, (f, p, law) in zip(keys, names, strict=True)}


def evaluate(
    parameters: Mapping[str, Float[Array, " n"]], x: Float[Array, " t"]
) -> Float[Array, "n t"]:
    """The weighted sum of the families at epochs ``x``."""
    total = jnp.zeros((), jnp.float32)
    for family in dict.fromkeys(name.split(".")[0] for name in parameters):
        named = [(name.split("."), value[:, None]) for name, value in parameters.items()]
        own = {parameter: value for (owner, parameter), value in named if owner == family}
        weight = own.pop("weight")
        total = total + weight * FAMILIES[family](x[None], **own)
    return total


def accepted(clean: Float[Array, "n t"]) -> Bool[Array, " n"]:
    """Whether curves end above their first value and lie within [0, 1] (NaN does not)."""
    within = jnp.all((clean >= 0) & (clean <= 1), axis=1)
    return within & (clean[:, -1] > clean[:, 0])


@functools.partial(jax.jit, static_argnames=("n", "seq_len", "families", "kind"))
def sample_prior(
    key: Key[Array, ""],
    n: int,
    seq_len: int = 100,
    families: tuple[str, ...] = PRIOR_FAMILIES,
    kind: str = "peaked",
) -> Sample:
    """``n`` curves at epochs 1 .. ``seq_len``, drawn on the device.

    Rounds of a fixed number of candidates are drawn until ``n`` are accepted, which takes one round
    as a rule. Candidates are looked at in full only if their two ends pass, and accepted ones are
    taken in the order in which they were drawn, so that rejection leaves the law as it is.

    Raises:
        ValueError: an unknown kind, or families without laws.
    """
    curves_key, noise_key, sigma_key = jax.random.split(key, 3)
    clean = _accepted_curves(curves_key, n, seq_len, families, kind)
    sigma = jnp.exp(NOISE_LOG_MEAN + NOISE_LOG_STD * jax.random.normal(sigma_key, (n,)))
    noise = sigma[:, None] * jax.random.normal(noise_key, clean.shape)
    return Sample(clean, clean + noise, sigma)


def _accepted_curves(
    key: Key[Array, ""], n: int, seq_len: int, families: tuple[str, ...], kind: str
) -> Float[Array, "n t"]:
    epochs = jnp.arange(1, seq_len + 1, dtype=jnp.float32)
    candidates, survivors = CANDIDATES * n, SURVIVORS * n

    def draw(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        filled, rounds, curves = carry
        parameters = draw_parameters(jax.random.fold_in(key, rounds), candidates, families, kind)
        good_ends = accepted(evaluate(parameters, epochs[jnp.array([0, -1])]))
        rows = jnp.nonzero(good_ends, size=survivors, fill_value=candidates)[0]
        taken = {name: value[rows.clip(0, candidates - 1)] for name, value in parameters.items()}
        clean = evaluate(taken, epochs)
        good = accepted(clean) & (rows < candidates)
        place = jnp.where(good, filled + jnp.cumsum(good) - 1, n)
        return filled + jnp.sum(good), rounds + 1, curves.at[place].set(clean, mode="drop")

    zero = jnp.zeros((), jnp.int32)
    start = (zero, zero, jnp.zeros((n, seq_len), jnp.float32))
    return jax.lax.while_loop(lambda carry: carry[0] < n, draw, start)[-1]
