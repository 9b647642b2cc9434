"""What SeqPE's encoder is trained on: candidates, distilled windows, shifted windows, losses."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import seqpe
from models.params import init
from research.context.seqpe import objective, samplers
from research.context.seqpe.objective import Weights, encoder_pass, transfer_loss
from research.context.seqpe.samplers import Sampling

LINE = seqpe.Config(width=16, heads=2, axis_length=600, layers=1, dropout=0.0)
PLANE = dataclasses.replace(LINE, axis_length=40, axes=2)
SMALL = Sampling(candidates=12, spread=40, transfer_points=6)
WINDOW = {LINE: (16,), PLANE: (3, 4)}
BOTH = pytest.mark.parametrize("cfg", [LINE, PLANE], ids=["line", "plane"])


def pivots(cfg: seqpe.Config, count: int = 200) -> np.ndarray:
    """Positions all over, with the corners."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, cfg.axis_length, (count, cfg.axes))
    drawn[0], drawn[1] = 0, cfg.axis_length - 1
    return drawn.astype(np.int32)


@functools.cache
def candidates(cfg: seqpe.Config, hard_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and labels of 200 pivots, all special ones of one kind if the rate is 0 or 1."""
    sampling = Sampling(12, hard_rate=hard_rate, hard_share=0.5, spread=40)
    draw = jax.jit(samplers.sample_contrastive, static_argnums=(1, 2))
    found = draw(jax.random.key(0), cfg, sampling, pivots(cfg))
    return np.asarray(found.positions), np.asarray(found.labels)


@pytest.mark.parametrize(
    ("cfg", "hard_rate"), [(LINE, 0.0), (LINE, 0.4), (LINE, 1.0), (PLANE, 0.0), (PLANE, 1.0)]
)
def test_candidates_keep_the_rules(cfg: seqpe.Config, hard_rate: float):
    """N of them, distinct, without the pivot, in range; the label is the first of the nearest."""
    found, labels = candidates(cfg, hard_rate)
    assert found.shape == (200, 12, cfg.axes)
    assert found.min() >= 0 and found.max() < cfg.axis_length
    for pivot, row, label in zip(pivots(cfg), found, labels, strict=True):
        assert len({tuple(p) for p in [*row.tolist(), pivot.tolist()]}) == 13
        apart = np.sum((row.astype(int) - pivot) ** 2, axis=1)
        assert apart[label] == apart.min() and label == np.argmin(apart)


@BOTH
def test_special_candidates_come_from_a_small_range(cfg: seqpe.Config):
    """All but at most one, where the range held the pivot."""
    side = Sampling(12, spread=40).side(cfg)
    assert side == {1: 60, 2: 7}[cfg.axes]  # of max(40, 5 * 12) positions
    found, _ = candidates(cfg, 0.0)
    starts = set()
    for row in found:
        width = np.sort(row, axis=0)[-2] - np.sort(row, axis=0)[1]
        assert (width < side).all()
        starts.add(tuple(row.min(0).tolist()))
    assert len(starts) > 50  # each pivot has a range of its own


def test_edits_lie_beyond_the_nearest_uniform_candidate():
    """So hard candidates are hardly ever the answer."""
    _, labels = candidates(LINE, 1.0)
    found, _ = candidates(LINE, 1.0)
    uniform, _ = candidates(LINE, 0.0)
    likeness = [
        np.mean([bool(set(str(c)) & set(str(p))) for p, row in zip(pivots(LINE), x, strict=True)
                 for c in row[:4, 0]])
        for x in (found, uniform)
    ]  # fmt: skip
    assert likeness[0] > likeness[1] + 0.1  # edits share digits with their pivot
    assert np.mean(labels < 3) < 0.25


def brute_edits(number: int, limit: int) -> dict[int, float]:
    """Every successful edit of a number's string, with the chance that it is drawn."""
    text, found = str(number), {}

    def add(new: str, chance: float) -> None:
        good = new and (new == "0" or new[0] != "0") and int(new) < limit and int(new) != number
        if good:
            found[int(new)] = found.get(int(new), 0.0) + chance / 4

    n, pairs = len(text), math.comb(len(text), 2)
    for digit in "0123456789":
        for i in range(n + 1):
            add(text[:i] + digit + text[i:], 1 / (10 * (n + 1)))
        for i in range(n):
            add(text[:i] + digit + text[i + 1 :], 1 / (10 * n))
    for i in range(n):
        add(text[:i] + text[i + 1 :], 1 / n)
        for j in range(i + 1, n):
            add(text[:i] + text[j] + text[i + 1 : j] + text[i] + text[j + 1 :], 1 / pairs)
    return found


@pytest.mark.parametrize("limit", [600, 4096, 2])
def test_edits_are_those_of_the_digits_as_a_string(limit: int):
    numbers = np.asarray([n for n in (0, 1, 7, 10, 33, 39, 100, 501, 599, 1230, 4095) if n < limit])
    places = len(str(limit - 1))
    edits_of = jax.jit(samplers.edits_of, static_argnums=(1, 2))
    values, chances = edits_of(jnp.asarray(numbers, jnp.int32), places, limit)
    for number, row, odds in zip(numbers, np.asarray(values), np.asarray(chances), strict=True):
        wanted = brute_edits(int(number), limit)
        found: dict[int, float] = {}
        for value, chance in zip(row.tolist(), odds.tolist(), strict=True):
            if chance > 0:
                found[value] = found.get(value, 0.0) + chance
        assert found.keys() == wanted.keys() and wanted
        np.testing.assert_allclose([found[v] for v in wanted], list(wanted.values()), rtol=1e-5)


edited = jax.jit(samplers.edit_digits, static_argnums=1)


def test_edits_are_drawn_by_their_chances():
    number = jnp.full((4000, 1), 57, jnp.int32)
    drawn = edited(jax.random.key(0), LINE, number)[:, 0]
    chances = brute_edits(57, 600)
    shares = np.bincount(np.asarray(drawn), minlength=600) / 4000
    assert set(np.flatnonzero(shares)) == set(chances)
    total = sum(chances.values())
    for value in (5, 7, 75):  # the likeliest: deletions and the swap
        assert shares[value] == pytest.approx(chances[value] / total, rel=0.15)


def test_an_edit_changes_one_axis():
    start = jnp.full((50, 2), 23, jnp.int32)
    changed = np.asarray(edited(jax.random.key(0), PLANE, start)) != 23
    assert (changed.sum(1) == 1).all() and changed.any(0).all()


# Windows.
@BOTH
def test_distilled_windows_lie_beyond_the_main_one(cfg: seqpe.Config):
    window = WINDOW[cfg]
    draw = jax.jit(samplers.sample_transfer, static_argnums=(1, 2, 3, 4))
    corners, offsets = (np.asarray(x) for x in draw(jax.random.key(0), cfg, SMALL, window, 3000))
    assert corners.min() >= 0 and (corners < np.asarray(cfg.axis_length) - window).all()
    assert all(len(set(row)) == 6 for row in offsets[:50].tolist())
    assert offsets.min() == 0 and offsets.max() == math.prod(window) - 1
    if cfg.axes == 1:
        assert corners.min() == 16 // 4 and corners.max() == 600 - 16 - 1
        return
    outside = (corners >= np.asarray(window)).any(1)
    assert outside.all()
    # Uniform over all such corners: beside the window in one direction as often as their share.
    rows, columns = 40 - 3, 40 - 4
    share = 3 * (columns - 4) / (rows * columns - 3 * 4)
    assert np.mean(corners[:, 0] < 3) == pytest.approx(share, rel=0.2)


@BOTH
def test_shifted_windows_lie_anywhere(cfg: seqpe.Config):
    window = WINDOW[cfg]
    draw = jax.jit(samplers.sample_shift, static_argnums=(1, 2, 3))
    corners = np.asarray(draw(jax.random.key(0), cfg, window, 4000))
    assert corners.min() == 0
    assert (corners.max(0) == np.asarray(cfg.axis_length) - window).all()
    positions = np.asarray(samplers.window_positions(jnp.asarray(corners[:2]), window))
    assert positions.shape == (2, math.prod(window), cfg.axes)
    np.testing.assert_array_equal(positions[1, 0], corners[1])
    np.testing.assert_array_equal(positions[1, -1], corners[1] + np.asarray(window) - 1)
    if cfg.axes == 2:  # the column is the faster one
        np.testing.assert_array_equal(positions[1, 1], corners[1] + [0, 1])


@pytest.mark.parametrize(
    ("sampling", "window", "message"),
    [
        (Sampling(12), (600,), "no windows of .* raise axis_length"),
        (Sampling(700), (16,), "there are not 700 candidates"),
        (Sampling(12, transfer_points=17), (16,), "exceed the 16 positions of the main task"),
        (Sampling(12), (4, 4), "for positions of 1 axes"),
    ],
)
def test_draws_that_do_not_exist_are_refused(sampling: Sampling, window, message: str):
    with pytest.raises(ValueError, match=message):
        sampling.check(LINE, window)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="give at least 2, 2 and 1"):
        Sampling(candidates=1)
    with pytest.raises(ValueError, match="give 0 to 1"):
        Sampling(shift_rate=1.5)
    with pytest.raises(ValueError, match="give up to 32767"):
        Sampling(4).check(seqpe.Config(16, 2, 40_000, axes=2), (3, 4))
    for wrong in ({"measure": "cosine"}, {"beta": 2.0}):
        with pytest.raises(ValueError, match="give kl or mse and a share"):
            Weights(**wrong)


