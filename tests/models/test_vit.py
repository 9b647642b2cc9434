"""The vision transformer: patches, positions, images of other sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import vit
from models.params import init
from models.position_embeddings import resized

CFG = vit.Config((6, 9), 3, 2, 5, 16, 2, 4)
run = jax.jit(vit.forward, static_argnums=1)


def weights(cfg: vit.Config = CFG) -> vit.Params:
    """Initial weights, large enough for positions to matter."""
    return jax.tree.map(lambda x: 10 * x, init(vit.specs(cfg), jax.random.key(0)))


def images(height: int = 6, width: int = 9) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (2, height, width, 2))


def test_patches_are_cut_row_by_row():
    whole = images()
    cut = vit.patches(CFG, whole)
    assert cut.shape == (2, 6, 18)
    for number, (row, column) in enumerate(np.ndindex(2, 3)):
        piece = whole[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(cut[:, number], piece.reshape(2, -1))


def test_all_tokens_see_all():
    out = run(weights(), CFG, images())
    assert out.hidden.shape == (2, 7, 16)
    changed = images().at[:, -1, -1].add(1.0)
    apart = np.abs(np.asarray(run(weights(), CFG, changed).hidden - out.hidden)).max((0, 2))
    assert (apart > 1e-4).all()
    logits = vit.classify(weights(), out)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32


@pytest.mark.parametrize("position", vit.POSITIONS)
def test_whether_places_matter(position: str):
    """Patches that change places change the class token, unless nothing tells places."""
    cfg = dataclasses.replace(CFG, position=position)
    whole = images()
    turned = jnp.concatenate([whole[:, 3:], whole[:, :3]], axis=1)
    a, b = (run(weights(cfg), cfg, x).hidden[:, 0] for x in (whole, turned))
    assert (np.abs(np.asarray(a - b)).max() < 1e-4) == (position == "none")


def test_other_sizes():
    params = weights()
    own = vit.own_positions(params, CFG, (4, 3))
    assert own is not None
    np.testing.assert_array_equal(own[0, 0], params.class_position)
    wanted = resized(params.position_embed, (4, 3)).reshape(12, 16)
    np.testing.assert_allclose(own[0, 1:], wanted, atol=1e-6)
    same = vit.own_positions(params, CFG, (2, 3))
    assert same is not None
    np.testing.assert_allclose(same[0, 1:], params.position_embed.reshape(6, 16), atol=1e-6)
    assert run(params, CFG, images(12, 9)).hidden.shape == (2, 13, 16)


def test_sinusoids_of_a_larger_grid_go_on():
    cfg = dataclasses.replace(CFG, position="sinusoidal")
    small, large = (vit.own_positions(weights(cfg), cfg, grid) for grid in ((2, 3), (4, 5)))
    assert small is not None and large is not None
    inner = large[0, 1:].reshape(4, 5, 16)[:2, :3].reshape(6, 16)
    np.testing.assert_allclose(small[0, 1:], inner, atol=1e-6)
    np.testing.assert_array_equal(small[0, 0], np.zeros(16))


def test_what_is_added_is_added_to_every_token():
    cfg = dataclasses.replace(CFG, position="none")
    table = jax.random.normal(jax.random.key(2), (1, 7, 16))
    first = run(weights(cfg), cfg, images(), added=table)
    plain = run(weights(cfg), cfg, images())
    assert np.abs(np.asarray(first.hidden - plain.hidden)).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "3 heads do not divide a width of 16"),
        ({"position": "rope"}, "use one of learned, sinusoidal, none"),
        ({"image_size": (6, 8)}, "6 x 8 are no whole patches of 3"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **changes)


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="images of 7 x 9 are no whole patches"):
        vit.forward(weights(), CFG, images(7, 9))
    with pytest.raises(ValueError, match="images have 1 channels and the model 2"):
        vit.forward(weights(), CFG, images()[..., :1])
