"""The command that lets a model write texts and keeps its hidden states."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from models.load import load
from models.stories import convert
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
