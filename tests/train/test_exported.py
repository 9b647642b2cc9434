"""The loader of exports: equal to the model, alone in a process of its own, and suspicious."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.inference.models import (
    VOCAB,
    assert_greedy,
    config,
    engine,
    forward_logits,
    prompts,
    weights,
)
from tests.source_tree import ROOT
from tests.train.exporting import write_programs
from train import exported

LENGTH, NEW = 48, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("stablehlo")
    write_programs(path, weights(config()), config(), ["cpu"], length=LENGTH)
    return path


@pytest.fixture(scope="module")
def program(folder: pathlib.Path) -> exported.Program:
    return exported.load(folder, "cpu")


@pytest.fixture
def copy(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the export, to damage."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_manifest(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 37), (2, LENGTH)])
def test_forward_equals_the_decoder(program, rows, length):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length))
    got = program(tokens)
    for row, text in zip(got, tokens, strict=True):
        np.testing.assert_allclose(row, forward_logits(config(), text), atol=1e-5)


def test_generation_equals_the_engine(program):
    got = program.generate(prompts(), NEW)
    for prompt, new in zip(prompts(), got, strict=True):
        assert len(new) == NEW
        assert_greedy(config(), prompt, new)
    assert got == engine().generate(prompts(), NEW).tokens


def test_generation_ends_at_an_end_token(program):
    plain = program.generate(prompts(), NEW)
    eos = plain[0][2]
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in plain]
    assert program.generate(prompts(), NEW, eos=[eos]) == cut != plain


def test_each_step_gives_the_logits_of_the_text_so_far(program):
    text = prompts(9)[0]
    want = forward_logits(config(), text)
    cache = program.init_cache(1, slots=16)
    for i, token in enumerate(text):
        cache, following, logits = program.decode_step(cache, np.asarray([token], np.int32))
        np.testing.assert_allclose(logits[0], want[i], atol=1e-5)
        assert following[0] == np.argmax(logits[0])


def test_a_full_cache_says_so(program):
    cache = program.init_cache(2, slots=2)
    seen = []
    for _ in range(3):
        cache, following, _ = program.decode_step(cache, np.zeros(2, np.int32))
        seen.append(np.asarray(following).min() >= 0)
    assert seen == [True, True, False]


def test_the_loader_runs_without_the_code_of_the_model(folder, program, tmp_path):
    """One file in an empty folder, in a process that cannot see this repository."""
    shutil.copyfile(ROOT / "train" / "exported.py", tmp_path / "exported.py")
    command = [sys.executable, "-I", "-c", _ALONE, str(tmp_path), str(folder), str(NEW), str(ROOT)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split(",") == [str(x) for x in program.generate([[1, 2, 3]], NEW)[0]]
    ours = {name.split(".")[0] for name in lines[1].split()}
    assert "exported" in ours and not ours & {"ops", "models", "inference", "train", "flax"}
    found = np.asarray(json.loads(lines[2]), np.float32)
    np.testing.assert_allclose(found, forward_logits(config(), [1, 2, 3]), atol=1e-5)


_ALONE = """
import sys
here, folder, new, root = sys.argv[1:]
sys.path = [here] + [p for p in sys.path if p not in ("", root)]
import exported
assert exported.main([folder, "--tokens=1,2,3", "--new=" + new]) == 0
print(" ".join(sys.modules))
print(exported.load(folder, "cpu")([[1, 2, 3]])[0].tolist())
"""


@pytest.mark.parametrize("file", ["weights.safetensors", "forward.cpu.stablehlo"])
def test_damaged_and_missing_files_are_refused(copy, file):
    path = copy / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file} is truncated or changed"):
        exported.load(copy, "cpu")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing: copy the whole folder"):
        exported.load(copy, "cpu")


def test_one_changed_bit_is_refused(copy):
    path = copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="sha256 is not the manifest's"):
        exported.load(copy, "cpu")


def test_other_manifests_are_refused(copy):
    edit_manifest(copy, schema=99)
    with pytest.raises(ValueError, match="schema 99 and this loader reads 1"):
        exported.load(copy, "cpu")
    edit_manifest(copy, schema=1, weights="../weights.safetensors")
    with pytest.raises(ValueError, match="outside its folder"):
        exported.load(copy, "cpu")
    (copy / "manifest.json").write_text("[1")
    with pytest.raises(ValueError, match="is not JSON"):
        exported.load(copy, "cpu")
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="schema None"):
        exported.load(copy, "cpu")
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="stablehlo folder of an export"):
        exported.load(copy, "cpu")


def test_artefacts_that_jax_cannot_read_are_refused(copy):
    path = copy / "forward.cpu.stablehlo"
    path.write_bytes(b"not a module")
    hashes = json.loads((copy / "manifest.json").read_text())["sha256"]
    edit_manifest(
        copy, sha256=hashes | {path.name: exported.hashlib.sha256(b"not a module").hexdigest()}
    )
    with pytest.raises(ValueError, match=r"cannot read forward\.cpu\.stablehlo, written by jax"):
        exported.load(copy, "cpu")


def test_other_platforms_are_refused(folder, copy):
    with pytest.raises(ValueError, match="no artefacts for 'tpu', only for cpu"):
        exported.load(folder, "tpu")
    platforms = json.loads((copy / "manifest.json").read_text())["platforms"]
    edit_manifest(copy, platforms=platforms | {"tpu": platforms["cpu"]})
    with pytest.raises(ValueError, match="finds no tpu device"):
        exported.load(copy, "tpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p([[VOCAB]]), r"lie in 0\.\.23"),
        (lambda p: p([[-1]]), r"lie in 0\.\.23"),
        (lambda p: p([1, 2]), r"takes tokens of shape \['b', 't'\]"),
        (lambda p: p(np.zeros((1, LENGTH + 1))), "up to {'t': 48}"),
        (lambda p: p(np.zeros((1, 0))), "takes tokens of shape"),
        (lambda p: p.generate([[1], []], 4), "at least one token each"),
        (lambda p: p.generate([[1]], 0), "max_new_tokens >= 1"),
        (lambda p: p.generate([[VOCAB]], 4), r"lie in 0\.\.23"),
        (lambda p: p.generate([[1] * 40], 10), "need 49 cache slots and there are 48"),
        (lambda p: p.init_cache(1, slots=LENGTH + 1), "up to {'s': 48}"),
    ],
)
def test_bad_input_is_refused(program, call, message):
    with pytest.raises(ValueError, match=message):
        call(program)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert exported.main([str(tmp_path), "--tokens=1,2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "manifest.json is missing" in error
    assert len(error.splitlines()) == 1
