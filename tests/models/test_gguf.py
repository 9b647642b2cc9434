"""GGUF files: block formats against the ``gguf`` package, settings, refusals, tokenizer."""

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from models import decoder
from models.gguf import GGUF, dequantize, half_split_rows
from models.gguf_tokenizer import read_tokenizer
from models.hf import assemble, save_hf
from models.load import load
from models.safetensors_io import SINGLE, TensorSource
from tests.models import tiny

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
TOKENS = ["<|end|>", "<|user|>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "Ġa", "ab"]
CONFIGS = {
    "llama": tiny.config(
        vocab_size=len(TOKENS), hidden_size=32, head_dim=8, intermediate_size=64, norm_eps=1e-5
    ),
    "qwen2": tiny.config(
        vocab_size=len(TOKENS), hidden_size=32, head_dim=8, intermediate_size=64, qkv_bias=True
    ),
    "qwen3": tiny.config(
        vocab_size=len(TOKENS), hidden_size=32, head_dim=16, intermediate_size=64, qk_norm=True,
        tied=False, rope_base=5e5,
    ),
}  # fmt: skip
OURS = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "lm_head": "output",
}  # fmt: skip


def gguf_name(name):
    parts = name.split(".")
    block = f"blk.{parts[2]}." if "layers" in parts else ""
    return f"{block}{OURS[parts[-2]]}.{parts[-1]}"


