"""The posterior that LC-PFN approximates: by importance sampling and by Markov chains.

Both know the prior of :mod:`.prior`. Importance sampling is exact in the limit and shares its draws
among all contexts, but few draws fit a long or a quiet context: look at ``ess``. The ensemble of
walkers is the method that LC-PFN was compared with.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key

from research.approximation.lc_pfn.prior import (
    NOISE_LOG_MEAN,
    NOISE_LOG_STD,
    PARAMETERS,
    PRIOR_FAMILIES,
    LogNormal,
    Uniform,
    accepted,
    draw_parameters,
    evaluate,
    sample_prior,
)

LOG_2PI = float(np.log(2 * np.pi))


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Laws of the noisy values at some epochs, for several contexts.

    Attributes:
        mean, std: (contexts, targets).
        quantiles: (contexts, targets, levels).
        log_density: (contexts, targets) of given true values; None without them.
        ess: (contexts,) effective sample size: the error of ``mean`` is about ``std / sqrt(ess)``.
    """

    mean: Float[np.ndarray, "c t"]
    std: Float[np.ndarray, "c t"]
    quantiles: Float[np.ndarray, "c t levels"]
    log_density: Float[np.ndarray, "c t"] | None
    ess: Float[np.ndarray, " c"]

    def of(self, contexts: Any) -> "Posterior":
        """Those of some contexts: a slice, a mask or numbers."""
        log_density = None if self.log_density is None else self.log_density[contexts]
        return Posterior(
            self.mean[contexts],
            self.std[contexts],
            self.quantiles[contexts],
            log_density,
            self.ess[contexts],
        )


