"""Which context fits: what is asked, what is refused, what is shown. Compiling is in tests/aot."""

import dataclasses
import importlib.util
import json
import pathlib
import types
from typing import Any

import jax.numpy as jnp
import pytest

from experiments import fit, record, tpu_slices
from experiments.fit import Settings
from experiments.shown import fit as shown
from models import params
from models.decoder import specs
from models.flops import product_depth
from models.sharding import make_mesh

GIB = 2**30


def asked(**changes: Any) -> Settings:
    fields = {"model": ("llama3-8b",), "slice": ("v5e-16",), "lengths": (32768,)}
    return Settings(**(fields | changes))


@pytest.mark.parametrize(
    "name, billions", [("llama3-8b", 8.03), ("qwen2.5-7b", 7.62), ("smollm2-135m", 0.1345)]
)
def test_known_shapes_have_the_published_number_of_parameters(name, billions):
    assert params.count(specs(fit.config_of(name))) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_local_folder_and_another_depth(tmp_path):
    found = fit.MODELS["qwen2.5-7b"] | {"num_hidden_layers": 3, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(found))
    assert fit.config_of(str(tmp_path)).vocab_size == 99
    assert fit.config_of(str(tmp_path), layers=5).num_layers == 5


def test_the_mesh_by_key_heads():
    llama, qwen = fit.config_of("llama3-8b"), fit.config_of("qwen2.5-7b")
    one = {"data": 1, "fsdp": 1}
    assert fit.mesh_sizes("", llama, "v5e-16") == one | {"tensor": 8, "context": 2}
    assert fit.mesh_sizes("", qwen, "v5e-16") == one | {"tensor": 4, "context": 4}
    assert fit.mesh_sizes("", qwen, "v5p-16") == one | {"tensor": 4, "context": 2}
    assert fit.mesh_sizes("context=16", qwen, "v5e-16") == one | {"tensor": 1, "context": 16}


def test_an_odd_number_of_heads_is_left_whole():
    """Three key heads of nine divide no slice: all of it goes over the cache's slots."""
    small = fit.config_of("smollm2-135m", layers=1)
    assert (small.num_heads, small.num_kv_heads) == (9, 3)
    sizes = fit.mesh_sizes("", small, "v5e-16")
    assert (sizes["tensor"], sizes["context"]) == (1, 16)
    assert fit.mesh_sizes("", small, "v6e-8")["context"] == 8
    given = make_mesh("tensor=2,context=4")
    policy = fit.policy_of("dense", small)
    weights, state = fit.abstract(small, policy, given, asked(), 4096)
    keys = state.cache.layers[0].k
    assert keys.sharding.shard_shape(keys.shape)[1:3] == (3, 4096 // 4)  # heads whole, slots split
    assert weights.embed.sharding.shard_shape(weights.embed.shape) == (49152 // 2, 576)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model": ("gpt-9",)},
            "unknown model 'gpt-9': use llama3-8b, .*, smollm2-135m, or a fold",
        ),
        ({"slice": ("v9-4",)}, "unknown slice 'v9-4': use one of v5e-8"),
        ({"mesh": "context=4"}, "the mesh context=4 has 4 devices and the slice v5e-16 has 16"),
        ({"mesh": "seq=16"}, "unknown mesh axis 'seq'"),
        ({"lengths": (1001,)}, "the length 1001 must be a multiple of context = 2"),
        ({"lengths": (256,)}, "hold a chunk of 512 tokens"),
        ({"prefill_size": 513}, "prefill_size 513 cannot be divided by context = 2"),
        ({"mesh": "data=2,tensor=8", "rows": 3}, "3 rows cannot be divided by data . fsdp = 2"),
        ({"cache_dtype": "int3"}, "cache_dtype 'int3' is not supported: use bfloat16 or float32"),
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"policy": ("dense", "sparse:4")}, "unknown policy 'sparse:4': choose one of dense, wind"),
        ({"policy": ("dual_chunk:6144",)}, "write dual_chunk:CHUNK:LOCAL or dual_chunk:CHUNK:LOC"),
        ({"policy": ("dual_chunk:9000:8",)}, "9000 tokens exceeds the model's 8192"),
        ({"policy": ("yarn:half",)}, "takes a factor of 1 or more, got 'half'"),
        ({"policy": ("clex:runs/a:b",)}, "policy 'clex:runs/a:b' is read from what a run has writ"),
        ({"policy": ("giraffe:x",)}, "ask for one that is all in its name, such as dual_chunk"),
        ({"policy": ("vertical_slash:64:8:file",)}, "is read from what a run has written"),
    ],
)
def test_one_clear_refusal_before_anything_is_compiled(changes, words, monkeypatch):
    monkeypatch.setattr(fit, "measure", lambda *args: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=words):
        fit.run(asked(**changes))


