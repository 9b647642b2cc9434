"""Models in GGUF files: tensors, settings and tokenizer of the llama, qwen2 and qwen3 families.

The container is parsed by the ``gguf`` package; the quantised blocks are decoded here, all rows at
once. Formats: F32, F16, BF16, Q8_0, Q4_0, Q4_1. Block layouts follow the ggml library.
"""

import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader

from models.decoder import Config
from models.positions import RopeScaling

BLOCK = 32
"""Weights per quantised block."""

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Settings of an architecture that would change the computation, with their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
    "attention.causal": (True,),
}


def dequantize(kind: str, rows: np.ndarray) -> np.ndarray:
    """Float values of quantised rows.

    Q8_0 is ``d * q``, Q4_0 ``d * (q - 8)``, Q4_1 ``d * q + m``, with d and m float16 per block of
    32 and, for 4 bits, low nibbles holding the first 16 weights of a block.

    Args:
        kind: F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
        rows: bytes of the rows, uint8 (..., bytes per row).

    Returns:
        (..., weights per row): float32, or float16 and bfloat16 for F16 and BF16.

    Raises:
        ValueError: another kind.
    """
    rows = np.ascontiguousarray(rows)
    if kind in ("F32", "F16", "BF16"):
        plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        return rows.view(plain[kind])
    sizes = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
    if kind not in sizes:
        raise ValueError(f"{kind} is not supported: use F32, F16, BF16, {', '.join(sizes)}.")
    blocks = rows.reshape(*rows.shape[:-1], -1, sizes[kind])
    scale = blocks[..., :2].view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        values = scale * blocks[..., 2:].view(np.int8)
    else:
        packed = blocks[..., -16:]
        nibbles = np.concatenate([packed & 15, packed >> 4], -1)
        if kind == "Q4_0":
            values = scale * (nibbles.astype(np.float32) - 8.0)
        else:
            values = scale * nibbles + blocks[..., 2:4].view(np.float16).astype(np.float32)
    return values.reshape(*rows.shape[:-1], -1)


def half_split_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * d, ...) ordered for pairs (2j, 2j+1), reordered for pairs (j, j + d/2).

    A rotation of neighbouring channels then equals this workspace's rotation of two halves.
    """
    pairs = w.reshape(heads, -1, 2, *w.shape[1:])
    return pairs.swapaxes(1, 2).reshape(w.shape)


class GGUF:
    """A GGUF file as a ``TensorSource`` under Hugging Face names, with its settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, truncated, or of an unsupported architecture.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist: name a .gguf file.")
        try:
            reader = GGUFReader(self.path)
            self._fields = {name: field for name, field in reader.fields.items()}
            self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path} is not a complete GGUF file ({error}): fetch it again."
            ) from error
        if reader.endianess != GGUFEndian.LITTLE:
            raise ValueError(f"{self.path} is big-endian: convert it to little-endian first.")
        self.architecture: str = self.value("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{self.path} has general.architecture {self.architecture!r}, which is not "
                f"supported: supported are {', '.join(_ARCHITECTURES)}."
            )
        self.cfg = self._config()

    @property
    def label(self) -> str:
        """The path."""
        return str(self.path)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, or the default if the key is absent."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def names(self) -> list[str]:
        """Hugging Face names of the tensors; those without one keep their own."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, row-major: the file lists the innermost dimension first."""
        return tuple(int(size) for size in self._tensors[name].shape[::-1])

    def read(self, name: str) -> np.ndarray:
        """The tensor dequantised, q and k rows in half-split order.

        Raises:
            ValueError: stored in an unsupported quantisation; both are named.
        """
        tensor = self._tensors[name]
        kind = GGMLQuantizationType(tensor.tensor_type).name
        try:
            rows = tensor.data if tensor.data.dtype == np.uint8 else tensor.data.view(np.uint8)
            values = dequantize(kind, rows).reshape(self.shape(name))
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name} in {self.path}: {error}") from error
        # Only the llama architecture is stored for neighbouring pairs.
        if self.architecture == "llama" and ".q_proj." in name:
            return half_split_rows(values, self.cfg.num_heads)
        if self.architecture == "llama" and ".k_proj." in name:
            return half_split_rows(values, self.cfg.num_kv_heads)
        return values

    def _setting(self, key: str, default: Any = None) -> Any:
        value = self.value(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(
                f"{self.path} lacks {self.architecture}.{key}: convert the model to GGUF again."
            )
        return value

    def _config(self) -> Config:
        for key, neutral in _NEUTRAL.items():
            name = f"{self.architecture}.{key}"
            if name in self._fields and self.value(name) not in neutral:
                raise ValueError(
                    f"{self.path} sets {name} to {self.value(name)!r}, which is not supported: "
                    "this decoder does not compute it."
                )
        hidden, heads = self._setting("embedding_length"), self._setting("attention.head_count")
        head_dim = self._setting("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._setting(key, head_dim) != head_dim:
                raise ValueError(
                    f"{self.path} sets {self.architecture}.{key} to {self._setting(key)}, which is "
                    f"not supported: it must be the head width {head_dim}."
                )
        layer = "model.layers.0."
        return Config(
            vocab_size=self.shape("model.embed_tokens.weight")[0]
            if "model.embed_tokens.weight" in self._tensors
            else self._setting("vocab_size"),
            hidden_size=hidden,
            num_layers=self._setting("block_count"),
            num_heads=heads,
            num_kv_heads=self._setting("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=self._setting("feed_forward_length"),
            max_length=self._setting("context_length"),
            # Stored as float32; the shortest decimal that gives it is what was meant.
            norm_eps=float(str(np.float32(self._setting("attention.layer_norm_rms_epsilon")))),
            qkv_bias=f"{layer}self_attn.q_proj.bias" in self._tensors,
            out_bias=f"{layer}self_attn.o_proj.bias" in self._tensors,
            qk_norm=self.architecture == "qwen3",
            tied="lm_head.weight" not in self._tensors,
            rope_base=float(self._setting("rope.freq_base", 10000.0)),
            rope=self._rope(),
        )

    def _rope(self) -> RopeScaling:
        kind = self._setting("rope.scaling.type", "none")
        if kind == "none":
            return RopeScaling()
        if kind not in ("linear", "yarn"):
            raise ValueError(
                f"{self.path} sets {self.architecture}.rope.scaling.type to {kind!r}, which is not "
                "supported: supported are none, linear and yarn."
            )
        trained = self._setting("rope.scaling.original_context_length", 0)
        return RopeScaling(kind, self._setting("rope.scaling.factor"), trained or None)


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or its own name if there is none."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name
