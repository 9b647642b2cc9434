"""``config.json``: what is read, what is refused, and the defaults of each family."""

import dataclasses

import numpy as np
import pytest

from models.hf_config import from_hf, to_hf
from models.positions import RopeScaling, rope_frequencies

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4,
    "n_positions": 32,
}  # fmt: skip

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
    long = LLAMA | {"rope_scaling": {"type": "longrope", "factor": 7.0} | tables}
    assert from_hf(long).rope.factor == 7.0
    assert from_hf(long | {"original_max_position_embeddings": 8}).rope.factor == 4.0


def test_ntk_scaling_is_written_as_its_base():
    """Another program that reads the file computes the very frequencies."""
    cfg = dataclasses.replace(from_hf(LLAMA), rope=RopeScaling("ntk", 4.0))
    back = from_hf(to_hf(cfg))
    assert back.rope == RopeScaling() and back.rope_base > cfg.rope_base
    want, _ = rope_frequencies(cfg.rope, cfg.rotary_dim, cfg.rope_base)
    got, _ = rope_frequencies(back.rope, back.rotary_dim, back.rope_base)
    np.testing.assert_allclose(got, want, rtol=1e-6)


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
