"""DEL's statistics and choices against a trace of the official class, and its table."""

import jax
import jax.numpy as jnp
import numpy as np

from research.speculative.del_exit.statistics import (
    acceptance,
    average_confidence,
    choose_exit,
    no_statistics,
    tpl_table,
    update_statistics,
)
from tests.goldens import golden


def test_the_table_of_tokens_per_layer():
    data = golden("del_exit", "tpl_table")
    layers, gammas = int(data["num_layers"]), int(data["gamma_max"])
    alpha = jnp.asarray(data["alpha"])
    np.testing.assert_allclose(tpl_table(alpha, layers, gammas), data["tpl"], atol=1e-6)
    found = choose_exit(alpha, layers, gammas)
    assert [int(x) for x in found] == [int(data["best_exit_layer"]), int(data["best_gamma"])]


def test_the_trace_of_rounds():
    data = golden("del_exit", "trace")
    layers, gammas, omega = int(data["num_layers"]), int(data["gamma_max"]), float(data["omega"])
    statistics = no_statistics(layers)
    update = jax.jit(update_statistics)
    choose = jax.jit(choose_exit, static_argnums=(1, 2))
    columns = np.arange(data["shadow_tokens"].shape[2])
    for r, count in enumerate(data["num_tokens"]):
        statistics = update(
            statistics,
            jnp.asarray(data["shadow_tokens"][r]),
            jnp.asarray(data["shadow_confidence"][r]),
            jnp.asarray(columns < count),
            jnp.asarray(data["context_length"][r]),
            jnp.asarray(data["exit_layer"][r]),
            jnp.asarray(data["gamma_before_round"][r] > 0),
            omega,
        )
        np.testing.assert_allclose(statistics.counts, data["match_counts"][r], atol=1e-4)
        np.testing.assert_allclose(statistics.confidences, data["confidence_sums"][r], atol=1e-4)
        np.testing.assert_allclose(
            average_confidence(statistics), data["average_confidence"][r], atol=1e-4
        )
        exit_layer, gamma = choose(acceptance(statistics), layers, gammas)
        assert int(exit_layer) == data["next_exit_layer"][r]
        assert int(gamma) == data["next_gamma"][r]
