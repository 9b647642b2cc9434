import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ops.block_sparse import attended, block_sparse_attention
from ops.dual_chunk import dual_chunk_attention
from ops.vertical_slash import geometry, raised, select, vertical_slash_plan
from ops.vertical_slash.estimate import column_and_diagonal_mass
from ops.vertical_slash.select import keep_columns, keep_diagonals

HEADS, GROUPS, WIDTH, S = 4, 2, 8, 640


def tensors(b: int, t: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    q, critical = (rng.normal(size=(3, b, t, HEADS, WIDTH)).astype(np.float32) for _ in "qc")
    k, v = (rng.normal(size=(b, S, GROUPS, WIDTH)).astype(np.float32) for _ in "kv")
    return tuple(map(jnp.asarray, (q, critical, k, v)))


@functools.cache
def planner(stride: int, most: tuple[int, int]):
    return jax.jit(functools.partial(vertical_slash_plan, stride=stride, most=most))


def budgets(*values: int) -> jnp.ndarray:
    return jnp.asarray([values], jnp.int32)


@pytest.mark.parametrize("stride", [160, 96])
def test_mass_is_the_softmax_summed_down_columns_and_along_diagonals(stride):
    _, critical, k, _ = tensors(2, 64)
    first = np.array([stride * 2, 3])
    at = first[:, None] + np.arange(64)
    valid = np.ones((2, 64), bool)
    valid[1, :20] = False
    got = column_and_diagonal_mass(
        critical, k, jnp.asarray(at), jnp.asarray(valid), stride=stride, scale=0.7
    )
    keys = np.repeat(np.float64(k), HEADS // GROUPS, axis=2)
    apart = np.clip(at[:, :, None] // stride - np.arange(S) // stride, 0, 2)
    scores = np.einsum("xbthd,bshd->xbhts", np.float64(critical), keys) * 0.7
    scores = np.take_along_axis(scores, apart[None, :, None], axis=0)[0]
    weights = np.where((np.arange(S) <= at[:, :, None])[:, None], np.exp(scores), 0)
    weights = weights / weights.sum(-1, keepdims=True) * valid[:, None, :, None]
    np.testing.assert_allclose(got[0], weights.sum(2), atol=1e-5)
    diagonals = np.zeros((2, HEADS, S))
    for i in range(64):
        shift = 63 - i
        diagonals[:, :, shift:] += weights[:, :, i, : S - shift]
    np.testing.assert_allclose(got[1], diagonals, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_that_hold_shares_agree_on_the_mass_of_the_whole(devices):
    """The row's end, and the diagonals that cross from one share to the next, among them."""
    _, critical, k, _ = tensors(2, 64)
    at = jnp.asarray(np.array([320, 3])[:, None] + np.arange(64))
    valid = jnp.asarray(np.arange(64)[None] >= np.array([[0], [20]]))
    settings = {"stride": 160, "scale": 0.7}
    whole = column_and_diagonal_mass(critical, k, at, valid, **settings)
    mesh = jax.make_mesh((devices,), ("slots",), (jax.sharding.AxisType.Auto,))
    shares = jax.shard_map(
        functools.partial(column_and_diagonal_mass, axis="slots", **settings),
        mesh=mesh,
        in_specs=(P(), P(None, "slots"), P(), P()),
        out_specs=P(),
        check_vma=False,
    )
    for got, want in zip(jax.jit(shares)(critical, k, at, valid), whole, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_mass_takes_the_memory_of_one_head():
    def temporaries(heads: int) -> int:
        shapes = ((3, 1, 64, heads, WIDTH), (1, 16 * S, heads // 2, WIDTH))
        q, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        at, valid = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1, 64), bool)
        run = jax.jit(functools.partial(column_and_diagonal_mass, stride=160, scale=1.0))
        memory = run.lower(q, k, at, valid).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    scores = 4 * 64 * 16 * S
    assert temporaries(32) - temporaries(2) < 2 * scores


@pytest.mark.parametrize("most", [40, 1000])
def test_kept_are_the_first_of_a_stable_sort(most):
    """Many masses are equal, among them the smallest that is kept."""
    rng = np.random.default_rng(0)
    mass = rng.integers(0, 6, (3, HEADS, S)) / 8
    budget, end = np.array([1, 31, 150, 700]), np.array([S, 333, 1])
    slots = np.arange(S)
    given = jnp.asarray(mass, jnp.float32), jnp.asarray(budget[None]), jnp.asarray(end), most
    columns, diagonals = np.asarray(keep_columns(*given)), np.asarray(keep_diagonals(*given))
    assert columns.shape[-1] == min(most, S)
    for row, head in np.ndindex(3, HEADS):
        count = min(budget[head], end[row], most)
        distance = end[row] - 1 - slots
        for always, got in (
            (np.where(slots < 30, 100 - slots, 0), columns[row, head]),
            (np.where(distance < 100, 200 - distance, 0), np.flatnonzero(diagonals[row, head])),
        ):
            order = np.argsort(-(mass[row, head] + always)[: end[row]], kind="stable")
            want = np.sort(order[:count])
            np.testing.assert_array_equal(got[: len(want)], want)
            assert np.all(got[len(want) :] == S)


@functools.cache
def selector(stride: int, most: tuple[int, int]):
    def run(critical, k, first, counts, vertical, slash):
        where = geometry(first, counts, stride)
        return select(critical, k, where, vertical, slash, stride=stride, most=most)

    return jax.jit(run)


def test_budgets_are_kept_and_the_sink_and_the_nearest_are_among_them():
    _, critical, k, _ = tensors(2, 150)
    chosen = selector(160, (700, 700))(
        critical, k, jnp.asarray([320, 0]), jnp.asarray([150, 150]),
        budgets(1, 30, 40, 700), budgets(1, 110, 200, 700),
    )  # fmt: skip
    for row, end in ((0, 470), (1, 150)):
        diagonals = np.asarray(chosen.diagonals[row].any(axis=1))
        for head, (v, s) in enumerate(((1, 1), (130, 110), (40, 200), (700, 700))):
            columns = np.asarray(chosen.columns[row, head])
            columns = columns[columns < S]
            # Segments that one column or diagonal leaves empty get five.
            stand_ins = 10 if row == 0 and v == 1 else 0
            assert len(columns) == min(v, end) + stand_ins
            assert np.all(np.isin(np.arange(min(v, 30)), columns))
            kept = np.flatnonzero(diagonals[head])
            # The farther segment's stand-ins begin where the nearer one's own lie.
            assert min(s, end) <= len(kept) <= min(s, end) + stand_ins
            assert np.all(np.isin(end - 1 - np.arange(min(s, 100, end)), kept))
            assert kept.max() == end - 1


def test_thirty_columns_mean_more():
    np.testing.assert_array_equal(raised(jnp.asarray([29, 30, 31])), [29, 130, 31])


def test_keys_behind_the_text_change_nothing():
    _, critical, k, _ = tensors(2, 150)
    first, counts = jnp.asarray([320, 160]), jnp.asarray([150, 40])
    plan = planner(160, (50, 150))
    given = (first, counts, budgets(40, 50, 3, 20), budgets(100, 150, 3, 60))
    want = plan(critical, k, *given)
    behind = jnp.arange(S)[None] >= (first + counts)[:, None]
    got = plan(critical, jnp.where(behind[..., None, None], jnp.nan, k), *given)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_row_gets_what_it_gets_alone():
    _, critical, k, _ = tensors(3, 150)
    first, counts = jnp.asarray([320, 160, 480]), jnp.asarray([150, 40, 97])
    heads = budgets(40, 50, 3, 20), budgets(100, 150, 3, 60)
    both = planner(160, (50, 150))(critical, k, first, counts, *heads)
    one = slice(2, 3)
    alone = planner(160, (50, 150))(critical[:, one], k[one], first[one], counts[one], *heads)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[one], b), both, alone)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_full_budgets_are_dense_attention(implementation):
    q, critical, k, v = tensors(2, 150)
    first, counts = jnp.asarray([320, 0]), jnp.asarray([150, 150])
    full = budgets(S, S, S, S)
    plan = planner(160, (S, S))(critical, k, first, counts, full, full)
    at = first[:, None] + jnp.arange(150)[None]
    got = block_sparse_attention(q, k, v, at, plan, stride=160, implementation=implementation)
    for ours, want in zip(got, dual_chunk_attention(q, k, v, at, stride=160), strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-6)


def test_recall_is_a_share_and_grows_with_what_is_kept():
    q, critical, k, v = tensors(1, 150)
    first, counts = jnp.asarray([320]), jnp.asarray([150])
    at = first[:, None] + jnp.arange(150)[None]
    dense = dual_chunk_attention(q, k, v, at, stride=160)[1]
    run = jax.jit(functools.partial(block_sparse_attention, stride=160))
    before, kept = np.zeros((1, 150, HEADS)), np.zeros((1, HEADS, 150, S), bool)
    for size in (1, 3, 9, S):
        one = budgets(*[size] * 4)
        plan = planner(160, (S, S))(critical, k, first, counts, one, one)
        mask = np.asarray(attended(plan, at, S))
        share = np.exp(np.asarray(run(q, k, v, at, plan)[1] - dense))
        assert np.all(share > 0) and np.all(share <= 1 + 1e-5)
        grown = np.swapaxes(np.all(mask | ~kept, axis=3), 1, 2)
        assert np.all(share[grown] >= before[grown] - 1e-5) and grown.mean() > 0.2
        assert share.mean() > np.mean(before)
        before, kept = share, mask


def test_other_budgets_are_the_same_program():
    _, critical, k, _ = tensors(1, 150)
    plan = planner(160, (50, 150))
    given = critical, k, jnp.asarray([320]), jnp.asarray([150])
    plan(*given, budgets(1, 2, 3, 4), budgets(1, 2, 3, 4))
    before = plan._cache_size()
    plan(*given, budgets(50, 20, 30, 40), budgets(150, 20, 3, 40))
    assert plan._cache_size() == before


@pytest.mark.parametrize("changes", [{"stride": 0}, {"most": (0, 5)}, {"most": (5, 0)}])
def test_what_it_is_not_defined_for_is_refused(changes):
    _, critical, k, _ = tensors(1, 64)
    one = budgets(1, 1, 1, 1)
    settings: dict[str, Any] = {"stride": 64, "most": (5, 5)} | changes
    with pytest.raises(ValueError, match="bounds of 1 or more"):
        vertical_slash_plan(critical, k, jnp.asarray([0]), jnp.asarray([64]), one, one, **settings)