# Losses.
def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_transfer_loss_is_0_for_rotated_heads():
    """Gram matrices do not see an orthogonal transform of each head."""
    teacher = normal(0, 2, 5, 12)
    turns = [jnp.linalg.qr(normal(i, 4, 4))[0] for i in range(3)]
    student = jnp.concatenate(
        [part @ turn for part, turn in zip(jnp.split(teacher, 3, -1), turns, strict=True)], -1
    )
    for measure in objective.MEASURES:
        assert abs(transfer_loss(teacher, student, 3, measure=measure)) < 1e-6
        assert transfer_loss(teacher, normal(7, 2, 5, 12), 3, measure=measure) > 1e-2
    mixed = teacher @ jnp.linalg.qr(normal(9, 12, 12))[0]  # turned across heads
    assert transfer_loss(teacher, mixed, 3) > 1e-2 and abs(transfer_loss(teacher, mixed, 1)) < 1e-6


def test_the_transfer_loss_is_a_mean_over_all_elements():
    teacher, student = normal(0, 2, 5, 12), normal(1, 2, 5, 12)

    def softmax(x: jax.Array) -> np.ndarray:
        heads = np.asarray(x, np.float64).reshape(2, 5, 3, 4)
        gram = np.einsum("bnhd,bmhd->bhnm", heads, heads)
        weights = np.exp(gram - gram.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    total = np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))
    np.testing.assert_allclose(transfer_loss(teacher, student, 3), total / (2 * 3 * 25), rtol=1e-4)
    squares = np.mean((np.log(p) - np.log(q)) ** 2)
    found = transfer_loss(teacher, student, 3, measure="mse")
    np.testing.assert_allclose(found, squares, rtol=1e-4)


