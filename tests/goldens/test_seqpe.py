"""SeqPE against the official modules' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import seqpe
from models.layers import MLP, Attention, Layer, Linear, Norm
from ops.attention import AttentionMask, attention
from research.context.seqpe.objective import contrastive_loss, transfer_loss
from research.context.seqpe.samplers import distance
from tests.goldens import golden

ENCODERS = ("encoder_1d", "encoder_masked", "encoder_2d", "encoder_2d_bidirectional")


def config(data) -> seqpe.Config:
    """The settings of an encoder, from its file."""
    return seqpe.Config(
        width=int(data["embed_dim"]),
        heads=int(data["num_heads"]),
        axis_length=10 ** int(data["max_digits"]),
        axes=int(data["data_dim"]),
        layers=int(data["num_layers"]),
        causal=bool(data["causal"]),
        mask_padding=bool(data["mask_padding"]),
        out_width=data["w.out_proj.weight"].shape[0],
    )


def weights(data, layers: int) -> seqpe.Params:
    """An encoder's weights out of the released names."""

    def get(name: str) -> jax.Array:
        return jnp.asarray(data[f"w.{name}"])

    def fused(name: str) -> Linear:
        return Linear(get(f"{name}.weight"), get(f"{name}.bias"))

    def norm(name: str) -> Norm:
        return Norm(get(f"{name}.weight"), get(f"{name}.bias"))

    def layer(i: int) -> Layer:
        at = f"transformers.{i}"
        qkv = fused(f"{at}.attn.c_attn")
        q, k, v = (
            Linear(w, b) for w, b in zip(jnp.split(qkv.w, 3, 1), jnp.split(qkv.b, 3), strict=True)
        )
        return Layer(
            attn_norm=norm(f"{at}.layernorm_1"),
            attn=Attention(q, k, v, fused(f"{at}.attn.c_proj")),
            mlp_norm=norm(f"{at}.layernorm_2"),
            mlp=MLP(fused(f"{at}.mlp.c_fc"), fused(f"{at}.mlp.c_proj")),
        )

    axes = "w.dim_token_embed" in data
    return seqpe.Params(
        token_embed=get("token_of_seqpe_embed.weight"),
        place_embed=get("pos_of_seqpe_embed.weight"),
        last=get("cls_token_embed")[0, 0],
        layers=jax.tree.map(lambda *x: jnp.stack(x), *[layer(i) for i in range(layers)]),
        final_norm=norm("layernorm"),
        out=Linear(get("out_proj.weight").T, get("out_proj.bias")),
        axis_embed=get("dim_token_embed")[:, 0] if axes else None,
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_digits_and_vectors(name: str) -> None:
    data = golden("seqpe", name)
    cfg = config(data)
    positions = data["positions"].reshape(-1, cfg.axes)
    digits, real = seqpe.position_digits(positions, cfg.max_digits)
    np.testing.assert_array_equal(digits, data["digits"])
    np.testing.assert_array_equal(real, data["pad_mask"].astype(bool))
    mask = seqpe.token_mask(cfg, seqpe.visible_tokens(cfg, real))
    tokens = data["attn_mask"].shape[-1]
    visible = np.broadcast_to(mask.dense(tokens, tokens)[:, 0], data["attn_mask"].shape)
    np.testing.assert_array_equal(visible, data["attn_mask"].astype(bool))
    found = jax.jit(seqpe.encode, static_argnums=1)(weights(data, cfg.layers), cfg, positions)
    np.testing.assert_allclose(found, data["pe"], atol=2e-5)


@pytest.fixture(scope="module")
def losses() -> dict[str, np.ndarray]:
    return golden("seqpe", "losses_attention")


def test_the_contrastive_loss_and_its_gradients(losses) -> None:
    pivots, labels = jnp.asarray(losses["pivot_pe"]), jnp.asarray(losses["labels"], jnp.int32)
    shape = (len(labels), int(losses["n_candidates"]), -1)
    candidates = jnp.asarray(losses["candidate_pe"]).reshape(shape)

    def loss(pivots, candidates):
        return contrastive_loss(pivots, candidates, labels)[0]

    found, slopes = jax.value_and_grad(loss, (0, 1))(pivots, candidates)
    np.testing.assert_allclose(found, losses["contrastive_loss"], atol=1e-5)
    np.testing.assert_allclose(slopes[0], losses["contrastive_grad_pivot"], atol=1e-5)
    wanted = losses["contrastive_grad_candidates"].reshape(candidates.shape)
    np.testing.assert_allclose(slopes[1], wanted, atol=1e-5)


def test_the_transfer_loss_and_its_gradients(losses) -> None:
    shape = (int(losses["batch"]), int(losses["n_transfer"]))
    rows = losses["transfer_indices"].reshape(shape)
    student = jnp.asarray(losses["transfer_pe"]).reshape(*shape, -1)
    main, heads = jnp.asarray(losses["main_pe"]), int(losses["num_heads"])

    def loss(main, student, beta=1.0, heads=heads):
        return transfer_loss(main[rows], student, heads, beta)

    found, slopes = jax.value_and_grad(loss, (0, 1))(main, student)
    np.testing.assert_allclose(found, losses["transfer_loss"], atol=1e-5)
    np.testing.assert_allclose(jnp.abs(slopes[0]).max(), losses["transfer_grad_teacher_max"])
    wanted = losses["transfer_grad_student"].reshape(student.shape)
    np.testing.assert_allclose(slopes[1], wanted, atol=1e-5)
    mixed, both = jax.value_and_grad(loss, (0, 1))(main, student, 0.8)
    np.testing.assert_allclose(mixed, losses["transfer_loss_beta08"], atol=1e-5)
    np.testing.assert_allclose(both[1], 0.8 * slopes[1], atol=1e-6)
    assert jnp.abs(both[0]).max() > 1e-4
    single = loss(main, student, heads=1)
    np.testing.assert_allclose(single, losses["transfer_loss_single_head"], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "name"), [("attn_scalar", "attn_out"), ("attn_mul", "attn_mul_out")]
)
def test_attention(losses, method: str, name: str) -> None:
    q, k, v = (jnp.asarray(losses[f"attn_{x}"]).swapaxes(0, 1)[None] for x in "qkv")
    h, d = q.shape[2:]
    projection = Linear(jnp.asarray(losses["attn_w_qk"]).T, jnp.asarray(losses["attn_b_qk"]))
    u_q, u_k = seqpe.head_vectors(jnp.asarray(losses["attn_pe"])[None], projection, h, h, d)
    bias = jnp.einsum("thd,shd->hts", u_q[0], u_k[0])
    np.testing.assert_allclose(bias, losses["attn_bias"], atol=1e-5)
    q, k = seqpe.apply_to_attention(q, k, u_q, u_k, seqpe.Injection(method))
    found = attention(q, k, v, mask=AttentionMask(causal=True), scale=d**-0.5)
    np.testing.assert_allclose(found[0].swapaxes(0, 1), losses[name], atol=1e-5)


@pytest.mark.parametrize("branch", ["hard", "dist"])
def test_the_released_sampler_keeps_our_rules(branch: str) -> None:
    """What our sampler promises holds for batches of the released one, and digits agree."""
    data = golden("seqpe", "contrastive_batch")
    pivots, found = data["pivots"], data[f"{branch}_candidates"]
    assert found.shape == (len(pivots), int(data["n_candidates"]))
    assert (found < data["max_position"]).all() and (found >= 0).all()
    for pivot, row in zip(pivots, found, strict=True):
        assert len(set(row.tolist()) | {int(pivot)}) == len(row) + 1
    apart = distance(jnp.asarray(found)[..., None], jnp.asarray(pivots)[:, None, None])
    np.testing.assert_array_equal(jnp.argmin(apart, 1), data[f"{branch}_labels"])
    digits, real = seqpe.position_digits(found[..., None], int(data["max_digits"]))
    np.testing.assert_array_equal(digits, data[f"{branch}_digits"])
    np.testing.assert_array_equal(real, data[f"{branch}_pad_mask"].astype(bool))