def test_a_model_that_the_policy_refuses_is_refused_at_once(tmp_path, monkeypatch):
    """Windows go through the folder's config; dual chunks are not defined with them."""
    monkeypatch.setattr(fit, "measure", lambda *args: pytest.fail("compiled"))
    windows = {"model_type": "mistral", "sliding_window": 4096}
    (tmp_path / "config.json").write_text(json.dumps(fit.MODELS["llama3-8b"] | windows))
    with pytest.raises(ValueError, match="sliding windows, for which dual chunk attention is not"):
        fit.run(asked(model=(str(tmp_path),), policy=("dual_chunk:6144:1024",)))


@pytest.mark.parametrize(
    "policy, axes, depths",
    [
        ("dense", "tensor=2,context=4", (0, 1)),
        ("window:1024", "tensor=2,context=4", (0, 1)),
        ("yarn:32", "tensor=2,context=4", (0, 1)),
        ("dual_chunk:6144:1024", "tensor=2,context=4", (0, 1)),
        ("dual_chunk:6144:1024", "tensor=8", (0, 1)),
        ("dual_chunk:6124:1024", "tensor=8", (1, 1)),  # no stride for the kernels: in XLA
        ("vertical_slash:6144:1024:64:128", "tensor=8", (2, 1)),  # runs, blocks of a plan
    ],
)
def test_programs_are_those_of_the_policy(policy, axes, depths):
    """Loops around products, by which is known what the compiler counts in full."""
    cfg = dataclasses.replace(fit.config_of("llama3-8b", layers=2), hidden_size=512, vocab_size=512)
    mesh = make_mesh(axes)
    rules = fit.policy_of(policy, cfg)
    found = {
        name: fit.traced(name, cfg, rules, mesh, asked(), 16384).jaxpr.jaxpr
        for name in fit.PROGRAMS
    }
    assert tuple(product_depth(found[name]) for name in fit.PROGRAMS) == depths
    # Numbers that a policy brings along: windows, or what the temperature of dual chunks is from.
    dense = fit.traced("decode", cfg, fit.policy_of("dense", cfg), mesh, asked(), 16384)
    more = len(found["decode"].invars) - len(dense.jaxpr.jaxpr.invars)
    assert more == {"window": 1, "dual_chunk": 2, "vertical_slash": 5}.get(policy.split(":")[0], 0)


def flags_of(**changes: Any) -> types.SimpleNamespace:
    values = {
        "model": ["llama3-8b"], "slice": ["v5e-16"], "lengths": ["32768", "131072"], "mesh": "",
        "rows": 1, "prefill_size": 512, "dtype": "bfloat16", "cache_dtype": "bfloat16",
        "layers": None, "policy": ["dense"],
    }  # fmt: skip
    return types.SimpleNamespace(**(values | changes))


def test_flags_become_settings():
    assert fit.settings_of(flags_of()) == asked(lengths=(32768, 131072))
    with pytest.raises(ValueError, match=r"lengths are positive integers.*got '32k'"):
        fit.settings_of(flags_of(lengths=["32k"]))
    with pytest.raises(ValueError, match="at least one each"):
        fit.settings_of(flags_of(model=[]))
    with pytest.raises(ValueError, match=r"and --policy\."):
        fit.settings_of(flags_of(policy=[]))
    assert fit.settings_of(flags_of(policy=["dense", "yarn:4"])).policy == ("dense", "yarn:4")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs libtpu.*install -e \"\.\[aot\]\""):
        tpu_slices.devices("v5e:7x7")


