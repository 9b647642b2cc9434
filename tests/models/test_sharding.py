"""Mesh sizes by name and the rules from logical axes to mesh axes."""

import jax
import pytest
from jax.sharding import PartitionSpec

from models.sharding import MESH_AXES, ShardingRules, make_mesh, parse_mesh


def test_parse_mesh():
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "fsdp": 1, "tensor": 4, "context": 1}
    assert parse_mesh("") == dict.fromkeys(MESH_AXES, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model=2", "unknown mesh axis 'model'"), ("data=0", "positive size"), ("data", "positive")],
)
def test_parse_mesh_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_make_mesh_uses_all_devices_or_one():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (2, 2, 2, 1)
    assert make_mesh("").devices.size == 1
    with pytest.raises(ValueError, match="needs 4 devices but there are 8"):
        make_mesh("data=4")
    with pytest.raises(ValueError, match="needs 16 devices"):
        make_mesh("data=16")
    assert make_mesh("data=4", jax.devices()[:4]).devices.size == 4


@pytest.fixture
def mesh():
    return make_mesh("data=2,fsdp=2,tensor=2")


def test_default_rules(mesh):
    rules = ShardingRules()
    assert rules.partition_spec(("embed", "mlp"), (8, 12), mesh) == PartitionSpec("fsdp", "tensor")
    batch = rules.partition_spec(("batch", "length"), (4, 6), mesh)
    assert batch == PartitionSpec(("data", "fsdp"), None)
    assert rules.partition_spec((None, "layers"), (8, 8), mesh) == PartitionSpec(None, None)
    assert rules.sharding(("vocab",), (6,), mesh).spec == PartitionSpec("tensor")


def test_a_dimension_that_does_not_divide_is_replicated(mesh):
    spec = ShardingRules().partition_spec(("vocab", "embed"), (97, 8), mesh)
    assert spec == PartitionSpec(None, "fsdp")


def test_one_mesh_axis_for_two_dimensions_is_refused(mesh):
    rules = ShardingRules(rules=(("heads", "tensor"), ("mlp", "tensor")))
    with pytest.raises(ValueError, match=r"\.w would use mesh axis tensor twice"):
        rules.partition_spec(("heads", "mlp"), (4, 4), mesh, name=".w")


def test_overrides_go_by_name_and_the_first_wins(mesh):
    rules = ShardingRules(overrides=((r"\.embed$", ("tensor", None)), (r"embed", (None, None))))
    axes, shape = ("vocab", "embed"), (8, 8)
    assert rules.partition_spec(axes, shape, mesh, ".embed") == PartitionSpec("tensor", None)
    assert rules.partition_spec(axes, shape, mesh, ".embedding") == PartitionSpec(None, None)
    assert rules.partition_spec(axes, shape, mesh, ".head") == PartitionSpec("tensor", "fsdp")
    with pytest.raises(ValueError, match=r"override for .embed has 2 entries for shape"):
        rules.partition_spec(("vocab",), (8,), mesh, ".embed")