@pytest.mark.parametrize("measure", objective.MEASURES)
def test_beta_says_where_the_gradient_goes(measure: str):
    teacher, student = normal(0, 1, 4, 8), normal(1, 1, 4, 8)

    def slopes(beta: float):
        return jax.value_and_grad(transfer_loss, (0, 1))(teacher, student, 2, beta, measure)

    (full, (to_teacher, to_student)), (half, split) = slopes(1.0), slopes(0.25)
    np.testing.assert_array_equal(to_teacher, jnp.zeros_like(teacher))
    np.testing.assert_allclose(full, half, rtol=1e-6)
    np.testing.assert_allclose(split[1], 0.25 * to_student, atol=1e-6)
    assert jnp.abs(split[0]).max() > 1e-4


# A step's pass.
@functools.cache
def params(cfg: seqpe.Config) -> seqpe.Params:
    """Initial weights, large enough for vectors to differ."""
    return jax.tree.map(lambda x: 10 * x, init(seqpe.specs(cfg), jax.random.key(1)))


def pass_of(cfg: seqpe.Config, weights: seqpe.Params, key: jax.Array) -> objective.Pass:
    """A pass of two rows and eight pivots; every other step is shifted."""
    sampling = dataclasses.replace(SMALL, shift_rate=0.5)
    at = jnp.asarray(pivots(cfg, 8))
    return encoder_pass(weights, cfg, sampling, Weights(), WINDOW[cfg], at, 2, key)


compiled_pass = jax.jit(pass_of, static_argnums=0)


def key_of(shifted: bool) -> jax.Array:
    """A key whose step is shifted, or is not."""
    for number in range(50):
        key = jax.random.key(number)
        if bool(jax.random.bernoulli(jax.random.split(key, 5)[0], 0.5)) == shifted:
            return key
    raise AssertionError("a coin fell on one side 50 times")


@BOTH
def test_steps_in_place_read_the_first_window(cfg: seqpe.Config):
    out = compiled_pass(cfg, params(cfg), key_of(False))
    table = jax.jit(seqpe.extend_table, static_argnums=(1, 2))(params(cfg), cfg, WINDOW[cfg])
    np.testing.assert_allclose(out.window, np.stack([table, table]), atol=1e-4)
    assert out.shifted == 0 and out.transfer > 0
    both = 0.5 * out.contrastive + 0.25 * out.transfer
    np.testing.assert_allclose(out.penalty(Weights(0.5, 0.25)), both, rtol=1e-6)


@BOTH
def test_shifted_steps_read_their_window_and_distil_nothing(cfg: seqpe.Config):
    key = key_of(True)
    out = compiled_pass(cfg, params(cfg), key)
    corners = samplers.sample_shift(jax.random.split(key, 5)[1], cfg, WINDOW[cfg], 2)
    positions = samplers.window_positions(corners, WINDOW[cfg])
    assert (corners[0] != corners[1]).any()
    wanted = jax.jit(seqpe.encode, static_argnums=1)(params(cfg), cfg, positions)
    np.testing.assert_allclose(out.window, wanted, atol=1e-4)
    assert out.shifted == 1 and out.transfer == 0 and out.contrastive > 0


def test_both_losses_move_the_encoder():
    @jax.jit
    def slopes(weights: seqpe.Params, key: jax.Array) -> tuple[seqpe.Params, seqpe.Params]:
        def losses(weights: seqpe.Params) -> tuple[jax.Array, jax.Array]:
            out = pass_of(LINE, weights, key)
            return out.transfer, out.contrastive

        pull = jax.vjp(losses, weights)[1]
        return tuple(
            pull(one)[0] for one in ((jnp.ones(()), jnp.zeros(())), (jnp.zeros(()), jnp.ones(())))
        )

    by_transfer, by_contrast = slopes(params(LINE), key_of(False))
    for found in (by_transfer, by_contrast):
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
        assert jnp.abs(found.out.w).max() > 0
    assert jnp.abs(slopes(params(LINE), key_of(True))[0].out.w).max() == 0