def importance_posterior(
    key: Key[Array, ""],
    context: Float[np.ndarray, "c s"],
    targets: Sequence[int],
    levels: Sequence[float],
    truth: Float[np.ndarray, "c t"] | None = None,
    draws: int = 1_000_000,
    chunk: int = 20_000,
    seq_len: int = 100,
) -> Posterior:
    """Self-normalised importance sampling with curves of the prior.

    Every draw is weighted with the normal likelihood of the context under its own noise. The draws
    are the same for all contexts.

    Args:
        context: values at epochs 1 .. s, NaN after the end of a shorter context.
        targets: epochs, from 1 to ``seq_len``.
        levels: of the quantiles, between 0 and 1.
        truth: values whose density is wanted, in nats.
        draws: rounded up to whole chunks. Each takes ``4 contexts + 20 targets`` bytes.
        chunk: draws at a time.
        seq_len: length of the prior's curves.

    Raises:
        ValueError: a context that is empty, longer than the curves or has a gap; no targets, or
            targets beyond the curves.
    """
    _check_contexts(context, targets, seq_len)
    epochs = np.asarray(targets, np.int32) - 1
    parts = [
        _weigh(
            jax.random.fold_in(key, i), jnp.asarray(context, jnp.float32), epochs, chunk, seq_len
        )
        for i in range(-(-draws // chunk))
    ]
    log_weight = np.concatenate([p.log_weight for p in parts], axis=1)
    clean, noisy, sigma = (
        np.concatenate([np.asarray(getattr(p, name)) for p in parts])
        for name in ("clean", "noisy", "sigma")
    )
    return _summarise(log_weight, clean, noisy, sigma, np.asarray(levels), truth)


@struct.dataclass
class _Weighted:
    """Draws of the prior at the targets, and their log likelihoods under every context."""

    log_weight: Any  # (c, n)
    clean: Any  # (n, t)
    noisy: Any  # (n, t)
    sigma: Any  # (n,)


@functools.partial(jax.jit, static_argnames=("chunk", "seq_len"))
def _weigh(
    key: Key[Array, ""], context: Array, targets: Array, chunk: int, seq_len: int
) -> _Weighted:
    drawn = sample_prior(key, chunk, seq_len)
    length = context.shape[1]
    precision = (1 / drawn.sigma)[:, None]

    def one(values: Float[Array, " s"]) -> Float[Array, " n"]:
        given = ~jnp.isnan(values)
        error = (jnp.where(given, values, 0.0)[None] - drawn.clean[:, :length]) * precision
        squares = jnp.sum(jnp.where(given[None], jnp.square(error), 0.0), 1)
        return -0.5 * squares - jnp.sum(given) * jnp.log(drawn.sigma)

    clean, noisy = drawn.clean[:, targets], drawn.noisy[:, targets]
    return _Weighted(jax.lax.map(one, context), clean, noisy, drawn.sigma)


def _summarise(
    log_weight: np.ndarray,
    clean: np.ndarray,
    noisy: np.ndarray,
    sigma: np.ndarray,
    levels: np.ndarray,
    truth: np.ndarray | None,
) -> Posterior:
    contexts, targets = len(log_weight), clean.shape[1]
    mean, std = np.empty((2, contexts, targets))
    quantiles, ess = np.empty((contexts, targets, len(levels))), np.empty(contexts)
    log_density = None if truth is None else np.empty((contexts, targets))
    # The noisy values at a target are the same for all contexts: sorted once, weighed often.
    orders = [np.argsort(noisy[:, t]) for t in range(targets)]
    for c in range(contexts):
        weight = np.exp(log_weight[c].astype(np.float64) - log_weight[c].max())
        weight /= weight.sum()
        ess[c] = 1 / np.square(weight).sum()
        for t, order in enumerate(orders):
            mean[c, t] = weight @ clean[:, t]
            std[c, t] = np.sqrt(weight @ (np.square(clean[:, t] - mean[c, t]) + np.square(sigma)))
            found = np.searchsorted(np.cumsum(weight[order]), levels)
            quantiles[c, t] = noisy[order[np.minimum(found, len(order) - 1)], t]
            if truth is not None and log_density is not None:
                z = (truth[c, t] - clean[:, t]) / sigma
                log_density[c, t] = np.log(weight @ (np.exp(-0.5 * (z**2 + LOG_2PI)) / sigma))
    return Posterior(mean, std, quantiles, log_density, ess)


def mcmc_posterior(
    key: Key[Array, ""],
    context: Float[np.ndarray, "c s"],
    targets: Sequence[int],
    levels: Sequence[float],
    truth: Float[np.ndarray, "c t"] | None = None,
    walkers: int = 50,
    steps: int = 500,
    burn_in: int | None = None,
    seq_len: int = 100,
) -> Posterior:
    """An affine-invariant ensemble (stretch moves of two halves in turn), a chain per context.

    The 13 coordinates are weights, parameters and log noise of the peaked prior; lognormal
    parameters move on the log scale. Walkers begin at the likeliest of 4,000 candidates. All
    ``walkers * (steps - burn_in)`` states are kept, by default of half of the steps. Walkers move
    slowly, so ``ess`` counts every walker once.

    Raises:
        ValueError: contexts or targets as of :func:`importance_posterior`; walkers that are odd or
            fewer than twice the coordinates; a burn-in as long as the chain.
    """
    _check_contexts(context, targets, seq_len)
    if walkers % 2 or walkers < 2 * DIMENSIONS:
        raise ValueError(
            f"{walkers} walkers: give an even number of at least {2 * DIMENSIONS}, twice the "
            "coordinates."
        )
    burn_in = steps // 2 if burn_in is None else burn_in
    if not 0 <= burn_in < steps:
        raise ValueError(f"a burn-in of {burn_in} leaves nothing of {steps} steps: lower it.")
    epochs = np.asarray(targets, np.int32) - 1
    runs = [
        _chain(k, jnp.asarray(values, jnp.float32), epochs, walkers, steps, burn_in, seq_len)
        for k, values in zip(jax.random.split(key, len(context)), context, strict=True)
    ]
    parts = [
        _summarise(
            np.zeros((1, len(sigma)), np.float32),
            np.asarray(clean),
            np.asarray(noisy),
            np.asarray(sigma),
            np.asarray(levels),
            None if truth is None else truth[c : c + 1],
        )
        for c, (clean, noisy, sigma) in enumerate(runs)
    ]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Posterior(
        mean=joined("mean"),
        std=joined("std"),
        quantiles=joined("quantiles"),
        log_density=None if truth is None else joined("log_density"),
        ess=np.full(len(parts), float(walkers)),
    )


COORDINATES: tuple[tuple[str, Uniform | LogNormal], ...] = tuple(
    (f"{family}.{name}", law)
    for family in PRIOR_FAMILIES
    for name, law in ({"weight": Uniform(0.0, 1.0)} | PARAMETERS["peaked"][family]).items()
)
DIMENSIONS = len(COORDINATES) + 1
"""Weights and parameters of the prior's families, and the log of the noise."""


def _parameters(state: Float[Array, "n d"]) -> dict[str, Float[Array, " n"]]:
    return {
        name: jnp.exp(state[:, i]) if isinstance(law, LogNormal) else state[:, i]
        for i, (name, law) in enumerate(COORDINATES)
    }


def log_posterior(
    state: Float[Array, "n d"], context: Float[Array, " s"], seq_len: int
) -> Float[Array, " n"]:
    """Log of prior times likelihood of walkers' states, up to a constant; -inf out of bounds."""
    total = -0.5 * jnp.square((state[:, -1] - NOISE_LOG_MEAN) / NOISE_LOG_STD)
    for i, (_, law) in enumerate(COORDINATES):
        value = state[:, i]
        if isinstance(law, LogNormal):
            total = total - 0.5 * jnp.square((value - law.mean) / law.std)
        else:
            total = jnp.where((value >= law.low) & (value < law.high), total, -jnp.inf)
    clean = evaluate(_parameters(state), jnp.arange(1, seq_len + 1, dtype=jnp.float32))
    given = ~jnp.isnan(context)
    error = jnp.where(given, context, 0.0)[None] - clean[:, : context.shape[0]]
    squares = jnp.sum(jnp.where(given[None], jnp.square(error), 0.0), 1)
    likelihood = -0.5 * squares * jnp.exp(-2 * state[:, -1]) - jnp.sum(given) * state[:, -1]
    # A curve that is not finite is not accepted, and must not make the sum NaN either.
    return jnp.where(accepted(clean), total + likelihood, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("walkers", "steps", "burn_in", "seq_len"))
def _chain(
    key: Key[Array, ""],
    context: Float[Array, " s"],
    targets: Array,
    walkers: int,
    steps: int,
    burn_in: int,
    seq_len: int,
) -> tuple[Array, Array, Array]:
    """Clean and noisy values at the targets, and noise, of the kept states."""
    start_key, move_key, noise_key = jax.random.split(key, 3)
    state = _starts(start_key, context, walkers, seq_len)
    state = state.reshape(2, walkers // 2, DIMENSIONS)
    logp = jax.vmap(lambda s: log_posterior(s, context, seq_len))(state)

    def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        state, logp = carry
        for half, half_key in enumerate(jax.random.split(key)):
            moved, value = _stretch(
                half_key, state[half], logp[half], state[1 - half], context, seq_len
            )
            state, logp = state.at[half].set(moved), logp.at[half].set(value)
        return (state, logp), state

    _, states = jax.lax.scan(step, (state, logp), jax.random.split(move_key, steps))
    kept = states[burn_in:].reshape(-1, DIMENSIONS)
    clean = evaluate(_parameters(kept), (targets + 1).astype(jnp.float32))
    sigma = jnp.exp(kept[:, -1])
    return clean, clean + sigma[:, None] * jax.random.normal(noise_key, clean.shape), sigma


def _starts(
    key: Key[Array, ""], context: Float[Array, " s"], walkers: int, seq_len: int
) -> Float[Array, "walkers d"]:
    """The likeliest of many candidates of the prior."""
    count = max(4000, 40 * walkers)
    candidate_key, noise_key = jax.random.split(key)
    drawn = draw_parameters(candidate_key, count)
    columns = [
        jnp.log(drawn[name]) if isinstance(law, LogNormal) else drawn[name]
        for name, law in COORDINATES
    ]
    noise = NOISE_LOG_MEAN + NOISE_LOG_STD * jax.random.normal(noise_key, (count,))
    state = jnp.stack([*columns, noise], 1)
    return state[jax.lax.top_k(log_posterior(state, context, seq_len), walkers)[1]]


def _stretch(
    key: Key[Array, ""],
    state: Float[Array, "n d"],
    logp: Float[Array, " n"],
    others: Float[Array, "n d"],
    context: Float[Array, " s"],
    seq_len: int,
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Goodman and Weare's move of one half along lines to walkers of the other; scale 2."""
    partner_key, scale_key, accept_key = jax.random.split(key, 3)
    n = state.shape[0]
    partner = others[jax.random.randint(partner_key, (n,), 0, n)]
    z = jnp.square(1 + jax.random.uniform(scale_key, (n,))) / 2
    proposal = partner + z[:, None] * (state - partner)
    value = log_posterior(proposal, context, seq_len)
    gain = (DIMENSIONS - 1) * jnp.log(z) + value - logp
    taken = jnp.log(jax.random.uniform(accept_key, (n,))) < gain
    return jnp.where(taken[:, None], proposal, state), jnp.where(taken, value, logp)


def _check_contexts(context: np.ndarray, targets: Sequence[int], seq_len: int) -> None:
    lengths = (~np.isnan(context)).sum(1)
    gaps = [np.isnan(row[:n]).any() for row, n in zip(context, lengths, strict=True)]
    if context.shape[1] > seq_len or (lengths == 0).any() or any(gaps):
        raise ValueError(
            f"every context needs 1 to {seq_len} values at epochs 1, 2, ... without a gap, and NaN "
            "only after its end."
        )
    if not len(targets) or min(targets) < 1 or max(targets) > seq_len:
        raise ValueError(f"targets {list(targets)} must be epochs from 1 to {seq_len}.")
