"""What an export for other systems holds: programs per platform, weights apart from them."""

import json
import pathlib

import jax
import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file

from models import decoder
from tests.inference.models import config, weights
from tests.train.exporting import write_programs
from train.stablehlo import flat

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("stablehlo")
    write_programs(path, weights(config()), config(), PLATFORMS, length=64, batch=2)
    return path


def module(folder: pathlib.Path, name: str, platform: str) -> export.Exported:
    return export.deserialize(bytearray((folder / f"{name}.{platform}.stablehlo").read_bytes()))


@pytest.mark.parametrize("name", ["forward", "decode_step"])
def test_each_platform_gets_its_own_attention(folder, name):
    assert [module(folder, name, p).platforms for p in PLATFORMS] == [(p,) for p in PLATFORMS]
    kernels = ["tpu_custom_call" in module(folder, name, p).mlir_module() for p in PLATFORMS]
    assert kernels == [False, False, True]


def test_sizes_are_free_where_the_platform_allows(folder):
    about = json.loads((folder / "manifest.json").read_text())["platforms"]
    assert about["cpu"]["forward"]["inputs"]["tokens"]["shape"] == ["b", "t"]
    assert about["cuda"]["decode_step"]["free"] == ["b", "s"]
    assert about["tpu"]["forward"]["inputs"]["tokens"]["shape"] == [2, 64]
    assert about["tpu"]["decode_step"]["free"] == []
    assert about["cpu"]["forward"]["largest"] == {"t": 64}
    assert about["tpu"]["decode_step"]["largest"] == {"b": 2, "s": 64}


def test_weights_are_inputs_and_none_is_baked_in(folder):
    names = flat(decoder.unstack(weights(config())))
    assert load_file(folder / "weights.safetensors").keys() == names.keys()
    for name in ("forward", "decode_step"):
        exported = module(folder, name, "cpu")
        assert len(exported.in_avals) >= len(names) + 1
        # A weight written out as a constant would show its contents as a hexadecimal string.
        assert 'dense<"0x' not in exported.mlir_module()


def test_a_model_that_is_not_causal_has_no_decode_step(tmp_path):
    cfg = config(causal=False)
    write_programs(tmp_path, weights(config()), cfg, ["cpu"], length=16)
    assert list(json.loads((tmp_path / "manifest.json").read_text())["platforms"]["cpu"]) == [
        "forward"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platforms": ["rocm"]}, "unknown platform 'rocm' for StableHLO: choose from cpu"),
        ({"length": 161}, "length of 1 to 160, the model's context"),
        ({"length": 0}, "length 0 and batch 1 do not fit"),
        ({"batch": 0}, "batch of at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_programs(tmp_path, weights(config()), config(), **({"platforms": ["cpu"]} | changes))
    assert list(tmp_path.iterdir()) == []


def test_weights_keep_their_dtype(tmp_path):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), weights(config()))
    write_programs(tmp_path, half, config(), ["cpu"], length=16)
    arrays = load_file(tmp_path / "weights.safetensors")
    assert {x.dtype.name for x in arrays.values()} == {"bfloat16"}
    for name, x in flat(half).items():
        np.testing.assert_array_equal(arrays[name], np.asarray(x))
