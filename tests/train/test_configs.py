"""Every config resolves; those of language models run two updates on a little text."""

import importlib
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from configs.defaults import Config
from models import decoder, params
from models.hf import save_hf
from models.load import shipped
from models.sharding import make_mesh
from tests.source_tree import ROOT
from tests.train.text import write_corpus
from train import loop
from train.config import TrainConfig, build, build_task
from train.metrics import read_metrics
from train.sweep.plan import at_point, example_points, load_sweep
from train.task import Task

NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if "def get_config" in path.read_text(encoding="utf-8")
)
LANGUAGE_MODELS = [name for name in NAMES if name.endswith("_lm")]
FINE_TUNED = [
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if '"start_from"' in path.read_text(encoding="utf-8")
]


def in_tiers(names: Sequence[str]) -> list[Any]:
    """All but the first are slow tests: they differ in their data more than in what they run."""
    first, *others = sorted(names)
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def module(name: str) -> types.ModuleType:
    return importlib.import_module(f"configs.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_resolves_and_says_how_to_run_it(name: str):
    config = build(TrainConfig, module(name).get_config().to_dict())
    assert isinstance(build_task(config), Task)
    assert f"--config=configs/{name}.py" in (module(name).__doc__ or "")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("[a-z]*.py")), ids=str)
def test_every_sweep_resolves_and_says_how_to_run_it(path: pathlib.Path):
    sweep = load_sweep(path)
    for point in example_points(sweep):
        assert isinstance(build_task(at_point(sweep, point)), Task)
    assert f"--sweep=configs/sweeps/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", in_tiers(LANGUAGE_MODELS))
def test_language_models_run_two_updates(name: str, tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setenv("LONGREACH_DATA", str(tmp_path / "cache"))
    config = module(name).get_config()
    config.task.corpus, config.task.tokenizer = write_corpus(tmp_path)
    assert_two_updates(config, tmp_path)


@pytest.mark.parametrize("name", in_tiers(FINE_TUNED))
def test_fine_tunings_run_two_updates(name: str, tmp_path: pathlib.Path, monkeypatch):
    """From a model of one layer, with random weights."""
    monkeypatch.setenv("LONGREACH_DATA", str(tmp_path / "cache"))
    config = module(name).get_config()
    assert config.task.start_from in shipped()
    config.task.corpus, config.task.tokenizer = write_corpus(tmp_path)
    config.task.model.num_layers = 1
    cfg = build_task(build(TrainConfig, config.to_dict())).model
    weights = params.init(decoder.specs(cfg), jax.random.key(0))
    config.task.start_from = str(tmp_path / "base")
    save_hf(config.task.start_from, weights, cfg, config.task.tokenizer)
    assert_two_updates(config, tmp_path)


def assert_two_updates(config: Config, folder: pathlib.Path) -> None:
    """Two updates of short rows, from about the loss of a uniform law."""
    config.task.sequence_length, config.batch_size = 16, 2
    config.task.whole_documents = False  # the texts at hand are longer than a row
    config.steps_per_call = 1
    config.steps, config.log_every, config.optimizer.warmup_steps = 2, 1, 1
    result = loop.train(
        build(TrainConfig, config.to_dict()), folder / "run", make_mesh("", jax.devices()[:1])
    )
    losses = [x["loss"] for x in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in x]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(np.log(config.task.model.vocab_size), rel=0.05)
    assert set(result.evaluation) >= {"bits_per_byte", "nats_per_token"}
