import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.cache import Cache, check_capacity, init_cache, slot_bytes
from inference.drafter import NoDrafter
from inference.loop import decode_rounds
from models import decoder
from models.positions import RopeScaling
from ops.sampling import SamplingParams
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import NEW, config, engine, prompts

DYNAMIC = RopeScaling("dynamic", factor=4.0, original_max_position=8)


def filled(length: list[int], scratch: list[int], capacity: int = 12) -> Cache:
    """A cache whose slot s of row b holds 100 b + s everywhere, at position 2 s."""
    cache = init_cache(config(), len(length), capacity)
    mark = 100.0 * np.arange(len(length))[:, None] + np.arange(capacity)[None]

    def fill(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(mark, jnp.float32)[:, None, :, None], x.shape)

    return cache.replace(
        layers=jax.tree.map(fill, cache.layers),
        positions=jnp.broadcast_to(2 * jnp.arange(capacity)[None], cache.positions.shape),
        length=jnp.asarray(length, jnp.int32),
        scratch=jnp.asarray(scratch, jnp.int32),
        next_position=2 * jnp.asarray(length, jnp.int32),
    )


def slots(cache: Cache, row: int) -> np.ndarray:
    """One number per slot of a row, after checking that all layers, heads and widths agree."""
    leaves = [np.asarray(leaf)[row] for leaf in jax.tree.leaves(cache.layers)]
    first = leaves[0][0, :, 0]
    for leaf in leaves:
        np.testing.assert_array_equal(leaf, np.broadcast_to(first[None, :, None], leaf.shape))
    return first


def test_commit_gathers_the_path_and_drops_the_rest():
    cache = filled([3, 5], [6, 6])
    after = cache.commit(jnp.asarray([[0, 2, 5, -1], [0, 1, -1, -1]]), jnp.asarray([3, 0]))
    np.testing.assert_array_equal(slots(after, 0)[:6], [0, 1, 2, 3, 5, 8])
    np.testing.assert_array_equal(slots(after, 1)[:5], 100 + np.arange(5))
    np.testing.assert_array_equal(after.positions[0, :6], [0, 2, 4, 6, 10, 16])
    np.testing.assert_array_equal(after.length, [6, 5])
    np.testing.assert_array_equal(after.scratch, [0, 0])
    # One past the last kept entry; a row that kept nothing stays where it was.
    np.testing.assert_array_equal(after.next_position, [17, 10])


def test_commit_without_a_path_keeps_the_first_entries_as_they_lie():
    cache = filled([3, 5], [4, 4])
    plain = cache.commit(None, jnp.asarray([2, 4]))
    path = cache.commit(jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3]]), jnp.asarray([2, 4]))
    jax.tree.map(np.testing.assert_array_equal, plain, path)
    np.testing.assert_array_equal(plain.length, [5, 9])


def test_append_and_rollback_move_only_the_scratch():
    cache, start = filled([3, 5], [0, 0]).append_scratch(jnp.asarray([[7, 8], [9, 11]]))
    np.testing.assert_array_equal(start, [3, 5])
    np.testing.assert_array_equal(cache.positions[0, 3:5], [7, 8])
    np.testing.assert_array_equal(cache.positions[1, 5:7], [9, 11])
    back = cache.rollback(jnp.asarray([1, 5]))
    np.testing.assert_array_equal(back.scratch, [1, 2])
    np.testing.assert_array_equal(back.length, [3, 5])
    again, start = back.append_scratch(jnp.asarray([[8], [12]]))
    np.testing.assert_array_equal(start, [4, 7])
    np.testing.assert_array_equal(again.scratch, [2, 3])


@pytest.mark.parametrize("batch", [1, 3])
def test_layer_append_read_and_write(batch):
    layer = init_cache(config(), batch, 8).layers[0]
    new = jax.random.normal(jax.random.key(0), (batch, 2, 2, 8))
    start = jnp.arange(batch, dtype=jnp.int32) + 1
    appended = layer.append(new, -new, start)
    k, v = appended.read(6)
    assert k.shape == (batch, 6, 2, 8)
    want = np.zeros(k.shape, np.float32)
    for row in range(batch):
        want[row, row + 1 : row + 3] = new[row]
    np.testing.assert_array_equal(k, want)
    np.testing.assert_array_equal(v, -want)
    # The same entries written slot by slot, in another order.
    order = jnp.broadcast_to(jnp.asarray([[1, 0]]), (batch, 2))
    chosen = jnp.take_along_axis(new, order[:, :, None, None], axis=1)
    written = layer.write(start[:, None] + order, chosen, -chosen)
    jax.tree.map(np.testing.assert_array_equal, written, appended)


