"""What ``experiments.fit`` says of a small model, by the real TPU compiler."""

import dataclasses
import json
import pathlib

import pytest

from experiments import fit, tpu_slices
from experiments.fit import Settings
from models.decoder import specs
from models.params import nbytes
from tests.aot import topology

pytestmark = pytest.mark.aot

LENGTH = 131072


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Settings:
    topology("v5e")  # skips where libtpu is not installed
    folder = tmp_path_factory.mktemp("small")
    sizes = {
        "num_hidden_layers": 2, "hidden_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 1024, "vocab_size": 1024,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fit.MODELS["llama3-8b"] | sizes))
    return Settings(
        model=(str(folder),), slice=("v5e-8",), lengths=(LENGTH,), mesh="context=4,tensor=2"
    )


def test_a_small_model_fits_and_its_cache_is_neither_copied_nor_gathered(asked):
    (row,) = fit.run(asked)
    cfg = fit.config_of(asked.model[0])
    assert row["fits"] and row["mesh"] == "tensor=2,context=4"
    cache = 2 * cfg.num_layers * LENGTH * cfg.num_kv_heads * cfg.head_dim * 2
    decode, prefill = row["programs"]["decode"], row["programs"]["prefill"]
    share = cache / 8 + nbytes(specs(cfg)) / 2 / 2  # specs are float32, weights bfloat16
    assert decode["arguments_gib"] * fit.GIB == pytest.approx(share, rel=0.1)
    for program in (decode, prefill):
        assert program["temporaries_gib"] * fit.GIB < 0.25 * cache / 8
        assert 0 < program["least_seconds"] <= program["counted_seconds"]
    # Queries of a chunk are split over context: all of them on each device would be more work.
    attended = 4 * 512 * (LENGTH / 4) * cfg.num_heads / 2 * cfg.head_dim
    assert prefill["flops"] < 1.5 * attended


def test_too_long_a_context_is_refused_in_words(asked):
    length = 2**28
    chip = tpu_slices.V5E
    cfg = fit.config_of(asked.model[0])
    mesh = fit.make_mesh(asked.mesh, tpu_slices.devices("v5e:2x4"))
    program = fit.traced("decode", cfg, fit.policy_of("dense", cfg), mesh, asked, length)
    found = fit.compile_one(program, chip, 0, loops=1)
    assert not found["fits"] and "Ran out of memory" in found["refusal"]


@pytest.mark.parametrize("axes", ["context=4,tensor=2", "tensor=8"])
def test_dual_chunks_compile_in_kernels_over_whole_and_split_slots(asked, axes):
    settings = dataclasses.replace(
        asked, lengths=(16384,), policy=("dense", "dual_chunk:6144:1024"), mesh=axes
    )
    dense, chunks = fit.run(settings)
    assert (dense["policy"], chunks["policy"]) == settings.policy and chunks["fits"]
    for name, program in chunks["programs"].items():
        held = dense["programs"][name]["arguments_gib"]
        assert program["arguments_gib"] == pytest.approx(held, rel=1e-3)
        assert program["least_seconds"] is not None  # a loop around its products has none


def test_sparse_prefill_compiles_over_rows_and_heads(asked):
    """Its kernel is on each device for the rows and heads of that device."""
    sparse = "vertical_slash:6144:1024:64:128"
    settings = dataclasses.replace(
        asked, lengths=(16384,), policy=("dense", sparse), mesh="data=4,tensor=2", rows=4
    )
    dense, row = fit.run(settings)
    assert row["policy"] == sparse and row["fits"]
    for name, program in row["programs"].items():
        held = dense["programs"][name]["arguments_gib"]
        assert program["arguments_gib"] == pytest.approx(held, rel=1e-3)


def test_three_key_heads_compile_over_eight_devices(asked):
    """Chosen so, or split over two by force: then each device has all of them."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    place = pathlib.Path(asked.model[0]) / "config.json"
    folder = place.parent / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads(place.read_text()) | heads))
    fields = {"model": (str(folder),), "lengths": (16384,)}
    (chosen,) = fit.run(dataclasses.replace(asked, mesh="", **fields))
    (forced,) = fit.run(dataclasses.replace(asked, mesh="tensor=2,context=4", **fields))
    assert chosen["mesh"] == "context=8" and chosen["fits"] and forced["fits"]
