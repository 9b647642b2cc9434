"""The eleven parametric families of learning curves of Domhan et al. (2015).

Every function takes epochs ``x`` and its parameters as arrays that broadcast against each other,
in the dtype they come in, and may give infinities and NaN where its formula does.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Values = Float[Array, "..."]


def pow3(x: Values, a: Values, c: Values, alpha: Values) -> Values:
    """``c - a x^-alpha``."""
    return c - a * x**-alpha


def ilog2(x: Values, a: Values, c: Values) -> Values:
    """``c - a / ln(x + 1)``."""
    return c - a / jnp.log(x + 1)


def janoschek(x: Values, a: Values, beta: Values, k: Values, delta: Values) -> Values:
    """``a - (a - beta) exp(-k x^delta)``."""
    return a - (a - beta) * jnp.exp(-k * x**delta)


def log_power(x: Values, a: Values, b: Values, c: Values) -> Values:
    """``a / (1 + (x / e^b)^c)``."""
    return a / (1 + (x / jnp.exp(b)) ** c)


def weibull(x: Values, alpha: Values, beta: Values, kappa: Values, delta: Values) -> Values:
    """``alpha - (alpha - beta) exp(-(kappa x)^delta)``."""
    return alpha - (alpha - beta) * jnp.exp(-((kappa * x) ** delta))


def mmf(x: Values, alpha: Values, beta: Values, kappa: Values, delta: Values) -> Values:
    """``alpha - (alpha - beta) / (1 + (kappa x)^delta)``."""
    return alpha - (alpha - beta) / (1 + (kappa * x) ** delta)


def vap(x: Values, a: Values, b: Values, c: Values) -> Values:
    """``exp(a + b / x + c ln x)``."""
    return jnp.exp(a + b / x + c * jnp.log(x))


def loglog_linear(x: Values, a: Values, b: Values) -> Values:
    """``ln(a ln x + b)``."""
    return jnp.log(a * jnp.log(x) + b)


def exp4(x: Values, a: Values, b: Values, c: Values, alpha: Values) -> Values:
    """``c - exp(-a x^alpha + b)``."""
    return c - jnp.exp(-a * x**alpha + b)


def pow4(x: Values, a: Values, b: Values, c: Values, alpha: Values) -> Values:
    """``c - (a x + b)^-alpha``."""
    return c - (a * x + b) ** -alpha


def dr_hill_zero_background(x: Values, theta: Values, eta: Values, kappa: Values) -> Values:
    """``theta x^eta / (kappa^eta + x^eta)``."""
    return theta * x**eta / (kappa**eta + x**eta)


FAMILIES: dict[str, Callable[..., Values]] = {
    family.__name__: family
    for family in (
        pow3,
        ilog2,
        janoschek,
        log_power,
        weibull,
        mmf,
        vap,
        loglog_linear,
        exp4,
        pow4,
        dr_hill_zero_background,
    )
}
"""The functions by name; three of them make the prior, see :mod:`.prior`."""
