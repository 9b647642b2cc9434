"""Runs and models to Hugging Face directories with their cards, and what is refused."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_lm
from models.hf import load_hf
from models.load import load
from models.sharding import make_mesh
from tests.inference.models import config, letters, save_model, weights
from tests.source_tree import ROOT
from tests.train.exporting import unchecked_shapes
from tests.train.regression import make
from train import exported, loop
from train.card import run_facts
from train.config import TrainConfig, build
from train.data.bpe import train_bpe
from train.export import Options, export_model, export_run
from train.run_folder import describe_run
from train.state import TrainState
from train.trained import read_trained

STEPS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pathlib.Path, TrainState]]:
    """Texts, their tokenizer, and a run of a few updates with a moving average; its last state."""
    root = tmp_path_factory.mktemp("export")
    (root / "texts").mkdir()
    texts = [f"document {i}: " + "some words " * (i % 7) for i in range(60)]
    for i, text in enumerate(texts):
        (root / "texts" / f"{i}.txt").write_text(text)
    train_bpe(texts, 270).save(root / "tokenizer")
    values = tiny_lm.get_config()
    values.task.update({"corpus": f"text:{root / 'texts'}", "tokenizer": str(root / "tokenizer")})
    values.task.sequence_length = 16
    values.task.model.update({"vocab_size": 270, "hidden_size": 16, "num_layers": 1})
    values.steps, values.batch_size, values.ema_decay = STEPS, 2, 0.5
    values.optimizer.warmup_steps = 0
    values.log_every, values.checkpoint_every, values.evaluate_every = 2, 4, 4
    mesh = make_mesh("", jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(root / "cache"))
        (root / "run").mkdir()
        command = ["python", "-m", "train", f"--workdir={root / 'run'}"]
        describe_run(root / "run", values.to_dict(), command, mesh.shape)
        result = loop.train(build(TrainConfig, values.to_dict()), root / "run", mesh)
        yield root, result.state


@pytest.fixture(scope="module")
def root(made: tuple[pathlib.Path, TrainState]) -> pathlib.Path:
    """The folder of the texts, the tokenizer and the run."""
    return made[0]


@pytest.fixture(scope="module")
def written(root: pathlib.Path) -> pathlib.Path:
    """The run, exported with programs."""
    with unchecked_shapes():
        export_run(root / "run", root / "out", Options("bfloat16", ("cpu",)))
    return root / "out"


def test_the_directory_holds_the_average_of_the_newest_checkpoint(made, root, written):
    trained = read_trained(root / "run")
    assert trained.step == STEPS and trained.averaged
    params, cfg = load_hf(written)
    assert cfg == trained.task.model
    want = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), made[1].average)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    model = load(written)
    assert model.tokenizer.decode(model.tokenizer.encode("some words")) == "some words"


def test_the_programs_compute_what_the_directory_holds(written):
    program = exported.load(written / "stablehlo", "cpu")
    assert {x.dtype.name for x in program.weights.values()} == {"bfloat16"}
    params, _ = load_hf(written)
    np.testing.assert_array_equal(program.weights["embed"], params.embed)
    assert np.isfinite(program([[1, 2, 3]])).all()


def test_the_card_says_what_the_run_says(root, written):
    card = (written / "README.md").read_text()
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.splitlines() if "| " in line)
    lines = [json.loads(x) for x in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    launch = json.loads((root / "run" / "run.json").read_text())["launches"][0]
    assert rows["updates"] == "6 of 6, 2 rows each" and rows["seed"] == "0"
    assert rows["weights"] == "moving average"
    total = sum(line.get("weight", 0) for line in lines)
    assert rows["targets"].startswith(f"{total:,.0f} (")
    last = [line for line in lines if "evaluation/bits_per_byte" in line][-1]
    assert last["step"] == STEPS
    assert rows["bits_per_byte"] == f"{last['evaluation/bits_per_byte']:.4g}"
    assert 0 < float(rows["epochs"]) < 1 and "by the metrics" in rows["time"]
    assert rows["command"] == "`python -m train --workdir=run`"
    assert launch["commit"] in rows["commit"] and launch["processor"] == rows["host"]
    assert f"jax {jax.__version__}" in rows["versions"]
    assert str(root) not in card and rows["tokenizer"] == "`tokenizer`"


def test_only_what_the_checkpoint_holds_is_counted(root, tmp_path):
    """A live run has logged more than it has saved, and may be writing a line."""
    run = pathlib.Path(shutil.copytree(root / "run", tmp_path / "run"))
    trained = read_trained(run)
    want = run_facts(run, trained, None)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "weight": 1000.0, "seconds_per_step": 100.0}\n')
        file.write('{"step": 8, "evaluation/bits_per_byte": 0.1}\n{"step": 9, "wei')
    assert run_facts(run, trained, None) == want
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    earlier = run_facts(run, read_trained(run), None)
    assert earlier["updates"].startswith("4 of 6") and earlier["targets"] != want["targets"]


def test_an_earlier_checkpoint_is_read_by_its_step(root):
    newest, earlier = read_trained(root / "run"), read_trained(root / "run", 4)
    assert (newest.step, earlier.step) == (STEPS, 4)
    assert not np.array_equal(newest.params.embed, earlier.params.embed)
    with pytest.raises(FileNotFoundError, match="no checkpoint after 5 updates, only after"):
        read_trained(root / "run", 5)


def test_reading_leaves_the_run_as_it_is(root, tmp_path):
    """What a live run is writing must not be cleaned away."""
    run = pathlib.Path(shutil.copytree(root / "run", tmp_path / "run"))
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    before = sorted(run.rglob("*"))
    read_trained(run)
    assert sorted(run.rglob("*")) == before


def test_a_model_is_exported_again(tmp_path):
    save_model(tmp_path / "model", config(), letters())
    export_model(str(tmp_path / "model"), tmp_path / "out", Options())
    params, cfg = load_hf(tmp_path / "out")
    assert cfg == config()
    jax.tree.map(np.testing.assert_array_equal, params.embed, weights(config()).embed)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The model `model`" in card and "| vocabulary | 24 |" in card


def test_programs_without_the_hugging_face_directory(tmp_path):
    save_model(tmp_path / "model", config(), letters())
    options = Options("float16", ("tpu",), length=128, batch=2, hf=False)
    export_model(str(tmp_path / "model"), tmp_path / "out", options)
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "stablehlo", "tokenizer.json", "tokenizer_config.json"}


def test_heads_are_exported_by_their_task(tmp_path, monkeypatch):
    saved: dict[str, Any] = {}
    loop.train(make(steps=4), tmp_path / "run", make_mesh("", jax.devices()[:1]))
    with pytest.raises(ValueError, match="Regression cannot be exported: give the task a method"):
        export_run(tmp_path / "run", tmp_path / "out", Options())
    task = type(read_trained(tmp_path / "run").task)

    def save(self: Any, trained: Any, directory: pathlib.Path, dtype: Any) -> None:
        saved.update(trained=trained, dtype=dtype)
        (pathlib.Path(directory) / "config.json").write_text("{}")

    monkeypatch.setattr(task, "save", save, raising=False)
    export_run(tmp_path / "run", tmp_path / "out", Options())
    assert saved["dtype"] == jnp.float32 and saved["trained"].first.shape == (8, 16)
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"README.md", "config.json"}
    with pytest.raises(ValueError, match="has no StableHLO form"):
        export_run(tmp_path / "run", tmp_path / "other", Options(stablehlo=("cpu",)))
    assert not (tmp_path / "other").exists()


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="name the --workdir of a training run"):
        export_run(tmp_path, tmp_path / "out", Options())
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        export_run(tmp_path, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(root, tmp_path):
    run = pathlib.Path(shutil.copytree(root / "run", tmp_path / "run"))
    for file in (run / "checkpoints" / str(STEPS) / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=rf"checkpoint .*{STEPS} cannot be read .*: remove"):
        export_run(run, tmp_path / "out", Options())


def test_folders_that_cannot_be_written_are_refused(root, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="full is not empty: choose a new folder"):
        export_run(root / "run", tmp_path / "full", Options())
    assert (tmp_path / "full" / "file").read_text() == "kept"
    original = pathlib.Path.mkdir

    def read_only(self: pathlib.Path, *args: Any, **kwargs: Any) -> None:
        if self.name == ".new.partial":
            raise PermissionError(30, "Read-only file system", str(self))
        original(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "mkdir", read_only)
    with pytest.raises(OSError, match=r"new could not be written .*Read-only file system"):
        export_run(root / "run", tmp_path / "new", Options())


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="unknown platform 'gpu' for StableHLO"):
        Options(stablehlo=("gpu",))
    with pytest.raises(ValueError, match="nothing to write: give --stablehlo"):
        Options(hf=False)


def test_the_command_says_what_is_wrong(root):
    words = [f"--run={root / 'none'}", f"--out={root / 'never'}"]
    done = subprocess.run(
        [sys.executable, "-m", "train.export", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {root / 'none'} has no checkpoint")
    assert not (root / "never").exists()
