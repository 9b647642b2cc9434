"""Runs of slots are written and read alike whether one device or four have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.slots import take_slots, write_run, write_slots
from models.sharding import make_mesh

SLOTS = 32


def buffer(b: int) -> jax.Array:
    """Stale slots may hold anything, so one of them is not a number."""
    x = jnp.arange(b * 2 * SLOTS * 3, dtype=jnp.float32).reshape(b, 2, SLOTS, 3)
    return x.at[:, :, 29].set(jnp.nan)


@pytest.fixture(params=["context=4", "data=2,context=4"])
def mesh(request) -> jax.sharding.Mesh:
    return make_mesh(request.param, jax.devices()[: 8 if "data" in request.param else 4])


def split(mesh: jax.sharding.Mesh, call, *args):
    with jax.set_mesh(mesh):
        return jax.jit(call)(*args)


@pytest.mark.parametrize("t", [1, 5, 12], ids=["one", "several", "more than a shard"])
def test_write_run(mesh, t):
    new = -jnp.arange(2 * 2 * t * 3, dtype=jnp.float32).reshape(2, 2, t, 3)
    with jax.set_mesh(mesh):
        program = jax.jit(write_run)
        for at in range(0, SLOTS - t + 1, 3):
            start = jnp.asarray([at, SLOTS - t - at], jnp.int32)
            got = program(buffer(2), new, start)
            want = np.array(buffer(2))
            for row in range(2):
                want[row, :, start[row] : start[row] + t] = new[row]
            np.testing.assert_array_equal(got, want)
    assert got.sharding.spec[2] == "context"


def test_a_single_row(mesh):
    new = -jnp.ones((1, 2, 5, 3))
    for at in (0, 6, 27):
        start = jnp.asarray([at], jnp.int32)
        want = np.array(buffer(1))
        want[0, :, at : at + 5] = -1
        np.testing.assert_array_equal(split(mesh, write_run, buffer(1), new, start), want)


def test_write_slots(mesh):
    slots = jnp.asarray([[0, 31, 8], [7, 9, 16]], jnp.int32)
    new = -jnp.arange(2 * 2 * 3 * 3, dtype=jnp.float32).reshape(2, 2, 3, 3)
    want = write_slots(buffer(2), new, slots)
    np.testing.assert_array_equal(want[1, :, 9], new[1, :, 1])
    np.testing.assert_array_equal(split(mesh, write_slots, buffer(2), new, slots), want)


def test_take_slots(mesh):
    slots = jnp.asarray([[0, 31, 8, 8], [7, 9, 16, 29]], jnp.int32)
    want = np.stack([np.asarray(buffer(2))[row][:, slots[row]] for row in range(2)])
    np.testing.assert_array_equal(split(mesh, take_slots, buffer(2), slots), want)
    np.testing.assert_array_equal(take_slots(buffer(2), slots), want)


def test_only_what_is_taken_is_exchanged(mesh):
    slots = jnp.asarray([[0, 31], [7, 9]], jnp.int32)
    new, start = jnp.zeros((2, 2, 5, 3)), jnp.zeros((2,), jnp.int32)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "context"))
    whole = jax.device_put(buffer(2), place)
    with jax.set_mesh(mesh):
        text = jax.jit(write_run).lower(whole, new, start).compile().as_text()
        taken = jax.jit(take_slots).lower(whole, slots).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "collective-permute"))
    assert "all-gather" not in taken and "all-reduce" in taken
