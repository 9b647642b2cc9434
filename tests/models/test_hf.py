"""Hugging Face directories: what is refused, and that export and import lose nothing."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from models import params
from models.hf import load_hf, save_hf
from models.hf_config import family_of, read_config, to_hf
from models.positions import RopeScaling
from models.safetensors_io import INDEX, SINGLE, Safetensors
from models.sharding import make_mesh
from models.tokenizer import Tokenizer
from tests.models import tiny

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
        ({"rope": RopeScaling("mine", 2.0)}, "rope type 'mine' has no Hugging Face form"),
        ({"rope": RopeScaling(attention_factor=2.0)}, "attention_factor 2.0 has no Hugging Face"),
        ({"windows": (2, 3, None)}, r"different widths \[2, 3\]"),
        ({"windows": (2, None, None)}, "no Hugging Face family has this mix"),
        ({"mlp_bias": True, "qk_norm": True}, "no Hugging Face family has this mix"),
        ({"norm": "layer"}, "need norm='rms'"),
        ({"position": "learned"}, "exported as gpt2, which needs norm='layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_hf(dataclasses.replace(cfg, **changes))


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
