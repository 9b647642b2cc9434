"""The command that lets a model write texts and keeps its hidden states."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from inference.engine import Engine
from models.load import Model, load
from models.stories import convert
from tests.inference.models import VOCAB, config, letters, weights
from train.data import collect as module
from train.data.hidden import HiddenTexts, weights_hash

ROOT = pathlib.Path(__file__).parents[3]
STORIES = ROOT / "tests" / "data" / "stories260k"


def collect(*flags: str) -> subprocess.CompletedProcess:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "train.data.collect", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_an_interrupted_collection_goes_on(tmp_path: pathlib.Path, monkeypatch) -> None:
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8], [9]]
    calls: list[int] = []
    generate = Engine.generate

    def counted(engine: Engine, given: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(given))
        return generate(engine, given, *args, **options)

    monkeypatch.setattr(Engine, "generate", counted)

    def run(folder: pathlib.Path, stop_at: int = 99, new: int = 6) -> int:
        def stop(done: int, total: int) -> None:
            if done >= stop_at:
                raise KeyboardInterrupt

        return module.collect(model, prompts, folder, new, (0.0, 1.0), 2, stop)

    whole = run(tmp_path / "whole")
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=6)
    assert calls == [2, 2, 2] and not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="of another computation"):
        run(tmp_path / "cut", new=7)
    assert run(tmp_path / "cut") == whole
    assert calls == [2, 2, 2, 2]
    for name in ("tokens.npy", "offsets.npy", "pre_norm.npy"):
        one, other = (np.load(tmp_path / place / name) for place in ("whole", "cut"))
        np.testing.assert_array_equal(one, other)
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "cut"}
    with pytest.raises(FileExistsError, match="is not empty"):
        run(tmp_path / "cut")
    assert len(calls) == 4


@pytest.mark.slow
def test_the_command_writes_states_of_the_models_own_texts(tmp_path: pathlib.Path) -> None:
    convert(STORIES / "stories260K.bin", STORIES / "tok512.bin", tmp_path / "model")
    lines = '{"question": "Once upon a time"}\n' * 9
    (tmp_path / "q.jsonl").write_text(lines)
    flags = [f"--target={tmp_path / 'model'}", f"--prompts={tmp_path / 'q.jsonl'}:question"]
    flags += ["--count=3", "--max_new_tokens=9", "--temperatures=0,1.5", "--batch=4"]
    done = collect(*flags, f"--out={tmp_path / 'hidden'}")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 texts" in done.stderr
    model = load(tmp_path / "model")
    texts = HiddenTexts(tmp_path / "hidden", target=weights_hash(model.params))
    assert len(texts.prompts) == 6 and texts.pre_norm.shape == (texts.offsets[-1], 64)
    prompt = model.tokenizer.encode_prompt("Once upon a time")
    for start in texts.offsets[:-1]:
        np.testing.assert_array_equal(texts.tokens[start : start + len(prompt)], prompt)
    again = collect(*flags, f"--out={tmp_path / 'hidden'}")
    assert again.returncode == 1 and again.stderr.count("error: ") == 1
    assert "Traceback" not in again.stderr
