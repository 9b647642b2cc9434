"""The operator network: its forms agree, its parts do what the formula says, bad input is told."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from models import deeponet, fnn, params
from models.deeponet import DeepONetConfig, Params
from models.pod import at_rows

PLAIN = DeepONetConfig((5, 7, 6), (2, 7, 6), activation="tanh")
SEVERAL = [
    dataclasses.replace(PLAIN, outputs=3, multi_output=mode) for mode in deeponet.MULTI_OUTPUT
]
STACKED = dataclasses.replace(PLAIN, stacked=True)
MODIFIED = dataclasses.replace(
    PLAIN, kind="modified", branch=(5, 7, 7, 7, 6), trunk=(2, 7, 7, 6), outputs=2
)
POD = DeepONetConfig((5, 7, 4), (2,), kind="pod", modes=4, points=3)
FORMS = [
    PLAIN,
    STACKED,
    *SEVERAL,
    dataclasses.replace(STACKED, outputs=3, multi_output="independent"),
    MODIFIED,
    dataclasses.replace(MODIFIED, multi_output="independent"),
    dataclasses.replace(PLAIN, use_bias=False, periods=(0.0, 0.5), multiply_by=1),
    dataclasses.replace(POD, branch=(5, 7, 10), trunk=(2, 7, 6), outputs=2),
    POD,
]
run = {
    name: jax.jit(getattr(deeponet, name), static_argnums=1)
    for name in ("aligned", "cartesian", "batched")
}


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def weights(cfg: DeepONetConfig) -> Params:
    """Random values everywhere, biases and fixed parts too."""
    specs = deeponet.specs(cfg)
    leaves, tree = jax.tree.flatten(specs)
    return tree.unflatten([0.5 * noise(*s.shape, seed=i) for i, s in enumerate(leaves)])


def label(cfg: DeepONetConfig) -> str:
    extra = "-periodic" if cfg.periods else ""
    return f"{cfg.kind}-{cfg.multi_output}-{cfg.outputs}-{cfg.stacked}-{len(cfg.trunk)}{extra}"


@pytest.mark.parametrize("cfg", FORMS, ids=label)
def test_the_forms_agree_and_follow_their_queries(cfg: DeepONetConfig) -> None:
    p, u, y = weights(cfg), noise(4, 5), noise(3, 2)
    whole = run["cartesian"](p, cfg, u, y)
    assert whole.shape == ((4, 3) if cfg.outputs == 1 else (4, 3, cfg.outputs))
    order = np.array([2, 0, 1])
    rows, columns = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    if cfg.kind == "pod":
        expanded = run["aligned"](at_rows(p, columns), cfg, u[rows], y[columns])
        turned = run["cartesian"](at_rows(p, order), cfg, u, y[order])
    else:
        expanded = run["aligned"](p, cfg, u[rows], y[columns])
        own = jnp.broadcast_to(y[None], (4, 3, 2))
        np.testing.assert_allclose(run["batched"](p, cfg, u, own), whole, atol=2e-6)
        turned = run["cartesian"](p, cfg, u, y[order])
    np.testing.assert_allclose(expanded.reshape(whole.shape), whole, atol=2e-6)
    np.testing.assert_allclose(turned, whole[:, order], atol=2e-6)


@pytest.mark.parametrize("cfg", [PLAIN, STACKED, SEVERAL[1]], ids=label)
def test_linear_in_the_branch_output_and_equal_to_the_bias_without(cfg: DeepONetConfig) -> None:
    p, u, y = weights(cfg), noise(4, 5), noise(3, 2)
    p = dataclasses.replace(p, fixed=deeponet.Fixed(jnp.zeros(cfg.outputs), jnp.ones(cfg.outputs)))
    last = p.branch.layers[-1]

    def scaled(factor: float) -> jax.Array:
        layers = (*p.branch.layers[:-1], jax.tree.map(lambda x: factor * x, last))
        return run["cartesian"](dataclasses.replace(p, branch=fnn.Params(layers)), cfg, u, y)

    bias = p.bias[0] if cfg.outputs == 1 else p.bias[None, None]
    np.testing.assert_allclose(scaled(-2.5) - bias, -2.5 * (scaled(1.0) - bias), atol=1e-5)
    np.testing.assert_array_equal(scaled(0.0), jnp.broadcast_to(bias, scaled(0.0).shape))


def test_the_formula_by_hand() -> None:
    """Also the most common mistake: the trunk's last layer is activated, the branch's is not."""
    cfg = dataclasses.replace(PLAIN, activation="relu")
    p, u, y = weights(cfg), np.asarray(noise(4, 5)), np.asarray(noise(4, 2))
    relu = lambda x: np.maximum(x, 0.0)

    def net(layers: Any, x: np.ndarray) -> np.ndarray:
        (a, b), (c, d) = ((np.asarray(layer.w), np.asarray(layer.b)) for layer in layers)
        return relu(x @ a + b[None]) @ c + d[None]

    branch, trunk = net(p.branch.layers, u), relu(net(p.trunk.layers, y))
    assert branch.min() < 0 and np.count_nonzero(trunk) not in (0, trunk.size)
    wanted = np.sum(branch * trunk, axis=1) + float(p.bias[0])
    wanted = float(p.fixed.mean[0]) + float(p.fixed.scale[0]) * wanted
    np.testing.assert_allclose(run["aligned"](p, cfg, u, y), wanted, atol=1e-5)


def test_stacked_copies_of_one_branch() -> None:
    p, u, y = weights(STACKED), noise(4, 5), noise(3, 2)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), p.branch)
    p = dataclasses.replace(p, branch=same, fixed=deeponet.Fixed(jnp.zeros(1), jnp.ones(1)))
    one = fnn.run_layers(jax.tree.map(lambda x: x[0], same).layers, jnp.tanh, u)
    trunk = deeponet.trunk_features(p, STACKED, y)[:, 0].sum(-1)
    np.testing.assert_allclose(
        run["cartesian"](p, STACKED, u, y), one * trunk[None] + p.bias[0], atol=1e-5
    )
    assert params.count(same) == STACKED.width * params.count(fnn.layer_specs((5, 7, 1)))


@pytest.mark.parametrize("cfg", SEVERAL, ids=label)
def test_several_outputs_are_networks_of_one(cfg: DeepONetConfig) -> None:
    """Output c is the single network that has group c of each last layer that has groups."""
    p, u, y = weights(cfg), noise(4, 5), noise(3, 2)
    whole = run["cartesian"](p, cfg, u, y)
    independent = cfg.multi_output == "independent"

    def part(net: fnn.Params, groups: int, c: int) -> fnn.Params:
        if independent:
            return jax.tree.map(lambda x: x[c], net)
        if groups == 1:
            return net
        last = jax.tree.map(lambda x: x[..., 6 * c : 6 * (c + 1)], net.layers[-1])
        return fnn.Params((*net.layers[:-1], last))

    for c in range(3):
        single = Params(
            part(p.branch, cfg.groups[0], c),
            part(p.trunk, cfg.groups[1], c),
            None,
            p.bias[c : c + 1],
            jax.tree.map(lambda x, c=c: x[c : c + 1], p.fixed),
        )
        np.testing.assert_allclose(whole[..., c], run["cartesian"](single, PLAIN, u, y), atol=1e-5)


def test_periodic_coordinates_and_a_hard_zero() -> None:
    cfg = dataclasses.replace(PLAIN, periods=(0.0, 0.5), multiply_by=0)
    p, u, y = weights(cfg), noise(4, 5), noise(4, 2)
    s = run["aligned"](p, cfg, u, y)
    np.testing.assert_allclose(run["aligned"](p, cfg, u, y + jnp.array([[0.0, 1.5]])), s, atol=1e-4)
    assert np.abs(run["aligned"](p, cfg, u, y + jnp.array([[0.0, 0.2]])) - s).max() > 1e-2
    assert np.abs(run["aligned"](p, cfg, u, y + jnp.array([[0.2, 0.0]])) - s).max() > 1e-2
    np.testing.assert_array_equal(run["aligned"](p, cfg, u, y.at[:, 0].set(0.0)), np.zeros(4))
    free = dataclasses.replace(cfg, multiply_by=None)
    np.testing.assert_allclose(s, y[:, 0] * run["aligned"](p, free, u, y), atol=1e-5)


def test_padding_reaches_neither_values_nor_gradients() -> None:
    p, u, y = weights(PLAIN), noise(4, 5), noise(4, 3, 2)
    mask = jnp.asarray([[True, True, False], [True, False, False], [True] * 3, [False] * 3])
    poisoned = jnp.where(mask[..., None], y, jnp.nan)
    s = run["batched"](p, PLAIN, u, poisoned, mask)
    clean = run["batched"](p, PLAIN, u, y)
    np.testing.assert_array_equal(s, np.where(mask, clean, 0.0))
    grads = jax.jit(
        jax.grad(lambda p: jnp.sum(deeponet.batched(p, PLAIN, u, poisoned, mask) ** 2))
    )(p)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("cfg", [PLAIN, MODIFIED], ids=label)
def test_derivatives_equal_differences_in_float64(cfg: DeepONetConfig) -> None:
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        p, u, y = jax.tree.map(wide, weights(cfg)), wide(noise(4, 5)), wide(noise(4, 3, 2))

        @jax.jit
        def found(y: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
            g = deeponet.at_queries(p, cfg, u, "batched")
            first, second = deeponet.partial(g, 0), deeponet.partial(deeponet.partial(g, 0), 1)
            d0, d1 = (jnp.asarray([step, 0.0]), jnp.asarray([0.0, step]))
            at = lambda a, b: g(y + (a * d0 + b * d1)[None, None])
            slope = (at(1, 0) - at(-1, 0)) / (2 * step)
            mixed = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / (4 * step**2)
            return first(y), slope, second(y), mixed

        exact, slope, second, mixed = (np.asarray(x) for x in found(y, jnp.asarray(1e-4)))
    np.testing.assert_allclose(exact, slope, atol=1e-7)
    np.testing.assert_allclose(second, mixed, atol=1e-6)


def count_products(jaxpr: Any, side: int) -> int:
    """How many matrix products of a program have a side of that length, inner programs included."""
    count = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars]
        count += equation.primitive.name == "dot_general" and any(side in s for s in shapes)
        for inner in jaxprs_in_params(equation.params):
            count += count_products(inner, side)
    return count


def test_derivatives_by_y_run_the_branch_once() -> None:
    """Of 11 functions and 3 shared queries only branch products have a side of 11, plus the dot."""
    p, u, y = weights(PLAIN), noise(11, 5), noise(3, 2)

    def residual(p: Params, u: jax.Array, y: jax.Array) -> jax.Array:
        g = deeponet.at_queries(p, PLAIN, u, "cartesian")
        return deeponet.partial(deeponet.partial(g, 0), 0)(y)

    branch = jax.make_jaxpr(lambda p, u: deeponet.branch_features(p, PLAIN, u))(p, u)
    plain = jax.make_jaxpr(lambda p, u, y: deeponet.cartesian(p, PLAIN, u, y))(p, u, y)
    second = jax.make_jaxpr(residual)(p, u, y)
    assert count_products(branch.jaxpr, 11) == 2 and count_products(plain.jaxpr, 11) == 3
    # The value's, the first and the second derivative's dot products may all remain.
    assert count_products(second.jaxpr, 11) <= 2 + 4
    assert count_products(second.jaxpr, 5) == count_products(branch.jaxpr, 5) == 1


def test_sensor_order_and_number_matter() -> None:
    p, u, y = weights(PLAIN), noise(4, 5), noise(4, 2)
    s = run["aligned"](p, PLAIN, u, y)
    assert np.abs(run["aligned"](p, PLAIN, u[:, ::-1], y) - s).max() > 1e-2
    with pytest.raises(ValueError, match="reads 5 sensor values, got 4: interpolate"):
        deeponet.aligned(p, PLAIN, u[:, :4], y)
    with pytest.raises(ValueError, match="a query has 2 coordinates, got 1"):
        deeponet.aligned(p, PLAIN, u, y[:, :1])
    with pytest.raises(ValueError, match="unknown form 'ragged'"):
        deeponet.at_queries(p, PLAIN, u, "ragged")
    with pytest.raises(ValueError, match="basis is known on 3 points and there are 2 queries"):
        deeponet.cartesian(weights(POD), POD, u, noise(2, 2))
    with pytest.raises(ValueError, match="use the cartesian or aligned form"):
        deeponet.batched(weights(POD), POD, u, noise(4, 3, 2))


def test_initial_values() -> None:
    """Glorot's normal weights, zero biases, nothing subtracted or rescaled."""
    cfg = DeepONetConfig((100, 40, 40), (1, 40, 40), outputs=2, stacked=True)
    p = params.init(deeponet.specs(cfg), jax.random.key(0))
    assert p.branch.layers[0].w.shape == (80, 100, 40)
    spread = float(p.branch.layers[0].w.std())
    assert spread == pytest.approx(math.sqrt(2 / 140), rel=0.02)
    assert float(p.branch.layers[1].w.std()) == pytest.approx(math.sqrt(2 / 41), rel=0.05)
    assert not np.any(p.bias) and not any(np.any(layer.b) for layer in p.trunk.layers)
    assert np.all(p.fixed.scale == 1) and not np.any(p.fixed.mean) and p.fixed.basis is None
    assert deeponet.specs(dataclasses.replace(cfg, use_bias=False)).bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": (5, 7, 8)}, "ends in 8 values, the trunk and basis give 6"),
        ({"branch": (5,)}, "branch is"),
        ({"trunk": (2,)}, "trunk is"),
        ({"trunk": ()}, "trunk is"),
        ({"outputs": 0}, "one output or more"),
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"kind": "fourier"}, "unknown kind 'fourier'"),
        ({"multi_output": "split"}, "unknown multi_output 'split'"),
        ({"kind": "pod"}, "kind='pod' needs both"),
        ({"modes": 2, "points": 9}, "the others neither"),
        ({"kind": "modified", "stacked": True}, "stacked=False"),
        ({"kind": "modified", "branch": (5, 8, 6)}, "equal width"),
        ({"kind": "modified", "branch": (5, 6), "trunk": (2, 6)}, "a hidden layer or more"),
        ({"periods": (1.0,)}, "one for each of 2 coordinates"),
        ({"multiply_by": 2}, "coordinates are 0..1"),
    ],
)
def test_bad_configs_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_the_baseline_network_reads_its_width_only() -> None:
    cfg = fnn.FNNConfig((3, 4, 2), "sin")
    p = params.init(fnn.specs(cfg), jax.random.key(0))
    x = noise(5, 3)
    (a, b), (c, d) = ((layer.w, layer.b) for layer in p.layers)
    wanted = np.sin(x @ a + b[None]) @ c + d[None]
    np.testing.assert_allclose(fnn.forward(p, cfg, x), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="reads 3 values, got 2"):
        fnn.forward(p, cfg, x[:, :2])
    with pytest.raises(ValueError, match="widths is"):
        fnn.FNNConfig((3,))