def compiled(flops: float, counted: float) -> Any:
    """A program of 4 GiB of arguments, 1 of which it gives back, and 2 of temporaries."""
    memory = types.SimpleNamespace(
        argument_size_in_bytes=4 * GIB,
        output_size_in_bytes=GIB + 512,
        alias_size_in_bytes=GIB,
        temp_size_in_bytes=2 * GIB - 512,
    )
    cost = {"flops": flops, "bytes accessed": counted}
    return types.SimpleNamespace(memory_analysis=lambda: memory, cost_analysis=lambda: cost)


def test_memory_and_rooflines_by_hand():
    chip = tpu_slices.Chip(flops=1e12, bandwidth=float(GIB), memory_gib=8)
    seen = fit.figures(compiled(flops=1e12, counted=7 * GIB), chip, unread=GIB, looped=False)
    assert seen["arguments_gib"] == 4 and seen["temporaries_gib"] == 2
    assert seen["total_gib"] == 6 and seen["memory_share"] == 0.75
    assert seen["least_seconds"] == pytest.approx(3)  # all arguments but the embeddings
    assert seen["counted_seconds"] == pytest.approx(7)
    busy = compiled(9e12, 7 * GIB)
    assert fit.figures(busy, chip, 0, looped=False)["least_seconds"] == pytest.approx(9)
    unknown = fit.figures(busy, chip, 0, looped=True)
    assert unknown.keys() == seen.keys() and unknown["total_gib"] == 6
    assert {name for name, value in unknown.items() if value is None} == {
        "flops", "bytes", "least_seconds", "counted_seconds"
    }  # fmt: skip


def test_only_an_untied_embedding_table_is_left_out():
    mesh = make_mesh("tensor=4,context=2")
    cfg = fit.config_of("qwen2.5-7b", layers=1)
    assert fit.embedding_bytes(cfg, mesh, asked()) == 2 * cfg.vocab_size * cfg.hidden_size // 4
    assert fit.embedding_bytes(dataclasses.replace(cfg, tied=True), mesh, asked()) == 0


def test_refusals_are_told_from_other_errors():
    full = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.75G) exceeds available HBM (15.75G)."
    )
    assert fit.refusal(full) == full.removeprefix("RESOURCE_EXHAUSTED: ")
    longer = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 18.12G of 15.75G hbm. Exceeded hbm capacity by 2.37G.\n\nTotal"
    )
    assert "Used 18.12G of 15.75G hbm" in str(fit.refusal(longer))
    assert fit.refusal("RESOURCE_EXHAUSTED: Allocation would exceed memory :: vmem") is None
    assert fit.refusal("INTERNAL: Mosaic failed") is None


PROGRAM = {
    "fits": True, "arguments_gib": 3.0, "temporaries_gib": 0.5, "total_gib": 3.5,
    "memory_share": 0.21875, "flops": 1e9, "bytes": 4e9, "least_seconds": 0.004,
    "counted_seconds": 0.0061, "compile_seconds": 2.0,
}  # fmt: skip
REFUSED = {"fits": False, "refusal": "Ran out of memory on HBM.", "compile_seconds": 2.0}


def row(**changes: Any) -> dict[str, Any]:
    fields = {
        "model": "llama3-8b", "policy": "yarn:4", "layers": 32, "slice": "v5e-16",
        "mesh": "tensor=4,context=4", "length": 131072, "chip_gib": 16, "fits": True,
        "programs": {"prefill": PROGRAM | {"total_gib": 3.1}, "decode": PROGRAM},
    }  # fmt: skip
    return fields | changes


