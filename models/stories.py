"""llama2.c checkpoints (``.bin``) with their tokenizer, converted to a Hugging Face directory.

Run as ``python -m models.stories CHECKPOINT TOKENIZER OUT``. Only the first version of the format
(the one without a magic number) is read: seven little-endian int32, then float32 tensors, all
layers of one kind together.
"""

import argparse
import pathlib
import tempfile

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as RawTokenizer

from models.decoder import Config
from models.gguf import half_split_rows
from models.hf import assemble, save_hf
from models.tokenizer import Tokenizer

_HEADER = 7
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


class LlamaC:
    """A llama2.c checkpoint as a ``TensorSource`` under Hugging Face names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint, or truncated.
    """

    def __init__(self, path: str | pathlib.Path):
        self.label = str(path)
        data = pathlib.Path(path).read_bytes()
        header = np.frombuffer(data[: 4 * _HEADER], "<i4")
        if header.size < _HEADER or min(*header[:5], abs(int(header[5])), header[6]) < 1:
            raise ValueError(
                f"{path} is not a llama2.c checkpoint (bad header): name a first-version .bin."
            )
        hidden, inner, layers, heads, kv_heads, vocab, length = (int(x) for x in header)
        self.cfg = Config(
            vocab_size=abs(vocab),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            intermediate_size=inner,
            max_length=length,
            tied=vocab > 0,
        )
        self._tensors: dict[str, np.ndarray] = {}
        self._cut(np.frombuffer(data[4 * _HEADER :][: (len(data) - 4 * _HEADER) // 4 * 4], "<f4"))

    def _cut(self, floats: np.ndarray) -> None:
        cfg = self.cfg
        kv_width, rotary = cfg.num_kv_heads * cfg.head_dim, cfg.max_length * cfg.head_dim // 2
        square, wide = (cfg.hidden_size, cfg.hidden_size), (cfg.intermediate_size, cfg.hidden_size)
        plan: list[tuple[str | None, tuple[int, ...], bool]] = [
            ("model.embed_tokens.weight", (cfg.vocab_size, cfg.hidden_size), False),
            ("input_layernorm.weight", (cfg.hidden_size,), True),
            ("self_attn.q_proj.weight", square, True),
            ("self_attn.k_proj.weight", (kv_width, cfg.hidden_size), True),
            ("self_attn.v_proj.weight", (kv_width, cfg.hidden_size), True),
            ("self_attn.o_proj.weight", square, True),
            ("post_attention_layernorm.weight", (cfg.hidden_size,), True),
            ("mlp.gate_proj.weight", wide, True),
            ("mlp.down_proj.weight", wide[::-1], True),
            ("mlp.up_proj.weight", wide, True),
            ("model.norm.weight", (cfg.hidden_size,), False),
            (None, (2 * rotary,), False),  # tables of cos and sin, computed here instead
        ]
        if not cfg.tied:
            plan.append(("lm_head.weight", (cfg.vocab_size, cfg.hidden_size), False))
        sizes = [int(np.prod(shape)) * (cfg.num_layers if each else 1) for _, shape, each in plan]
        if sum(sizes) != floats.size:
            raise ValueError(
                f"{self.label} holds {floats.size} weights but its header asks for {sum(sizes)}: "
                "the file is truncated or of another version, so fetch it again."
            )
        start = 0
        for (name, shape, each), size in zip(plan, sizes, strict=True):
            part = floats[start : start + size]
            start += size
            if name is not None and each:
                for i, tensor in enumerate(part.reshape(cfg.num_layers, *shape)):
                    self._tensors[f"model.layers.{i}.{name}"] = tensor
            elif name is not None:
                self._tensors[name] = part.reshape(shape)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """The tensor, float32, q and k rows in half-split order."""
        if ".q_proj." in name:
            return half_split_rows(self._tensors[name], self.cfg.num_heads)
        if ".k_proj." in name:
            return half_split_rows(self._tensors[name], self.cfg.num_kv_heads)
        return self._tensors[name]


def read_pieces(path: str | pathlib.Path, vocab_size: int) -> list[tuple[bytes, float]]:
    """Pieces and scores of a llama2.c tokenizer file, by id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not hold exactly ``vocab_size`` pieces.
    """
    data, at, pieces = pathlib.Path(path).read_bytes(), 4, []
    while at + 8 <= len(data):
        score = float(np.frombuffer(data, "<f4", 1, at)[0])
        size = int(np.frombuffer(data, "<i4", 1, at + 4)[0])
        if size < 0 or at + 8 + size > len(data):
            break
        pieces.append((data[at + 8 : at + 8 + size], score))
        at += 8 + size
    if at != len(data) or len(pieces) != vocab_size:
        raise ValueError(
            f"{path} does not hold exactly {vocab_size} pieces: name the tokenizer file that "
            "belongs to the checkpoint, whole."
        )
    return pieces


def build_tokenizer(pieces: list[tuple[bytes, float]]) -> Tokenizer:
    """A BPE tokenizer whose merges are all pairs that join to a piece, best score first.

    llama2.c merges the pair with the best score, the leftmost of equals. Pairs that join to one
    piece share its score there but are ranked here, so strings in which two of them overlap (long
    runs of one letter) may in principle be cut differently.
    """
    names = [piece.decode("utf-8") for piece, _ in pieces]
    names[:3] = [UNK, BOS, EOS]
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for i in sorted(range(259, len(names)), key=lambda i: -pieces[i][1]):
        name = names[i]
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        merges += [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    raw = RawTokenizer(models.BPE(vocab=ids, merges=merges, unk_token=UNK, byte_fallback=True))
    raw.normalizer = normalizers.Prepend(" ")
    raw.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in names[:3]])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return Tokenizer(raw, bos_token=BOS, eos_token=EOS)


def convert(
    checkpoint: str | pathlib.Path, tokenizer: str | pathlib.Path, out: str | pathlib.Path
) -> None:
    """Write a llama2.c checkpoint and its tokenizer as a Hugging Face directory ``out``.

    Raises:
        FileNotFoundError, ValueError: see :class:`LlamaC` and :func:`read_pieces`.
        FileExistsError, OSError: see ``save_hf``.
    """
    source = LlamaC(checkpoint)
    params = assemble(source.cfg, source)
    built = build_tokenizer(read_pieces(tokenizer, source.cfg.vocab_size))
    with tempfile.TemporaryDirectory() as scratch:
        built.save(scratch)
        save_hf(out, params, source.cfg, tokenizer_dir=scratch)


def main() -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(description="llama2.c checkpoint to a Hugging Face directory")
    parser.add_argument("checkpoint")
    parser.add_argument("tokenizer")
    parser.add_argument("out")
    args = parser.parse_args()
    convert(args.checkpoint, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
