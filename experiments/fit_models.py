"""What ``experiments.fit`` compiles: models by their sizes, attention policies by name."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from inference.policies.registry import check_policy, make_policy
from models.attention import Step
from models.decoder import Config
from models.hf_config import from_hf, read_config

MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""The sizes in the public ``config.json`` of each."""


def config_of(name: str, layers: int | None = None) -> Config:
    """The config of a known name or of a local Hugging Face directory, with another depth if asked.

    Raises:
        ValueError: neither, or no positive number of layers.
    """
    if name in MODELS:
        cfg = from_hf(MODELS[name])
    elif Path(name).is_dir():
        cfg = read_config(name)
    else:
        raise ValueError(
            f"unknown model {name!r}: use {', '.join(MODELS)}, or a folder that holds config.json."
        )
    if layers is None:
        return cfg
    if layers < 1:
        raise ValueError(f"layers must be 1 or more, got {layers}.")
    windows = None if cfg.windows is None else (cfg.windows * layers)[:layers]
    return dataclasses.replace(cfg, num_layers=layers, windows=windows)


def policy_of(name: str, cfg: Config) -> Any:
    """The attention policy of that name for the model, if shapes and the name say all about it.

    Raises:
        ValueError: an unknown policy, one that the model cannot have, or one that is read from
            files.
    """
    form, _ = check_policy(name)
    if form.endswith((":DIR", ":FILE")):
        raise ValueError(
            f"policy {name!r} is read from what a run has written, and here are only shapes: ask "
            "for one that is all in its name, such as dual_chunk:6144:1024 or yarn:4."
        )
    policy = make_policy(name, cfg)
    row = jnp.zeros(1, jnp.int32)
    step = Step(row[None], start=row, slot_positions=row[None], lengths=row, mode="decode")
    jax.eval_shape(lambda: policy.prepare(cfg, step))  # a model that it refuses, it refuses here
    return policy
