"""The sentence encoder against a float64 re-expression, and what it refuses."""

import json
import math
import pathlib

import numpy as np
import pytest
import tokenizers

from models.bert import load
from models.safetensors_io import save_arrays
from research.speculative.rapid.retrieval import Embedding, retrieve

WIDTH, INNER, LAYERS, HEADS, VOCAB, LONGEST = 8, 12, 2, 2, 30, 16
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"the cat sat on a mat dog ran far away".split()]


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by their published names."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def dense(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = rng.normal(0, 0.5, (columns, rows)).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.5, columns).astype(np.float32)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = rng.normal(1, 0.2, WIDTH).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.2, WIDTH).astype(np.float32)

    for name, rows in (("word", VOCAB), ("position", LONGEST), ("token_type", 2)):
        found[f"embeddings.{name}_embeddings.weight"] = rng.normal(0, 1, (rows, WIDTH)).astype(
            np.float32
        )
    norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            dense(f"{at}.attention.{part}", WIDTH, WIDTH)
        dense(f"{at}.intermediate.dense", WIDTH, INNER)
        dense(f"{at}.output.dense", INNER, WIDTH)
        norm(f"{at}.attention.output.LayerNorm")
        norm(f"{at}.output.LayerNorm")
    dense("pooler.dense", WIDTH, WIDTH)
    return found


def make_folder(path: pathlib.Path, **changes: object) -> pathlib.Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "bert", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": LONGEST, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | changes))
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # Published files pad and cut to 128 tokens: both would change what is compared.
    tokenizer.enable_padding(length=LONGEST)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path / "tokenizer.json"))
    save_arrays(arrays(), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_folder(tmp_path_factory.mktemp("bert"))


def reexpressed(text: str) -> np.ndarray:
    """One text's vector in float64, without padding."""
    w = {name: array.astype(np.float64) for name, array in arrays().items()}
    known = {word: i for i, word in enumerate(WORDS)}
    ids = [1, *(known.get(word, 3) for word in text.split()), 2]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    h = w["embeddings.word_embeddings.weight"][ids]
    h = h + w["embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(h + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        at, size = f"encoder.layer.{i}", WIDTH // HEADS
        q, k, v = (
            dense(h, f"{at}.attention.self.{n}").reshape(-1, HEADS, size)
            for n in ("query", "key", "value")
        )
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        law = np.exp(scores - scores.max(-1, keepdims=True))
        law /= law.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", law, v).reshape(-1, WIDTH)
        mixed = dense(mixed, f"{at}.attention.output.dense")
        h = norm(h + mixed, f"{at}.attention.output.LayerNorm")
        inner = gelu(dense(h, f"{at}.intermediate.dense"))
        h = norm(h + dense(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = h.mean(0)
    return mean / np.linalg.norm(mean)


def test_vectors_are_those_of_the_formula(folder: pathlib.Path):
    texts = ["the cat sat on a mat", "a dog", "ran far away the dog ran far away", "unheard word"]
    found = load(folder)(texts)
    np.testing.assert_allclose(found, [reexpressed(text) for text in texts], atol=1e-5)
    assert load(folder)([]).shape == (0, WIDTH)


def test_a_drafter_s_context_can_be_retrieved_by_vectors(folder: pathlib.Path):
    chunks = ["the cat sat on a mat", "dog ran far away", "a a a on on"]
    found = retrieve(
        "\n\n".join(chunks), "dog ran far away", Embedding(load(folder)),
        lambda text: len(text.split()), size=6, budget=6,
    )  # fmt: skip
    assert found == "dog ran far away"


def test_what_is_no_encoder_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        load(make_folder(tmp_path / "a", hidden_act="relu"))
    with pytest.raises(ValueError, match=r"has shape .* the config asks for"):
        load(make_folder(tmp_path / "b", intermediate_size=INNER + 1))
    with pytest.raises(ValueError, match=r"lacks encoder\.layer\.2"):
        load(make_folder(tmp_path / "c", num_hidden_layers=3))
    (make_folder(tmp_path / "d") / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged config or tokenizer"):
        load(tmp_path / "d")
    with pytest.raises(ValueError, match="a text has 22 tokens and the encoder reads 16"):
        load(make_folder(tmp_path / "e"))(["cat " * 20])
