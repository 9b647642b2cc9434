"""The tokenizer that a GGUF file carries, chat template included."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from models.gguf import GGUF
from models.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level()]
    ),
    "qwen2": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
            _byte_level(use_regex=False),
        ]
    ),
}


def read_tokenizer(file: GGUF) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        ValueError: another kind of tokenizer, or a pre-tokenizer that is not known here (named).
    """
    kind, pre = file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(
            f"{file.label} has tokenizer.ggml.model {kind!r}: only byte-level BPE ('gpt2') is "
            "supported, so use the model's Hugging Face directory."
        )
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{file.label} has tokenizer.ggml.pre {pre!r}: known are {', '.join(_PRE_TOKENIZERS)}, "
            "so use the model's Hugging Face directory."
        )
    tokens = file.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges", [])]
    types = file.value("tokenizer.ggml.token_type", [1] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges))
    if pre == "qwen2":
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    raw.decoder = decoders.ByteLevel()
    special = [token for token, t in zip(tokens, types, strict=True) if t == _CONTROL]
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    raw.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, t in zip(tokens, types, strict=True)
            if t == _USER_DEFINED
        ]
    )
    ends = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = file.value(f"tokenizer.ggml.{key}_token_id")
        ends[f"{name}_token"] = None if index is None else tokens[index]
    bos = ends["bos_token"]
    if file.value("tokenizer.ggml.add_bos_token", False) and bos is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return Tokenizer(raw, chat_template=file.value("tokenizer.chat_template"), **ends)
