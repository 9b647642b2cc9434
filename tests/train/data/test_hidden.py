"""A target's hidden states on disk: what is written, what is refused, how windows are dealt."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from tests.inference.models import config, engine, weights
from train.data.hidden import (
    HELDOUT_EVERY,
    HiddenTexts,
    HiddenWindows,
    Text,
    generate_texts,
    heldout_batches,
    make_hidden_dataset,
    weights_hash,
    write_hidden,
)

TARGET = config(vocab_size=12, num_layers=1)
PROMPTS = 2 * HELDOUT_EVERY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random texts of 3 to 12 tokens, two per prompt."""
    rng = np.random.default_rng(0)
    texts = [
        Text(rng.integers(0, 12, 3 + i % 10).tolist(), 2, i % PROMPTS) for i in range(2 * PROMPTS)
    ]
    path = tmp_path_factory.mktemp("hidden") / "states"
    write_hidden(path, weights(TARGET), TARGET, texts, batch=PROMPTS)
    return path


def test_states_are_those_of_the_target(folder: pathlib.Path) -> None:
    texts = HiddenTexts(folder, target=weights_hash(weights(TARGET)))
    padded = np.zeros((len(texts.prompts), 12), np.int32)
    for row, (start, end) in enumerate(zip(texts.offsets, texts.offsets[1:], strict=False)):
        padded[row, : end - start] = texts.tokens[start:end]
    out = np.asarray(decoder.forward(weights(TARGET), TARGET, jnp.asarray(padded)).pre_norm)
    for row, (start, end) in enumerate(zip(texts.offsets, texts.offsets[1:], strict=False)):
        stored = np.asarray(texts.pre_norm[start:end], np.float32)
        np.testing.assert_allclose(stored, out[row, : end - start], atol=5e-3, rtol=2e-3)


def test_splits_part_by_prompt(folder: pathlib.Path) -> None:
    texts = HiddenTexts(folder)
    train, heldout = texts.chosen("train"), texts.chosen("heldout")
    assert sorted([*train, *heldout]) == list(range(2 * PROMPTS))
    assert not set(texts.prompts[train, 0]) & set(texts.prompts[heldout, 0])
    assert len(heldout) == 4


def test_windows_count_each_generated_token_once(folder: pathlib.Path) -> None:
    """Every generated token but a text's first two is the target of exactly one window."""
    texts = HiddenTexts(folder)
    windows = HiddenWindows(texts, "train", 4)
    counted = sum(int(windows[i]["mask"][1:].sum()) for i in range(len(windows)))
    sizes = np.diff(texts.offsets)[texts.chosen("train")]
    assert counted == int(np.sum(sizes - 2))
    assert all(w["pre_norm"].shape == (5, 16) and w["tokens"].shape == (6,) for w in (windows[0],))


def test_processes_share_batches(folder: pathlib.Path) -> None:
    texts = HiddenTexts(folder)
    parts = [list(heldout_batches(texts, 4, 4, i, 2)) for i in range(2)]
    whole = list(heldout_batches(texts, 4, 4))
    assert len(parts[0]) == len(parts[1]) == len(whole)
    total = sum(batch["mask"].sum() for part in parts for batch in part)
    assert total == sum(batch["mask"].sum() for batch in whole)
    split = [next(iter(make_hidden_dataset(texts, 4, 8, 0, i, 2))) for i in range(2)]
    one = next(iter(make_hidden_dataset(texts, 4, 8, 0)))
    got = np.concatenate([part["tokens"] for part in split])
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, one["tokens"].tolist()))


def test_the_target_writes_texts() -> None:
    target = engine(TARGET)
    prompts = [[1, 2, 3], [4], [5, 6]]
    texts = generate_texts(target, prompts, 6, temperatures=(0.0, 1.0), batch=3)
    assert [t.prompt for t in texts] == [1, 2, 0, 1, 2, 0]
    assert all(list(t.tokens[: t.prompt_length]) == prompts[t.prompt] for t in texts)
    greedy = target.generate(prompts, 6).tokens
    assert [list(t.tokens[t.prompt_length :]) for t in texts[:3]] == [greedy[i] for i in (1, 2, 0)]


def test_bad_input_is_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="another target"):
        HiddenTexts(folder, target="0" * 64)
    with pytest.raises(FileNotFoundError, match="write the target's"):
        HiddenTexts(tmp_path)
    with pytest.raises(ValueError, match="at least one token"):
        write_hidden(tmp_path / "x", weights(TARGET), TARGET, [Text([1], 1, 0)])
    with pytest.raises(FileExistsError):
        write_hidden(folder, weights(TARGET), TARGET, [Text([1, 2], 1, 0)])
    with pytest.raises(ValueError, match="smaller batches"):
        make_hidden_dataset(HiddenTexts(folder), 4, 10_000, 0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    broken = bytearray((copy / "pre_norm.npy").read_bytes())
    broken[-1] ^= 1
    (copy / "pre_norm.npy").write_bytes(bytes(broken))
    with pytest.raises(ValueError, match="damaged"):
        HiddenTexts(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        HiddenTexts(copy)
    assert not list(tmp_path.glob(".x*"))
