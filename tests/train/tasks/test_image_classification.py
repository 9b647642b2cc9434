"""Training vision transformers, with positions of their own or SeqPE's."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import seqpe_vit
from models import seqpe
from models.sharding import make_mesh
from train import loop
from train.config import TrainConfig, build, build_task
from train.metrics import read_metrics
from train.task import Context

ENCODER = {"width": 16, "heads": 2, "axis_length": 20, "axes": 2, "layers": 1, "dropout": 0.0}


def settings(variant: str) -> Any:
    """A model of one layer on images of two by two patches."""
    config = seqpe_vit.get_config(variant)
    config.task.images, config.task.held_out = "textures:200:8", 64
    config.task.evaluation_rows = 32
    config.task.model.update(
        {"image_size": (8, 8), "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    )
    config.steps, config.batch_size, config.log_every = 2, 8, 1
    config.optimizer.warmup_steps, config.checkpoint_every = 0, 2
    if "encoder" in config.task:
        config.task.encoder = ENCODER
        config.task.regulariser.sampling = {
            "candidates": 4, "spread": 16, "transfer_points": 4,
        }  # fmt: skip
        config.task.regulariser.update({"pivots": 4, "shift_rows": 4})
    return config


def made(variant: str, **fields: Any) -> tuple[Any, Context]:
    """A task with other fields, and its context."""
    config = settings(variant)
    config.task.update(fields)
    built = build(TrainConfig, config.to_dict())
    return build_task(built), Context(built, make_mesh("", jax.devices()[:1]))


@pytest.mark.parametrize("variant", ["learned", pytest.param("seqpe", marks=pytest.mark.slow)])
def test_two_updates(variant: str, tmp_path: pathlib.Path):
    config = settings(variant)
    built, mesh = build(TrainConfig, config.to_dict()), make_mesh("", jax.devices()[:1])
    result = loop.train(built, tmp_path, mesh)
    assert 0 <= result.evaluation["accuracy"] <= 1
    lines = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x]
    name = "nats" if variant == "seqpe" else "loss"
    assert len(lines) == 2 and lines[0][name] == pytest.approx(np.log(9), rel=0.1)
    assert ("contrastive" in lines[0]) == (variant == "seqpe")


def test_every_image_once_per_epoch():
    task, context = made("learned")
    labels = []
    for batch, _ in zip(iter(task.data(context)), range(17), strict=False):
        labels += batch["labels"].tolist()
    assert sorted(labels) == sorted(task.splits[0].labels.tolist())  # 136 of 200


def test_larger_images_are_read_by_the_vectors_of_their_grid():
    """By every way to take vectors in."""
    image = jax.random.uniform(jax.random.key(0), (2, 12, 16, 1))
    for injection in (
        {"method": "attn_mul", "projection": "multi"},
        {"method": "input_add", "projection": "none"},
    ):
        task, context = made("seqpe", injection=injection)
        params = jax.tree.map(lambda x: 8 * x, task.init(jax.random.key(1), None, context))
        told = jax.jit(task.told, static_argnums=1)(params, (3, 4))
        table = told.added if told.policy is None else told.policy.vectors
        grid = jax.jit(seqpe.extend_table, static_argnums=(1, 2))(
            params.encoder, task.encoder, (3, 4)
        )
        np.testing.assert_allclose(table[0, 1:], grid, atol=1e-5)
        np.testing.assert_array_equal(table[0, 0], params.class_vector)
        read = jax.jit(task.logits)
        turned = jnp.concatenate([image[:, 4:], image[:, :4]], axis=1)
        assert np.abs(np.asarray(read(params, turned) - read(params, image))).max() > 1e-3
    with pytest.raises(ValueError, match="1 up to 100"):
        task.told(params, (101, 4))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no windows of"):
        made("seqpe", encoder={**ENCODER, "axis_length": 4})
    config = settings("seqpe")
    config.task.model.position = "learned"
    with pytest.raises(ValueError, match="set its position to 'none'"):
        build_task(build(TrainConfig, config.to_dict()))
    task, _ = made("learned", images="textures:50:12")
    with pytest.raises(ValueError, match=r"images are \(12, 12, 1\) and the model is for"):
        task.splits  # noqa: B018
    task, context = made("learned", held_out=50)
    with pytest.raises(ValueError, match="50 images in batches of 32"):
        task.evaluate(task.init(jax.random.key(0), None, context), context)


def test_the_encoder_is_a_group_of_its_own():
    task, _ = made("seqpe")
    assert task.group(".encoder.last") == "encoder" and task.group(".class_vector") == "main"