def interleaved_rows(w, heads):
    """What converters to GGUF do to q and k of the llama architecture."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def settings(cfg, arch):
    values = {
        "context_length": cfg.max_length, "embedding_length": cfg.hidden_size,
        "block_count": cfg.num_layers, "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_heads, "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim,
        "rope.freq_base": cfg.rope_base, "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "vocab_size": cfg.vocab_size,
    }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in values.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["Ġ a", "a b"],
        "tokenizer.ggml.token_type": [3, 4] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
    }  # fmt: skip


def add(writer, key, value):
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def write(path, arch="llama", kind="F32", tensors=None, **changes):
    """A GGUF file of a tiny model: matrices in ``kind``, the rest in float32."""
    cfg = CONFIGS[arch]
    folder = path.parent / f"hf-{path.stem}"
    save_hf(folder, tiny.weights(cfg), cfg)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (settings(cfg, arch) | changes).items():
        if value is not None:
            add(writer, key, value)
    for name, array in load_file(folder / SINGLE).items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = cfg.num_heads if ".q_proj." in name else cfg.num_kv_heads
            array = interleaved_rows(array, heads)
        if array.ndim == 2 and kind != "F32":
            packed = gguf.quants.quantize(np.ascontiguousarray(array), Kind[kind])
            shape = None if kind == "F16" else packed.shape
            writer.add_tensor(gguf_name(name), packed, raw_shape=shape, raw_dtype=Kind[kind])
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_decode_as_the_gguf_package_decodes_them(kind):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 96)).astype(np.float32)
    rows = gguf.quants.quantize(weights, Kind[kind]).view(np.uint8)
    expected = gguf.quants.dequantize(rows, Kind[kind]) if kind[0] == "Q" else weights
    found = dequantize(kind, rows)
    assert found.shape == weights.shape
    dtypes = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    assert found.dtype == dtypes.get(kind, np.float32)
    if kind[0] == "Q":
        np.testing.assert_array_equal(found, expected)
        assert 0 < np.abs(found - weights).max() < 0.5
    else:
        np.testing.assert_array_equal(found, weights.astype(found.dtype))


def test_q4_1_by_hand():
    d, m = np.float16(0.5), np.float16(-1.0)
    nibbles = bytes(range(16))  # low nibble i, high nibble 0
    block = np.frombuffer(d.tobytes() + m.tobytes() + nibbles, np.uint8)[None]
    expected = [0.5 * i - 1.0 for i in range(16)] + [-1.0] * 16
    assert dequantize("Q4_1", block)[0].tolist() == expected


def test_row_orders_are_inverse():
    w = np.arange(24.0).reshape(12, 2)
    assert np.array_equal(half_split_rows(interleaved_rows(w, 3), 3), w)
    assert half_split_rows(np.arange(6.0), 1).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("arch", CONFIGS)
def test_float_weights_come_back_bit_exact(arch, tmp_path):
    file = GGUF(write(tmp_path / "model.gguf", arch))
    cfg = CONFIGS[arch]
    assert isinstance(file, TensorSource) and file.cfg.norm_eps == cfg.norm_eps
    expected = {**vars(cfg), "init_stddev": file.cfg.init_stddev}
    assert vars(file.cfg) == expected
    params = assemble(file.cfg, file)
    same = jax.tree.map(np.array_equal, params, tiny.weights(cfg))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_quantised_weights_come_back_as_decoded(kind, tmp_path):
    cfg = CONFIGS["llama"]
    file = GGUF(write(tmp_path / "model.gguf", "llama", kind))
    exact = tiny.weights(cfg)
    params = assemble(cfg, file, np.float32)
    for get in (lambda p: p.embed, lambda p: p.segments[0].layers.attn.q.w):
        w = np.asarray(get(exact))
        worst = np.abs(w - np.asarray(get(params))).max()
        assert 0 < worst < (0.2 if kind[:2] == "Q4" else 0.02) * np.abs(w).max()
    up = params.segments[0].layers.mlp.up.w[1].T
    packed = gguf.quants.quantize(
        np.ascontiguousarray(exact.segments[0].layers.mlp.up.w[1].T), Kind[kind]
    )
    np.testing.assert_array_equal(up, gguf.quants.dequantize(packed, Kind[kind]))


def test_rope_scaling_settings(tmp_path):
    for i, (changes, expected) in enumerate(
        (
            ({"rope.scaling.type": "none"}, ("default", 1.0, None)),
            ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, ("linear", 2.0, None)),
            (
                {
                    "rope.scaling.type": "yarn",
                    "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 8,
                },
                ("yarn", 4.0, 8),
            ),
        )
    ):
        named = {f"llama.{key}": value for key, value in changes.items()}
        rope = GGUF(write(tmp_path / f"{i}.gguf", **named)).cfg.rope
        assert (rope.rope_type, rope.factor, rope.original_max_position) == expected


REFUSED = {
    "experts": ({"llama.expert_count": 4}, r"llama.expert_count to 4"),
    "window": ({"llama.attention.sliding_window": 8}, r"llama.attention.sliding_window to 8"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, r"dimension_count to 4.*head width 8"),
    "rope type": ({"llama.rope.scaling.type": "longrope"}, r"scaling.type to 'longrope'"),
    "missing size": ({"llama.block_count": None}, r"lacks llama.block_count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_settings_are_named_with_their_value(case, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        GGUF(write(tmp_path / "model.gguf", **changes))


def test_other_architectures_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba', which is not supported"):
        GGUF(tmp_path / "other.gguf")


def test_other_quantisations_are_refused_by_tensor_and_type(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in settings(CONFIGS["llama"], "llama").items():
        add(writer, key, value)
    packed = np.zeros((2, 210), np.uint8)  # one Q6_K block of 256 weights per row
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=Kind.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUF(path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert file.shape(name) == (2, 256)
    with pytest.raises(ValueError, match=r"tensor blk.0.ffn_up.weight in .*Q6_K is not supported"):
        file.read(name)


def test_leftover_tensors_are_refused(tmp_path):
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}
    file = GGUF(write(tmp_path / "model.gguf", tensors=extra))
    with pytest.raises(ValueError, match=r"tensor rope_freqs.weight in .* has no place"):
        assemble(file.cfg, file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_files(share, tmp_path):
    path = write(tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"model.gguf is not a complete GGUF file"):
        GGUF(path)


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="not a complete GGUF file"):
        GGUF(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match=r"no.gguf does not exist"):
        GGUF(tmp_path / "no.gguf")


def test_tokenizer(tmp_path):
    tokenizer = read_tokenizer(GGUF(write(tmp_path / "model.gguf")))
    ids = {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.encode("ab 12\n") == [ids[t] for t in ("ab", "Ġ", "1", "2", "Ċ")]
    assert tokenizer.encode(" a") == [ids["Ġa"]]
    parsed = tokenizer.encode("<|end|>a", parse_special_tokens=True)
    assert parsed == [0, ids["a"]] and len(tokenizer.encode("<|end|>a")) == 8
    assert tokenizer.decode([0, ids["Ġa"]], skip_special_tokens=True) == " a"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, None)
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|user|>hi"


def test_tokenizer_that_adds_bos(tmp_path):
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "gpt-2"}
    tokenizer = read_tokenizer(GGUF(write(tmp_path / "model.gguf", **changes)))
    assert tokenizer.encode("ab", add_special_tokens=True) == [0, TOKENS.index("ab")]


def test_qwen2_pre_tokenizer_splits_digits(tmp_path):
    file = GGUF(write(tmp_path / "model.gguf", **{"tokenizer.ggml.pre": "qwen2"}))
    ids = read_tokenizer(file).encode("a12'll")
    assert [TOKENS[i] for i in ids] == ["a", "1", "2", "'", "l", "l"]


@pytest.mark.parametrize(("key", "value"), [("pre", "tekken"), ("model", "llama")])
def test_unknown_tokenizers_are_refused_by_name(key, value, tmp_path):
    file = GGUF(write(tmp_path / "model.gguf", **{f"tokenizer.ggml.{key}": value}))
    with pytest.raises(ValueError, match=f"tokenizer.ggml.{key} '{value}'"):
        read_tokenizer(file)


def test_loading_a_file_by_name(tmp_path):
    path = write(tmp_path / "model.gguf", "qwen3", "Q8_0")
    model = load(path)
    tokens = np.asarray([model.tokenizer.encode("ab a")], np.int32)
    hidden = decoder.forward(model.params, model.cfg, jax.numpy.asarray(tokens)).hidden
    exact = decoder.forward(tiny.weights(CONFIGS["qwen3"]), model.cfg, jax.numpy.asarray(tokens))
    assert model.params.embed.dtype == np.float32 and model.name == str(path)
    assert 1e-5 < float(np.abs(hidden - exact.hidden).max()) < 0.2