def test_rows_can_be_taken_out_and_put_back():
    cache = filled([3, 5, 7], [1, 2, 3])
    taken = cache.take_rows(jnp.asarray([2, 0]))
    np.testing.assert_array_equal(taken.length, [7, 3])
    np.testing.assert_array_equal(slots(taken, 0), slots(cache, 2))
    swapped = cache.put_rows(jnp.asarray([0, 2]), taken)
    np.testing.assert_array_equal(swapped.length, [7, 5, 3])
    np.testing.assert_array_equal(slots(swapped, 2), slots(cache, 0))
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(taken))


def test_bytes_are_counted():
    cache = filled([3, 5], [0, 0])
    per_slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    assert cache.nbytes == 2 * 12 * per_slot + 2 * 12 * 4 + 3 * 2 * 4
    assert int(cache.used_bytes()) == 8 * per_slot and cache.slot_bytes == per_slot


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_a_tokens_bytes_are_those_of_the_cache_that_would_hold_it(dtype, size):
    cfg = config(num_layers=3)
    for width in (None, 24):  # keys may be wider than values
        made = init_cache(cfg, 2, 5, dtype, width)
        held = sum(x.size * size for x in jax.tree.leaves(made.layers))
        assert slot_bytes(cfg, dtype, width) == held / 10
        assert slot_bytes(cfg, dtype, width) == 3 * 2 * ((width or 8) + 8) * size


def test_too_small_a_cache_is_refused():
    with pytest.raises(ValueError, match="needs 13 cache slots but there are 12"):
        check_capacity(13, 12, "the prompt")


def poisoned(cache: Cache, seed: int) -> Cache:
    """Every slot beyond the committed ones made harmful: NaN keys, values of 1e4, any position."""
    rng = np.random.default_rng(seed)
    stale = np.arange(cache.capacity)[None] >= np.asarray(cache.length)[:, None]

    def spoil(leaf: jax.Array, bad: np.ndarray) -> jax.Array:
        return jnp.where(stale[:, None, :, None], jnp.asarray(bad, leaf.dtype), leaf)

    layers = []
    for layer in cache.layers:
        sign = rng.choice([-1e4, 1e4], layer.v.shape)
        layers.append(
            layer.replace(k=spoil(layer.k, np.full(layer.k.shape, np.nan)), v=spoil(layer.v, sign))
        )
    anywhere = rng.integers(0, 1000, cache.positions.shape)
    positions = jnp.where(stale, jnp.asarray(anywhere, jnp.int32), cache.positions)
    return cache.replace(layers=tuple(layers), positions=positions)


@pytest.mark.parametrize("drafter", [NoDrafter(), TokenRecycling()], ids=["plain", "tree"])
@pytest.mark.parametrize("rope", [RopeScaling(), DYNAMIC], ids=["rotated", "raw"])
def test_stale_slots_change_nothing_by_a_bit(drafter, rope):
    cfg = config(rope=rope)
    eng, greedy = engine(cfg, drafter=drafter), SamplingParams.make()
    policy, eos = decoder.default_policy(cfg), jnp.zeros((0,), jnp.int32)

    def decode(spoil: bool):
        state, seeds = eng.start(prompts(), NEW, greedy)
        for round_number in range(NEW):
            if spoil:
                state = state.replace(cache=poisoned(state.cache, round_number))
            state = decode_rounds(
                eng.params, cfg, policy, drafter, None, state, seeds, greedy, eos,
                jnp.asarray(1, jnp.int32), extent=128,
            )  # fmt: skip
        return state

    clean, spoilt = decode(False), decode(True)
    assert bool(clean.done.all())
    np.testing.assert_array_equal(clean.length, spoilt.length)
    for row, length in enumerate(np.asarray(clean.cache.length)):
        np.testing.assert_array_equal(
            clean.tokens[row, : length + 1], spoilt.tokens[row, : length + 1]
        )
        for a, b in zip(
            jax.tree.leaves(clean.cache.layers), jax.tree.leaves(spoilt.cache.layers), strict=True
        ):
            np.testing.assert_array_equal(a[row, :, :length], b[row, :, :length])
