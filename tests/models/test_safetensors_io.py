"""Shards and their index: limits, disagreement, and paths that lead outside the folder."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.hf import load_hf, save_hf
from models.safetensors_io import INDEX, SINGLE, save_arrays
from tests.models import tiny

CFG = tiny.config()


def sharded(tmp_path):
    out = tmp_path / "model"
    save_hf(out, tiny.weights(CFG), CFG, max_shard_bytes=6000)
    index = json.loads((out / INDEX).read_text())
    return out, index, sorted(set(index["weight_map"].values()))


def write_index(out, weight_map):
    (out / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_respect_their_limit_and_are_all_listed(tmp_path):
    out, index, shards = sharded(tmp_path)
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        tensors = load_file(out / shard)
        size = sum(array.nbytes for array in tensors.values())
        assert size <= 6000
        assert {index["weight_map"][name] for name in tensors} == {shard}
        total += size
    assert index["metadata"]["total_size"] == total
    with pytest.raises(ValueError, match="max_shard_bytes must be positive"):
        save_hf(tmp_path / "zero", tiny.weights(CFG), CFG, max_shard_bytes=0)


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    out, index, shards = sharded(tmp_path)
    weight_map = index["weight_map"]
    name = next(iter(weight_map))
    write_index(out, weight_map | {"ghost": shards[0]})
    with pytest.raises(ValueError, match=f"lists tensor ghost in {shards[0]}, which does not hold"):
        load_hf(out)
    write_index(out, {k: v for k, v in weight_map.items() if k != name})
    with pytest.raises(ValueError, match=f"holds tensor {name}, which .* does not list"):
        load_hf(out)
    twice = json.dumps({"weight_map": weight_map}).replace("{", f'{{"{name}": "x",', 2)
    (out / INDEX).write_text(twice.replace(f'{{"{name}": "x",', "{", 1))
    with pytest.raises(ValueError, match=f"not a usable index .{name} is listed twice"):
        load_hf(out)
    (out / INDEX).write_text('{"weights": 1}')
    with pytest.raises(ValueError, match="not a usable index"):
        load_hf(out)
    shutil.copy(out / shards[0], out / "copy.safetensors")
    write_index(out, weight_map | {"ghost": "copy.safetensors"})
    with pytest.raises(ValueError, match=r"tensor .* is in both .* and copy.safetensors"):
        load_hf(out)
    write_index(out, weight_map)
    (out / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names shard {shards[1]}, which is missing"):
        load_hf(out)


@pytest.mark.parametrize("kind", ["parent", "absolute", "backslash", "subfolder", "link", "empty"])
def test_an_index_may_not_leave_its_folder(tmp_path, kind):
    out, index, shards = sharded(tmp_path)
    outside = tmp_path / "outside.safetensors"
    shutil.move(out / shards[0], outside)
    name = {
        "parent": "../outside.safetensors", "absolute": str(outside),
        "backslash": "..\\outside.safetensors", "subfolder": "sub/outside.safetensors",
        "link": "link.safetensors", "empty": "",
    }[kind]  # fmt: skip
    if kind == "link":
        os.symlink(outside, out / name)
    write_index(out, {k: name if v == shards[0] else v for k, v in index["weight_map"].items()})
    with pytest.raises(ValueError, match="lies outside its folder"):
        load_hf(out)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    out, _, shards = sharded(tmp_path)
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    shutil.copytree(out, snapshot)
    for shard in shards:
        shutil.move(snapshot / shard, blobs / f"hash-{shard}")
        os.symlink(blobs / f"hash-{shard}", snapshot / shard)
    same = jax.tree.map(np.array_equal, load_hf(snapshot)[0], tiny.weights(CFG))
    assert all(jax.tree.leaves(same))


def test_two_checkpoints_in_one_folder_are_ambiguous(tmp_path):
    out, _, shards = sharded(tmp_path)
    shutil.copy(out / shards[0], out / SINGLE)
    with pytest.raises(ValueError, match=r"has both model.safetensors and"):
        load_hf(out)


def test_files_may_be_read_by_whom_the_mask_lets(tmp_path):
    save_arrays({"x": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "plain").write_text("")
    modes = [path.stat().st_mode for path in sorted(tmp_path.iterdir())]
    assert modes[0] == modes[1]
