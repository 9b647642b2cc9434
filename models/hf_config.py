"""``config.json`` of Hugging Face model directories, to and from :class:`decoder.Config`.

Five families: llama, qwen2 (also Qwen2.5), qwen3, mistral and gpt2. Decoders whose positions none
of them has are written as ``longreach``, a form that only this workspace reads. A setting that
would change what the model computes and that the decoder does not carry is refused by key and
value; keys that only concern training or generation (dropout, token ids, dtype) are ignored.
"""

import dataclasses
import json
import pathlib
from typing import Any

from models.decoder import Config
from models.hf_rope import read_rope, refuse, write_rope
from models.positions import RopeScaling

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "longreach")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EXPORTED_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Settings that change the computation, with the values under which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "auto_map": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "partial_rotary_factor": (None, 1.0),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "attention_chunk_size": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "use_bidirectional_attention": (None, False),
}


def read_config(directory: str | pathlib.Path) -> Config:
    """The decoder config of a Hugging Face directory.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it is not JSON, lacks a size, or asks for something unsupported.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: name a folder that holds config.json and model.safetensors."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again.")
    return from_hf(found)


def from_hf(found: dict[str, Any]) -> Config:
    """The decoder config of a parsed ``config.json``.

    Raises:
        ValueError: a missing size, or an unsupported setting, named with its value.
    """
    family = found.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {family!r}, which is not supported: "
            f"supported are {', '.join(FAMILIES)}."
        )
    for key, neutral in _NEUTRAL.items():
        if found.get(key) not in neutral:
            refuse(key, found[key])
    if family == "longreach":
        return _from_longreach(found)
    return _from_gpt2(found) if family == "gpt2" else _from_llama_like(found, family)


def _integer(found: dict[str, Any], key: str) -> int:
    value = found.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"config.json must give {key} as a positive integer, got {value!r}: restore it "
            "from the model's original config.json."
        )
    return value


def _activation(found: dict[str, Any], key: str, default: str) -> str:
    name = found.get(key, default)
    if name not in _ACTIVATIONS:
        refuse(key, name, f"known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _from_longreach(found: dict[str, Any]) -> Config:
    try:
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in found["decoder"].items()
        }
        rope = RopeScaling(**given.pop("rope"))
        return Config(**given, rope=rope)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json describes no decoder of this version ({error}): export it again."
        ) from error


def _from_gpt2(found: dict[str, Any]) -> Config:
    hidden, heads = _integer(found, "n_embd"), _integer(found, "n_head")
    if hidden % heads:
        refuse("n_head", heads, f"it does not divide n_embd {hidden}")
    inner = found.get("n_inner")
    return Config(
        vocab_size=_integer(found, "vocab_size"),
        hidden_size=hidden,
        num_layers=_integer(found, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden if inner is None else _integer(found, "n_inner"),
        max_length=_integer(found, "n_positions"),
        activation=_activation(found, "activation_function", "gelu_new"),
        gated_mlp=False,
        norm="layer",
        norm_eps=float(found.get("layer_norm_epsilon", 1e-5)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=bool(found.get("tie_word_embeddings", True)),
        position="learned",
        init_stddev=float(found.get("initializer_range", 0.02)),
    )


def _from_llama_like(found: dict[str, Any], family: str) -> Config:
    hidden, heads = _integer(found, "hidden_size"), _integer(found, "num_attention_heads")
    if found.get("head_dim") is not None:
        head_dim = _integer(found, "head_dim")
    elif family == "qwen3":
        head_dim = 128  # the family's own default; the others divide
    else:
        head_dim = hidden // heads
        if hidden % heads:
            refuse("num_attention_heads", heads, f"it does not divide hidden_size {hidden}")
    if family == "llama" and found.get("num_key_value_heads") is None:
        kv_heads = heads
    else:
        kv_heads = _integer(found, "num_key_value_heads")
    if found.get("attention_bias") and family in ("qwen2", "mistral"):
        refuse("attention_bias", True, f"the {family} family has no such switch")
    if found.get("mlp_bias") and family != "llama":
        refuse("mlp_bias", True, f"the {family} family has no such switch")
    attention_bias = bool(found.get("attention_bias", False))
    layers, max_length = (
        _integer(found, "num_hidden_layers"),
        _integer(found, "max_position_embeddings"),
    )
    base, rope = read_rope(found, max_length)
    return Config(
        vocab_size=_integer(found, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_integer(found, "intermediate_size"),
        max_length=max_length,
        activation=_activation(found, "hidden_act", "silu"),
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(found.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(found.get("tie_word_embeddings", False)),
        rope_base=base,
        rope=rope,
        windows=_read_windows(found, family, layers),
        init_stddev=float(found.get("initializer_range", 0.02)),
    )


def _read_windows(found: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...] | None:
    """The window of every layer, or None if no layer has one."""
    types = found.get("layer_types")
    if types is not None:
        if len(types) != layers:
            refuse("layer_types", types, f"it needs one entry for each of the {layers} layers")
        for name in types:
            if name not in ("full_attention", "sliding_attention"):
                refuse("layer_types", name, "known are full_attention and sliding_attention")
    if family == "mistral":
        # An absent key means the family's default; null means no window.
        window = found.get("sliding_window", 4096)
        sliding = [window is not None] * layers
    elif family == "llama":
        window, sliding = found.get("sliding_window"), [False] * layers
        if window is not None:
            refuse("sliding_window", window, "the llama family attends to everything")
    else:
        window = found.get("sliding_window") if found.get("use_sliding_window") else None
        first = found.get("max_window_layers", 28)
        sliding = [window is not None and i >= first for i in range(layers)]
    if types is not None:
        named = [name == "sliding_attention" for name in types]
        if named != sliding and (family in ("mistral", "llama") or (any(named) and window is None)):
            refuse("layer_types", types, "it contradicts sliding_window and use_sliding_window")
        sliding = named
    if window is None or not any(sliding):
        return None
    width = _integer(found, "sliding_window") if "sliding_window" in found else window
    return tuple(width if one else None for one in sliding)


def family_of(cfg: Config) -> str:
    """The Hugging Face family that can express ``cfg``, or ``longreach`` for its positions.

    Raises:
        ValueError: none can; the sentence names the setting that stands in the way.
    """
    if not cfg.causal or cfg.rotary_fraction != 1.0:
        raise ValueError(
            "a config with causal=False or rotary_fraction below 1 has no Hugging Face form: "
            "export it with `python -m train.export` as StableHLO instead."
        )
    if cfg.position not in ("rope", "learned"):
        return "longreach"
    if cfg.position == "learned":
        biases = cfg.qkv_bias and cfg.out_bias and cfg.mlp_bias
        fits = cfg.norm == "layer" and biases and not cfg.gated_mlp and not cfg.qk_norm
        fits = fits and cfg.num_kv_heads == cfg.num_heads and cfg.windows is None
        if not fits or cfg.head_dim * cfg.num_heads != cfg.hidden_size:
            raise ValueError(
                "learned positions are exported as gpt2, which needs norm='layer', all biases, no "
                "gated MLP, no qk_norm, no windows and as many key heads as query heads."
            )
        return "gpt2"
    if cfg.norm != "rms" or not cfg.gated_mlp:
        raise ValueError(
            "rotary models are exported as llama, qwen2, qwen3 or mistral, which need norm='rms' "
            "and gated_mlp=True."
        )
    windowed = cfg.windows is not None and any(w is not None for w in cfg.windows)
    widths = {w for w in cfg.windows or () if w is not None}
    if len(widths) > 1:
        raise ValueError(f"windows of different widths {sorted(widths)} have no Hugging Face form.")
    everywhere = windowed and None not in (cfg.windows or ())
    if cfg.qk_norm:
        choice, fits = "qwen3", cfg.qkv_bias == cfg.out_bias and not cfg.mlp_bias
    elif windowed and everywhere and not cfg.qkv_bias:
        choice, fits = "mistral", not cfg.out_bias and not cfg.mlp_bias
    elif cfg.qkv_bias and not cfg.out_bias:
        choice, fits = "qwen2", not cfg.mlp_bias
    else:
        choice, fits = "llama", cfg.qkv_bias == cfg.out_bias and not windowed
    if not fits:
        raise ValueError(
            f"no Hugging Face family has this mix of qkv_bias={cfg.qkv_bias}, "
            f"out_bias={cfg.out_bias}, mlp_bias={cfg.mlp_bias}, qk_norm={cfg.qk_norm} and "
            f"windows={cfg.windows}: the nearest is {choice}."
        )
    return choice


def to_hf(cfg: Config, dtype: str = "float32") -> dict[str, Any]:
    """The ``config.json`` of a decoder, in the newer style (``rope_parameters``).

    ``rope_theta`` and ``rope_scaling`` are written beside it, for readers of the older style.

    Raises:
        ValueError: no supported family can express the config.
    """
    family = family_of(cfg)
    common = {
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_stddev,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if family == "longreach":
        return {**common, "architectures": [], "decoder": dataclasses.asdict(cfg)}
    if family == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            **common,
            "n_embd": cfg.hidden_size,
            "n_layer": cfg.num_layers,
            "n_head": cfg.num_heads,
            "n_inner": cfg.intermediate_size,
            "n_positions": cfg.max_length,
            "layer_norm_epsilon": cfg.norm_eps,
            "activation_function": _EXPORTED_ACTIVATIONS[cfg.activation],
        }
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    return {
        "architectures": [f"{names[family]}ForCausalLM"],
        **common,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_length,
        "hidden_act": _EXPORTED_ACTIVATIONS[cfg.activation],
        "rms_norm_eps": cfg.norm_eps,
        **_family_switches(cfg, family),
        **write_rope(cfg.rope_base, cfg.rope, cfg.rotary_dim),
    }


def _family_switches(cfg: Config, family: str) -> dict[str, Any]:
    if family == "llama":
        return {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}
    width = next((w for w in cfg.windows or () if w is not None), None)
    if family == "mistral":
        return {"sliding_window": width}
    sliding = [w is not None for w in cfg.windows or (None,) * cfg.num_layers]
    switches = {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
        # What readers that do not know layer_types go by.
        "max_window_layers": sliding.index(True) if any(sliding) else cfg.num_layers,
    }
    return switches | ({"attention_bias": cfg.qkv_bias} if family == "qwen3" else {})
