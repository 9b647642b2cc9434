"""The checkpoints that ship with the repository: complete, small, honest and usable."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from experiments import lc_pfn_prior, measure
from inference.drafter import NoDrafter
from inference.drafters.registry import make_drafter
from models import decoder, lc_pfn_io
from models.load import ASSETS, Model, load, shipped
from models.params import count
from research.approximation.lc_pfn.prior import sample_prior

LIMIT = 30e6
"""Bytes that one checkpoint may have."""
TEXT = '''import os


def read_lines(path):
    """Return the lines of a file."""
    with open(path, encoding="utf-8") as file:
        return file.readlines()


class Reader:
    def __init__(self, path):
        self.path = path
'''


@pytest.mark.parametrize("name", shipped())
def test_files_are_complete_and_small(name: str) -> None:
    folder = ASSETS / name
    files = {path.name for path in folder.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < LIMIT
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}
    card = (folder / "README.md").read_text()
    own = {
        "records-11m": ("| epochs |", "held-out"),
        "layerskip-5m": ("| epochs |", "python-5m has"),
        "smollm2-135m-draft": ("| acceptance |", "held-out"),
    }
    facts = own.get(name, ("| epochs |", "xz -9"))
    for fact in ("| command |", "| seed |", "| time |", "| commit |", *facts):
        assert fact in card, fact


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("python") else pytest.param(name, marks=pytest.mark.slow)
        for name in shipped()
    ],
)
def test_models_know_python(name: str) -> None:
    """The loss on a snippet is far below that of guessing, and far below that of a shuffled one."""
    model = load(name)
    ids = model.tokenizer.encode(TEXT)
    assert model.tokenizer.decode(ids) == TEXT

    @jax.jit
    def nats(tokens: jax.Array) -> jax.Array:
        hidden = decoder.forward(model.params, model.cfg, tokens[None]).hidden
        laws = jax.nn.log_softmax(decoder.unembed(model.params, model.cfg, hidden)[0])
        return -jnp.mean(jnp.take_along_axis(laws[:-1], tokens[1:, None], axis=1))

    loss = float(nats(jnp.asarray(ids)))
    mixed = np.random.default_rng(0).permutation(ids)
    assert loss < 0.5 * np.log(model.cfg.vocab_size) and loss < float(nats(jnp.asarray(mixed))) - 2


def test_the_draft_model_fits_the_base_model() -> None:
    base, draft = load("python-5m"), load("python-1m")
    assert base.tokenizer.fingerprint == draft.tokenizer.fingerprint
    sizes = [count(decoder.specs(m.cfg)) for m in (base, draft)]
    assert sizes[0] >= 5e6 and sizes[1] < 0.25 * sizes[0]


DRAFTERS = sorted(
    path.parent.name
    for path in ASSETS.glob("*/config.json")
    if path.parent.name not in (*shipped(), *lc_pfn_io.shipped())
)
"""Heads; each folder's name is that of the model they read and ends in the drafter's kind."""
ASKED = {"python-1m-specdec": ("python-5m", "specdec:python-1m:python-1m-specdec")}
"""Target and name of a drafter whose heads read another model than the target."""
FACTS = {"longspec": "top1/step1", "specdec": "auc"}
"""What a card measures, by the drafter's kind; of others it is that of the first head."""


def load_or_skip(target: str) -> Model:
    """The target, or the test is left out if it is a model that does not ship and is not here."""
    try:
        return load(target)
    except FileNotFoundError as error:
        if target in shipped():
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.rpartition("-")[0] in shipped() else pytest.mark.slow)
        for name in DRAFTERS
    ],
)
def test_drafters_are_complete_small_and_draft(name: str) -> None:
    """Greedy text is that of plain decoding, in clearly fewer passes."""
    folder = ASSETS / name
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < LIMIT
    card = (folder / "README.md").read_text()
    target, _, kind = name.rpartition("-")
    for fact in ("command", "seed", "time", "commit", FACTS.get(kind, "top1/head1")):
        assert f"| {fact} |" in card, fact
    target, asked = ASKED.get(name, (target, f"{kind}:{name}"))
    model = load_or_skip(target)
    drafter, params = make_drafter(asked, model)
    prompts = [model.tokenizer.encode(TEXT)]
    out = measure.generate(model, drafter, params, prompts, 64, 0.0, 0)
    plain = measure.generate(model, NoDrafter(drafter.width), None, prompts, 64, 0.0, 0)
    assert out.tokens == plain.tokens
    assert out.tokens_per_pass > 1.3


@pytest.mark.slow
@pytest.mark.parametrize("name", lc_pfn_io.shipped())
def test_curve_predictors_are_complete_and_know_their_prior(name: str) -> None:
    """Likelier than the last value with a normal law; intervals cover what they say."""
    folder = ASSETS / name
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < LIMIT
    card = (folder / "README.md").read_text()
    for fact in ("| command |", "| seed |", "| time |", "| commit |", "| log_likelihood/20 |"):
        assert fact in card, fact
    curves = np.asarray(sample_prior(jax.random.key(11), 600).noisy, np.float64)
    found = lc_pfn_prior.measure_network(lc_pfn_io.load(name), curves[:100], (5, 40))
    last = lc_pfn_prior.measure_baseline("last", curves[100:], curves[:100], (5, 40))
    assert (np.array(found["log_likelihood"]) > np.array(last["log_likelihood"]) + 0.3).all()
    assert 0.85 < np.mean(found["coverage"]) < 0.96


def test_only_checkpoints_lie_there() -> None:
    folders = {p.name for p in pathlib.Path(ASSETS).iterdir() if p.is_dir()}
    assert folders == {*shipped(), *lc_pfn_io.shipped(), *DRAFTERS}
