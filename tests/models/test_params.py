"""Parameters derived from specs: values by path, born sharded, counted, validated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from models import decoder, params
from models.params import Constant, GlorotNormal, Normal, ParamSpec, Uniform
from models.sharding import ShardingRules, make_mesh
from tests.models import tiny


def test_init_is_deterministic_and_keyed_by_path():
    specs = {"a": ParamSpec((4, 3), (None, None)), "b": ParamSpec((5,), (None,))}
    first, again = (params.init(specs, jax.random.key(1)) for _ in range(2))
    assert np.array_equal(first["a"], again["a"])
    assert not np.array_equal(first["a"], params.init(specs, jax.random.key(2))["a"])
    grown = params.init({"0": ParamSpec((4, 3), (None, None))} | specs, jax.random.key(1))
    assert np.array_equal(grown["a"], first["a"]) and np.array_equal(grown["b"], first["b"])
    assert not np.array_equal(grown["0"], grown["a"])


def test_initialisers_and_dtypes():
    specs = {
        "ones": ParamSpec((3,), (None,), Constant(1.0), jnp.bfloat16),
        "wide": ParamSpec((200, 200), (None, None), Normal(0.5)),
        "flat": ParamSpec((200, 200), (None, None), Uniform(-0.25, 0.75)),
        "copies": ParamSpec((9, 300, 100), (None, None, None), GlorotNormal()),
    }
    made = params.init(specs, jax.random.key(0))
    assert made["ones"].dtype == jnp.bfloat16 and (made["ones"] == 1).all()
    assert float(made["wide"].std()) == pytest.approx(0.5, rel=0.02)
    assert -0.25 <= made["flat"].min() < -0.24 and 0.74 < made["flat"].max() < 0.75
    assert float(made["flat"].mean()) == pytest.approx(0.25, abs=0.01)
    assert float(made["copies"].std()) == pytest.approx((2 / 400) ** 0.5, rel=0.01)


def test_parameters_are_born_sharded_with_the_same_values():
    whole = decoder.specs(tiny.config(vocab_size=48))
    specs = {"embed": whole.embed, "attn": whole.segments[0].layers.attn}
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    shardings = params.shardings(specs, mesh, ShardingRules())
    born = params.init(specs, jax.random.key(0), shardings)
    assert born["attn"].q.w.sharding.shard_shape((3, 16, 16)) == (3, 8, 8)
    assert born["embed"].sharding.shard_shape((48, 16)) == (24, 8)
    plain = params.init(specs, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(born), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape and not a.is_fully_replicated
        # Compiled apart, the two may differ in the last bit (they do on jax 0.12).
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_shapes_counts_and_bytes():
    cfg = tiny.config()
    specs = decoder.specs(cfg)
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16
    assert params.count(specs) == 3 * layer + 40 * 16 + 16
    assert params.nbytes(specs) == 4 * params.count(specs)
    abstract = params.shape_dtype(specs)
    made = tiny.weights(cfg)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made
    )
    assert params.nbytes(params.cast(made, jnp.bfloat16)) == 2 * params.count(specs)
    mesh = make_mesh("fsdp=8")
    placed = params.shape_dtype(specs, params.shardings(specs, mesh, ShardingRules()))
    assert placed.embed.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_cast_leaves_integers():
    cast = params.cast({"w": jnp.ones(2), "ids": jnp.ones(2, jnp.int32)}, jnp.float16)
    assert cast["w"].dtype == jnp.float16 and cast["ids"].dtype == jnp.int32


def test_cast_keeps_what_is_named():
    given = {"w": jnp.ones(2), "exact": {"w": jnp.ones(2)}}
    cast = params.cast(given, jnp.bfloat16, lambda name: name == "['exact']['w']")
    assert cast["w"].dtype == jnp.bfloat16 and cast["exact"]["w"].dtype == jnp.float32


def test_validate_names_the_first_difference():
    cfg = tiny.config()
    good, specs = tiny.weights(cfg), decoder.specs(cfg)
    params.validate(good, specs)
    with pytest.raises(ValueError, match=r"\.head is missing \(1 in all\)"):
        params.validate(good, decoder.specs(dataclasses.replace(cfg, tied=False)))
    with pytest.raises(ValueError, match=r"\.head is not part of this config"):
        params.validate(good.replace(head=good.embed.T), specs)
    with pytest.raises(ValueError, match=r"\.embed has shape \(40, 8\).*\(40, 16\)"):
        params.validate(good.replace(embed=good.embed[:, :8]), specs)


def test_a_spec_names_every_axis():
    with pytest.raises(ValueError, match="one axis name per dimension"):
        ParamSpec((2, 3), ("embed",))
    assert ParamSpec((2,), ("embed",)).stacked(5) == ParamSpec((5, 2), ("layers", "embed"))


def test_path_names_follow_fields():
    @struct.dataclass
    class Pair:
        left: object
        right: object

    paths = jax.tree_util.tree_leaves_with_path(Pair((1, 2), {"k": 3}))
    assert [params.path_name(p) for p, _ in paths] == [".left[0]", ".left[1]", ".right['k']"]
