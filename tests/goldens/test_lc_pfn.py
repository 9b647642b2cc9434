"""LC-PFN against the official code's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.lc_pfn import forward
from models.lc_pfn_io import import_torch_state
from ops import bar_distribution as bar
from research.approximation.lc_pfn.curves import FAMILIES
from research.approximation.lc_pfn.normalizer import Normalizer
from research.approximation.lc_pfn.posterior import importance_posterior, mcmc_posterior
from research.approximation.lc_pfn.prior import accepted, draw_parameters, evaluate, sample_prior
from tests.goldens import golden

lc_pfn_golden = functools.partial(golden, "lc_pfn")
close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)


def _bars() -> tuple[dict[str, np.ndarray], jax.Array, jax.Array]:
    g = lc_pfn_golden("bar_distribution")
    return g, jnp.asarray(g["borders"]), jnp.asarray(g["logits"])


def test_borders() -> None:
    g, borders, _ = _bars()
    fitted = bar.fit_borders(g["ys"], borders.shape[0] - 1)
    np.testing.assert_allclose(fitted, borders, atol=1e-6, rtol=0)


def test_bar_density() -> None:
    g, borders, logits = _bars()
    y = jnp.asarray(g["y"])
    np.testing.assert_array_equal(bar.bucket_index(borders, y), g["bucket_index"])
    close(-bar.log_prob(borders, logits, y), g["nll_full_support"])
    bounded = bar.log_prob(borders, logits, jnp.asarray(g["y_inside"]), full_support=False)
    close(-bounded, g["nll_bounded"])


def test_bar_summaries() -> None:
    g, borders, logits = _bars()
    close(bar.mean(borders, logits), g["mean_full_support"])
    close(bar.mean(borders, logits, full_support=False), g["mean_bounded"])
    close(bar.variance(borders, logits), g["variance_bounded"])
    close(bar.mode(borders, logits), g["mode"])
    close(bar.icdf(borders, logits, jnp.asarray(g["q"])), g["icdf"])


def test_bar_improvement() -> None:
    g, borders, logits = _bars()
    best = jnp.full(logits.shape[:-1], g["best_f"])
    close(bar.expected_improvement(borders, logits, best), g["ei"])
    close(bar.probability_of_improvement(borders, logits, best), g["pi"])


def _curves() -> tuple[dict[str, np.ndarray], list[str]]:
    g = lc_pfn_golden("curves")
    names = sorted(name.removesuffix("_names") for name in g if name.endswith("_names"))
    assert names == sorted(FAMILIES)
    return g, names


def test_curves_in_double_precision() -> None:
    g, names = _curves()
    with jax.enable_x64(True):
        x = jnp.asarray(g["x"], jnp.float64)[None]
        for name in names:
            parameters = {
                str(parameter): jnp.asarray(column, jnp.float64)[:, None]
                for parameter, column in zip(g[f"{name}_names"], g[f"{name}_params"].T, strict=True)
            }
            found = np.asarray(FAMILIES[name](x, **parameters))
            np.testing.assert_allclose(
                found, g[f"{name}_y"], atol=1e-10, rtol=1e-10, equal_nan=True, err_msg=name
            )


def test_curves_in_single_precision() -> None:
    g, names = _curves()
    x = jnp.asarray(g["x"])[None]
    for name in names:
        parameters = {
            str(parameter): jnp.asarray(column, jnp.float32)[:, None]
            for parameter, column in zip(g[f"{name}_names"], g[f"{name}_params"].T, strict=True)
        }
        found = np.asarray(FAMILIES[name](x, **parameters))
        both = np.isfinite(g[f"{name}_y"]) & np.isfinite(found)
        assert both.any()
        expected = g[f"{name}_y"][both]
        np.testing.assert_allclose(found[both], expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_forward() -> None:
    g = lc_pfn_golden("transformer_forward")
    state = {n.removeprefix("p."): array for n, array in g.items() if n.startswith("p.")}
    borders = np.linspace(0, 1, g["logits"].shape[-1] + 1)
    model = import_torch_state(state, int(g["nhead"]), borders)
    context = int(g["single_eval_pos"])
    x, y = jnp.asarray(g["x"].T), jnp.asarray(g["y"].T)
    cut = jnp.full(x.shape[:1], context)
    logits = jax.jit(forward, static_argnums=1)(model.params, model.cfg, x, y, cut)
    expected = np.swapaxes(g["logits"], 0, 1)
    np.testing.assert_allclose(logits[:, context:], expected, atol=1e-4, rtol=0)


def test_normalizer() -> None:
    g = lc_pfn_golden("curve_normalizer")
    count = sum(name.startswith("cfg") for name in g)
    assert count > 0
    for i in range(count):
        *bounds, minimize = g[f"cfg{i}"].tolist()
        normalizer = Normalizer(*bounds, minimize=bool(minimize))
        units = normalizer(g[f"v{i}"])
        np.testing.assert_allclose(units, g[f"n{i}"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(normalizer.inverse(g[f"n{i}"]), g[f"back{i}"], atol=1e-3)


def test_prior_statistics() -> None:
    g = lc_pfn_golden("prior_stats")
    length, at, q = g["example_clean"].shape[1], g["positions"] - 1, g["q"]
    drawn = sample_prior(jax.random.key(0), int(g["n"]), length)
    clean, noisy = np.asarray(drawn.clean, np.float64), np.asarray(drawn.noisy, np.float64)
    central = (q >= 0.05) & (q <= 0.95)

    def near(found: np.ndarray, name: str, atol: float, rtol: float = 0.0) -> None:
        expected = g[name][central] if "quantiles" in name else g[name]
        np.testing.assert_allclose(found, expected, atol=atol, rtol=rtol, err_msg=name)

    near(clean[:, at].mean(0), "clean_mean", 0.009)
    near(clean[:, at].std(0), "clean_std", 0.006)
    near(np.quantile(clean[:, at], q[central], axis=0), "clean_quantiles", 0.02)
    near(np.quantile(noisy[:, at], q[central], axis=0), "noisy_quantiles", 0.02)
    noise_std = (noisy - clean).std(1)
    near(np.quantile(noise_std, q[central]), "noise_std_quantiles", 0.0, 0.1)
    near(np.quantile(clean[:, -1] - clean[:, 0], q[central]), "gain_quantiles", 0.02)
    near(np.corrcoef(clean[:, at], rowvar=False), "clean_corr", 0.03)
    near((np.diff(clean) < 0).any(1).mean(), "frac_nonmonotone", 0.02)
    x = jnp.arange(1, length + 1, dtype=jnp.float32)
    candidates = evaluate(draw_parameters(jax.random.key(1), 20_000), x)
    near(np.asarray(accepted(candidates)).mean(), "accept_rate", 0.025)


def test_examples_are_curves_of_the_prior() -> None:
    g = lc_pfn_golden("prior_stats")
    assert np.asarray(accepted(jnp.asarray(g["example_clean"]))).all()


def _compare(g: dict[str, np.ndarray], rows: np.ndarray, mean: np.ndarray, ess: np.ndarray) -> None:
    """Means within four standard errors of both sides."""
    error = np.sqrt(1 / g["ess"] + 1 / ess)[rows, None]
    np.testing.assert_array_less(
        np.abs(mean - g["post_mean"])[rows], 4 * g["post_std"][rows] * error
    )


@pytest.mark.parametrize(
    "draws", [200_000, pytest.param(5_000_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_importance_posterior(draws: int) -> None:
    g = lc_pfn_golden("posterior_reference")
    found = importance_posterior(
        jax.random.key(0),
        g["context"],
        g["targets"].tolist(),
        g["q"].tolist(),
        g["y_target"],
        draws=draws,
    )
    rows = (g["ess"] > 500) & (found.ess > 40)
    assert rows.sum() >= 3
    _compare(g, rows, found.mean, found.ess)
    assert found.log_density is not None
    # Few draws make a density in a tail, so that its error is much larger than the mean's.
    apart = np.abs(found.log_density - g["log_pred_density"])[rows]
    assert np.median(apart) < (0.05 if draws > 1_000_000 else 0.15), apart
    rows = (g["ess"] > 1000) & (found.ess > 1000)
    assert rows.any() and (draws < 5_000_000 or rows.sum() >= 4)
    apart = np.abs(found.quantiles - g["post_quantiles"]) / g["post_std"][..., None]
    assert apart[rows].max() < 0.25
    np.testing.assert_allclose(found.std[rows], g["post_std"][rows], rtol=0.1)


@pytest.mark.slow
def test_mcmc_posterior() -> None:
    g = lc_pfn_golden("posterior_reference")
    rows = np.flatnonzero(g["ess"] > 1000)
    found = mcmc_posterior(
        jax.random.key(0),
        g["context"][rows],
        g["targets"].tolist(),
        g["q"].tolist(),
        walkers=100,
        steps=12_000,  # after 4,000 a context of three points is still 0.4 standard deviations off
        burn_in=3000,
    )
    apart = np.abs(found.mean - g["post_mean"][rows]) / g["post_std"][rows]
    assert apart.max() < 0.3, apart
    np.testing.assert_allclose(found.std, g["post_std"][rows], rtol=0.2)
