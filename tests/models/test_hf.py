"""Hugging Face directories: what is refused, and that export and import lose nothing."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from models import params
from models.hf import load_hf, save_hf
from models.hf_config import family_of, from_hf, read_config, to_hf
from models.positions import RopeScaling
from models.safetensors_io import INDEX, SINGLE, Safetensors
from models.sharding import make_mesh
from models.tokenizer import Tokenizer
from tests.models import tiny

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4,
    "n_positions": 32,
}  # fmt: skip
BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
CONFIGS = {
    "llama": tiny.config(),
    "llama untied": tiny.config(tied=False, rope=RopeScaling("linear", 2.0)),
    "llama biased": tiny.config(**BIASED, activation="gelu"),
    "qwen2": tiny.config(qkv_bias=True, rope=RopeScaling("yarn", 4.0, 16, beta_fast=16.0)),
    "qwen2 windows": tiny.config(qkv_bias=True, windows=(None, 8, 8)),
    "qwen3": tiny.config(qk_norm=True, head_dim=8, rope_base=1e6),
    "qwen3 mixed": tiny.config(qk_norm=True, windows=(4, None, 4), qkv_bias=True, out_bias=True),
    "mistral": tiny.config(windows=(8,) * 3, rope=RopeScaling("dynamic", 2.0, 16)),
    "gpt2": tiny.config(
        **BIASED, num_kv_heads=4, norm="layer", gated_mlp=False, position="learned",
        activation="gelu_tanh",
    ),
}  # fmt: skip


def same(a, b):
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(equal))


def saved(tmp_path, cfg=CONFIGS["llama"], **options):
    out = tmp_path / "model"
    save_hf(out, tiny.weights(cfg), cfg, **options)
    return out


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_export_then_import_is_bit_exact(name, dtype, tmp_path):
    cfg = CONFIGS[name]
    weights = params.cast(tiny.weights(cfg), dtype)
    shards = {"max_shard_bytes": 3000} if dtype == "float16" else {}
    save_hf(tmp_path / "out", weights, cfg, **shards)
    assert (tmp_path / "out" / INDEX).exists() == (dtype == "float16")
    again, cfg_again = load_hf(tmp_path / "out")
    assert cfg_again == cfg and family_of(cfg) == name.split()[0]
    assert again.embed.dtype == dtype and same(weights, again)


def test_dtype_on_load_and_on_save(tmp_path):
    cfg = tiny.config()
    out = saved(tmp_path, dtype=jnp.bfloat16)
    assert load_file(out / SINGLE)["model.norm.weight"].dtype == jnp.bfloat16
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = params.cast(tiny.weights(cfg), jnp.bfloat16)
    assert same(load_hf(out)[0], rounded)
    assert same(load_hf(out, dtype=jnp.float32)[0], params.cast(rounded, jnp.float32))
    with pytest.raises(ValueError, match="would be int32: export float32"):
        save_hf(tmp_path / "other", tiny.weights(cfg), cfg, dtype=jnp.int32)


def test_mixed_dtypes_need_a_named_one(tmp_path):
    out = saved(tmp_path)
    tensors = load_file(out / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, out / SINGLE)
    with pytest.raises(ValueError, match=f"{name} .* is float16 but the layers before it"):
        load_hf(out)
    assert load_hf(out, dtype=np.float32)[0].segments[0].layers.mlp.up.w.dtype == np.float32
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, out / SINGLE)
    with pytest.raises(ValueError, match=f"{name} .* is I8: only F32, F16, BF16"):
        load_hf(out)


def test_loading_onto_a_mesh(tmp_path):
    out = saved(tmp_path)
    placed, _ = load_hf(out, mesh=make_mesh("fsdp=2,tensor=4"))
    w = placed.segments[0].layers.mlp.up.w
    assert w.sharding.shard_shape(w.shape) == (3, 8, 6)
    assert same(placed, load_hf(out)[0])
    again = tmp_path / "again"
    save_hf(again, placed, CONFIGS["llama"])
    assert (again / SINGLE).read_bytes() == (out / SINGLE).read_bytes()


def test_tokenizer_travels_along(tmp_path):
    vocab = {"<s>": 0, "</s>": 1, "a": 2}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<s>"))
    raw.add_special_tokens(["<s>", "</s>"])
    Tokenizer(raw, bos_token="<s>", eos_token="</s>").save(tmp_path / "tok")
    out = saved(tmp_path, tokenizer_dir=tmp_path / "tok")
    assert Tokenizer.load(out).encode("a") == [2]
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    small = tiny.config(vocab_size=2)
    with pytest.raises(ValueError, match="the tokenizer has 3 ids but the model embeds 2"):
        save_hf(tmp_path / "small", tiny.weights(small), small, tokenizer_dir=tmp_path / "tok")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*empty"):
        save_hf(tmp_path / "none", tiny.weights(small), small, tokenizer_dir=tmp_path / "empty")
    assert not (tmp_path / "small").exists() and not (tmp_path / "none").exists()


def test_a_used_directory_is_left_alone(tmp_path):
    out = saved(tmp_path)
    before = (out / SINGLE).read_bytes()
    with pytest.raises(FileExistsError, match="is not empty: choose a new folder"):
        saved(tmp_path)
    assert (out / SINGLE).read_bytes() == before
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", tiny.weights(CONFIGS["llama"]), CONFIGS["llama"])
    assert (tmp_path / "empty" / SINGLE).exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.safetensors_io.save_file", full_disk)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*free some space"):
        saved(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_without_a_name_there_are_refused(tmp_path):
    cfg = CONFIGS["llama"]
    weights = tiny.weights(cfg)
    with pytest.raises(ValueError, match=r"\.head is not part of this config"):
        save_hf(tmp_path / "out", weights.replace(head=weights.embed.T), cfg)
    for changes, message in (
        ({"causal": False}, "causal=False"),
        ({"rotary_fraction": 0.5}, "rotary_fraction below 1"),
        ({"rope": RopeScaling("ntk", 2.0)}, "rope type 'ntk' has no Hugging Face form"),
        ({"rope": RopeScaling(attention_factor=2.0)}, "attention_factor 2.0 has no Hugging Face"),
        ({"windows": (2, 3, None)}, r"different widths \[2, 3\]"),
        ({"windows": (2, None, None)}, "no Hugging Face family has this mix"),
        ({"mlp_bias": True, "qk_norm": True}, "no Hugging Face family has this mix"),
        ({"norm": "layer"}, "need norm='rms'"),
        ({"position": "learned"}, "exported as gpt2, which needs norm='layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_hf(dataclasses.replace(cfg, **changes))


REFUSED = {
    "model_type": ({"model_type": "mixtral"}, r"model_type 'mixtral', which is not supported"),
    "quantisation": ({"quantization_config": {"bits": 4}}, r'quantization_config to {"bits": 4}'),
    "softcap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping to 50.0"),
    "final softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0"),
    "experts": ({"num_local_experts": 8}, "num_local_experts to 8"),
    "own code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map to"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor to 0.5"),
    "activation": ({"hidden_act": "relu2"}, 'hidden_act to "relu2".*known are silu'),
    "rope type": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
        'rope_scaling.rope_type to "mrope"',
    ),
    "rope without factor": ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' without factor"),
    "rope per layer type": ({"rope_parameters": {"full_attention": {}}}, "per layer type"),
    "two thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_theta to 10000.0.*rope_parameters says 1000000.0",
    ),
    "missing size": ({"hidden_size": None}, "must give hidden_size as a positive integer"),
    "wrong size": ({"num_hidden_layers": "3"}, "num_hidden_layers as a positive integer, got '3'"),
    "indivisible": ({"hidden_size": 18}, "num_attention_heads to 4.*does not divide"),
    "window on llama": ({"sliding_window": 8}, "sliding_window to 8"),
    "qwen2 attention bias": ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
    "mistral mlp bias": ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias to true"),
    "linear layers": (
        {"model_type": "qwen3", "layer_types": ["linear_attention"] * 3},
        'layer_types to "linear_attention"',
    ),
    "too few layer types": ({"layer_types": ["full_attention"]}, "one entry for each of the 3"),
    "windows without width": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
        "contradicts sliding_window",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_settings_are_named_with_their_value(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        from_hf(LLAMA | changes)


def test_gpt2_refuses_what_it_does_not_compute():
    assert from_hf(GPT2).intermediate_size == 64 and from_hf(GPT2 | {"n_inner": 20})
    for key, value in (
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ):
        with pytest.raises(ValueError, match=key):
            from_hf(GPT2 | {key: value})


def test_both_styles_of_rope_settings():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
    new = from_hf(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"} | scaling})
    old = from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling})
    assert new == old and new.rope_base == 5e5
    assert new.rope == RopeScaling("llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)
    assert from_hf(LLAMA).rope == RopeScaling() and from_hf(LLAMA).rope_base == 10000.0
    dynamic = from_hf(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert dynamic.rope.original_max_position == 32
    tables = {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    long = LLAMA | {"rope_scaling": {"type": "longrope"} | tables}
    assert from_hf(long | {"original_max_position_embeddings": 8}).rope.factor == 4.0


def test_family_defaults():
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
    assert from_hf(qwen).windows is None and from_hf(qwen).qkv_bias
    assert from_hf(qwen | {"use_sliding_window": True}).windows == (None, 8, 8)
    mistral = LLAMA | {"model_type": "mistral"}
    assert from_hf(mistral).windows == (4096,) * 3
    assert from_hf(mistral | {"sliding_window": None}).windows is None
    assert from_hf(LLAMA | {"num_key_value_heads": None}).num_kv_heads == 4
    assert from_hf(LLAMA | {"model_type": "qwen3"}).head_dim == 128
    assert not from_hf(LLAMA).tied and from_hf(GPT2).tied
    assert from_hf(LLAMA).norm_eps == 1e-6


def test_missing_extra_and_misshapen_tensors_go_by_their_names_there(tmp_path):
    out = saved(tmp_path)
    good = load_file(out / SINGLE)
    up = "model.layers.2.mlp.up_proj.weight"
    for tensors, message in (
        ({k: v for k, v in good.items() if k != up}, rf"{up} is missing from .* \(1 in all\)"),
        (good | {"score.weight": good[up]}, "score.weight in .* has no place in this model"),
        (good | {up: good[up].T.copy()}, rf"{up} .* has shape \(16, 24\) .* \(24, 16\)"),
    ):
        save_file(tensors, out / SINGLE)
        with pytest.raises(ValueError, match=message):
            load_hf(out)


def test_a_tied_matrix_stored_twice(tmp_path):
    out = saved(tmp_path)
    tensors = load_file(out / SINGLE)
    embed = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embed}, out / SINGLE)
    assert load_hf(out)[0].head is None
    save_file(tensors | {"lm_head.weight": embed + 1}, out / SINGLE)
    with pytest.raises(ValueError, match=r"lm_head.weight different from model.embed_tokens"):
        load_hf(out)
    edit(out, tie_word_embeddings=False)
    assert np.array_equal(load_hf(out)[0].head, (embed + 1).T)


def test_old_gpt2_names_and_stored_masks(tmp_path):
    cfg = CONFIGS["gpt2"]
    out = saved(tmp_path, cfg)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(out / SINGLE).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(tensors, out / SINGLE)
    assert same(load_hf(out)[0], tiny.weights(cfg))


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_weights(tmp_path, kept):
    out = saved(tmp_path)
    data = (out / SINGLE).read_bytes()
    (out / SINGLE).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt"):
        load_hf(out)


def test_missing_or_broken_files(tmp_path):
    out = saved(tmp_path)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config[:50])
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_hf(out)
    (out / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_config(out)
    (out / "config.json").write_text(config)
    shutil.copy(out / SINGLE, out / "pytorch_model.bin")
    (out / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither .* pytorch_model.bin is a pickle"):
        load_hf(out)
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        load_hf(tmp_path / "nowhere")


def sharded(tmp_path):
    out = saved(tmp_path, max_shard_bytes=6000)
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
        save_hf(
            tmp_path / "zero", tiny.weights(CONFIGS["llama"]), CONFIGS["llama"], max_shard_bytes=0
        )


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
    assert same(load_hf(snapshot)[0], tiny.weights(CONFIGS["llama"]))


def test_two_checkpoints_in_one_folder_are_ambiguous(tmp_path):
    out, _, shards = sharded(tmp_path)
    shutil.copy(out / shards[0], out / SINGLE)
    with pytest.raises(ValueError, match=r"has both model.safetensors and"):
        load_hf(out)


def test_memory_holds_one_parameter_and_not_the_model(tmp_path, monkeypatch):
    out = saved(tmp_path)
    reads: list[str] = []
    plain = Safetensors.read
    monkeypatch.setattr(
        Safetensors, "read", lambda self, name: reads.append(name) or plain(self, name)
    )
    load_hf(out)
    assert len(reads) == len(set(reads)) == len(load_file(out / SINGLE))
    layers = [name for name in reads if "q_proj" in name]
    at = reads.index(layers[0])
    assert reads[at : at + 3] == layers  # one parameter is finished before the next is begun
