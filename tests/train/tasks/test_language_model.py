"""The language model task: its loss, its data, its evaluation."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_lm
from models import decoder
from models.attention import DensePolicy, Frequencies, Step
from models.hf import save_hf
from models.positions import rope_frequencies
from models.sharding import make_mesh
from tests.train.text import write_corpus
from train import loop
from train.config import TrainConfig, build, build_task
from train.data.pipeline import DataConfig, load_tokens
from train.task import Context
from train.tasks import language_model
from train.tasks.language_model import LanguageModel


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory):
    """The tiny config on a little text."""
    folder = tmp_path_factory.mktemp("language_model")
    config = tiny_lm.get_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGREACH_DATA", str(folder / "cache"))
        config.task.corpus, config.task.tokenizer = write_corpus(folder)
        config.task.sequence_length, config.task.model.vocab_size = 24, 280
        config.steps, config.batch_size, config.log_every = 40, 4, 10
        config.optimizer.warmup_steps, config.evaluate_every = 4, 0
        yield config


def prepared(settings, **changes) -> tuple[LanguageModel, Context]:
    config = build(TrainConfig, settings.to_dict())
    task = dataclasses.replace(build_task(config), **changes)
    return task, Context(config, make_mesh("", jax.devices()[:1]))


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_mean_of_counted_targets(settings, unroll: bool, tied: bool):
    task, context = prepared(settings, unroll=unroll)
    task = dataclasses.replace(task, model=dataclasses.replace(task.model, tied=tied))
    params = task.init(jax.random.key(0), None, context)
    batch = {k: jnp.asarray(v) for k, v in next(iter(task.data(context))).items()}
    batch["mask"] = batch["mask"].at[0].set(0.0)
    value, metrics = task.loss(params, batch, jax.random.key(0))
    step = Step(batch["positions"], segments=batch["segments"])
    out = decoder.forward(params, task.model, batch["tokens"], step=step)
    logits = jax.nn.log_softmax(decoder.unembed(params, task.model, out.hidden))
    chosen = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    want = -jnp.sum(chosen * batch["mask"]) / jnp.sum(batch["mask"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert float(metrics["weight"]) == float(jnp.sum(batch["mask"]))


def test_a_batch_without_targets_has_a_finite_loss(settings):
    task, context = prepared(settings)
    params = task.init(jax.random.key(0), None, context)
    batch = {k: jnp.zeros_like(v) for k, v in next(iter(task.data(context))).items()}
    value, slopes = jax.value_and_grad(lambda p: task.loss(p, batch, jax.random.key(0))[0])(params)
    assert float(value) == 0.0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(slopes))


def test_a_uniform_model_needs_log_vocabulary_bits_per_token(settings):
    task, context = prepared(settings)
    params = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0), None, context))
    found = task.evaluate(params, context)
    reading = DataConfig(task.corpus, task.tokenizer, "validation", 24, 4, 0)
    tokens = load_tokens(reading)
    count = len(tokens.ids) + tokens.num_documents  # every token and every end of text
    np.testing.assert_allclose(found["nats_per_token"], math.log(280), rtol=1e-5)
    np.testing.assert_allclose(
        found["bits_per_byte"], math.log2(280) * count / tokens.num_bytes, rtol=1e-5
    )


def test_evaluation_does_not_depend_on_the_rows(settings):
    task, context = prepared(settings)
    params = task.init(jax.random.key(0), None, context)
    other = dataclasses.replace(task, evaluation_rows=3)
    first, second = task.evaluate(params, context), other.evaluate(params, context)
    np.testing.assert_allclose(first["bits_per_byte"], second["bits_per_byte"], rtol=1e-5)


def test_training_lowers_bits_per_byte(settings, tmp_path: pathlib.Path):
    task, context = prepared(settings)
    before = task.evaluate(task.init(jax.random.key(0), None, context), context)
    result = loop.train(build(TrainConfig, settings.to_dict()), tmp_path, context.mesh)
    assert result.evaluation["bits_per_byte"] < 0.7 * before["bits_per_byte"]


def test_a_tokenizer_larger_than_the_model_is_refused(settings):
    task, context = prepared(settings)
    small = dataclasses.replace(task, model=dataclasses.replace(task.model, vocab_size=200))
    with pytest.raises(ValueError, match="200"):
        small.data(context)


@pytest.fixture(scope="module")
def saved(settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, decoder.Params]:
    """A model folder with weights of another seed, and the weights."""
    task, context = prepared(settings)
    params = task.init(jax.random.key(9), None, context)
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_hf(folder, params, task.model, task.tokenizer)
    return str(folder), params


def test_training_starts_from_a_model(settings, saved):
    folder, want = saved
    task, context = prepared(settings, start_from=folder)
    longer = dataclasses.replace(task, model=dataclasses.replace(task.model, max_length=4096))
    found = longer.init(jax.random.key(0), None, context)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_of_another_kind_is_refused(settings, saved, tmp_path: pathlib.Path):
    task, context = prepared(settings, start_from=saved[0])
    wider = dataclasses.replace(task.model, intermediate_size=128)
    with pytest.raises(ValueError, match=r"intermediate_size 64 and config.task.model has 128"):
        dataclasses.replace(task, model=wider).init(jax.random.key(0), None, context)
    _, other = write_corpus(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"another tokenizer.*set config.task.tokenizer"):
        dataclasses.replace(task, tokenizer=other).init(jax.random.key(0), None, context)
    with pytest.raises(FileNotFoundError, match="no model 'nowhere'"):
        dataclasses.replace(task, start_from="nowhere").init(jax.random.key(0), None, context)


def test_an_evaluation_under_other_policies_is_compiled_once(settings):
    task, context = prepared(settings)
    params = task.init(jax.random.key(0), None, context)
    params = jax.tree.map(lambda x: 4 * x, params)  # so that positions matter
    plain = task.evaluate(params, context)
    theta, _ = rope_frequencies(task.model.rope, task.model.rotary_dim, task.model.rope_base)
    compiled = language_model._evaluation_step(task, jnp.float32)._cache_size
    found, programs = [], []
    for scale in (1.0, 2.0, 4.0):
        policy = DensePolicy(scheme=Frequencies(theta / scale))
        found.append(task.evaluate(params, context, policy))
        programs.append(compiled())
    assert found[0] == plain
    assert len({f["nats_per_token"] for f in found}) == 3
    assert len(set(programs)) == 1