def test_rows_of_the_table_and_in_words():
    cells = shown.row(row())
    assert len(cells) == len(shown.HEADER)
    assert cells[3:] == (
        "128k", "yes", "3.00", "0.50", "22% of 16 GiB", "4.00 to 6.10", "4.00 to 6.10"
    )  # fmt: skip
    assert shown.policy_row(row()) == ("llama3-8b", "yarn:4", *cells[1:])
    assert len(shown.POLICY_HEADER) == len(shown.HEADER) + 1
    assert "fits in 3.50 of 16 GiB per device" in fit.sentence(row())
    assert fit.sentence(row()).startswith("llama3-8b, yarn:4, with 131072 slots on v5e-16")
    looped = PROGRAM | dict.fromkeys(("flops", "bytes", "least_seconds", "counted_seconds"))
    pieces = row(programs={"prefill": looped, "decode": PROGRAM})
    assert shown.row(pieces)[-2:] == ("4.00 to 6.10", "not counted")
    no = row(fits=False, programs={"prefill": PROGRAM, "decode": REFUSED})
    assert shown.row(no)[4:] == ("no", "", "", "refused", "", "4.00 to 6.10")
    words = "Ran out of memory on HBM, the total {} exceeds available HBM (15.75G)."
    both = {
        name: REFUSED | {"refusal": words.format(f"({size}G)")}
        for name, size in {"prefill": 16.75, "decode": 17.91}.items()
    }
    assert shown.row(row(fits=False, programs=both))[7] == "refused: 17.91 of 15.75 GiB"
    assert fit.sentence(no).endswith("does not fit. decode: Ran out of memory on HBM.")
    assert [shown.slots(n) for n in (1048576, 3 * 2**20, 32768, 1000)] == [
        "1M",
        "3M",
        "32k",
        "1000",
    ]


def test_the_caption_names_the_compiler(tmp_path: pathlib.Path, monkeypatch):
    record.save(
        "fit", [row()], config=asked(), seeds=[], timing={"libtpu": "0.0.1"}, folder=tmp_path
    )
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    text = shown.TABLES[0].render()
    assert "libtpu 0.0.1" in text and "cache bfloat16" in text and "| 128k | yes |" in text


def test_dtypes_are_jax_s():
    assert [jnp.dtype(name).itemsize for name in fit.DTYPES] == [2, 4]


@pytest.mark.parametrize("result", ["fit", "fit_smollm2", "fit_policies"])
def test_committed_arguments_are_the_weights_and_the_cache_of_a_device(result):
    """Weights are split over tensor, the cache over tensor and context; both are bfloat16.

    Heads of 64 channels make the compiler work on a copy of the cache, in tiles of 128.
    """
    for found in record.load(result)["rows"]:
        cfg = fit.config_of(found["model"])
        sizes = {"context": "1", "tensor": "1"} | dict(
            axis.split("=") for axis in found["mesh"].split(",")
        )
        tensor, context = int(sizes["tensor"]), int(sizes["context"])
        slot = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * 2
        cache = slot * found["length"] / (tensor * context)
        got = found["programs"]["decode"]["arguments_gib"] * GIB
        where = found["model"], found["slice"], found["length"]
        want = 2 * params.count(specs(cfg)) / tensor + cache
        whole = cfg.head_dim % 128 == 0  # else matrices and cache are padded to tiles, too
        assert got == pytest.approx(want, rel=0.01 if whole else 0.02), where
        if whole:
            assert found["programs"]["decode"]["temporaries_gib"] < 0.1, where
        else:
            most = max(program["temporaries_gib"] for program in found["programs"].values())
            assert 1.9 < most * GIB / cache < 4.1, where


def test_committed_dual_chunks_need_what_dense_attention_needs():
    rows = record.load("fit_policies")["rows"]
    for dense, chunks in zip(rows[::2], rows[1::2], strict=True):
        assert (dense["policy"], chunks["policy"]) == ("dense", "dual_chunk:6144:1024")
        assert {dense[name] == chunks[name] for name in ("model", "mesh", "length")} == {True}
        for name in fit.PROGRAMS:
            one, other = dense["programs"][name], chunks["programs"][name]
            assert other["arguments_gib"] == pytest.approx(one["arguments_gib"], rel=1e-4)
            assert other["temporaries_gib"] < one["temporaries_gib"] + 0.025
            for seconds in ("least_seconds", "counted_seconds"):  # both in kernels
                assert 0 < other[seconds] == pytest.approx(one[seconds], rel=0.02)
