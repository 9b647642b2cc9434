"""A vision transformer: patches and a class token through the decoder's layers, seeing everything.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929. Images may have
another size than those of training: learned positions are resized to the new grid, sinusoids go on,
and an attention policy may tell positions in place of both.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.attention import AttentionPolicy, Step
from models.layers import Linear, linear, linear_specs
from models.params import Normal, ParamSpec
from models.position_embeddings import grid_sinusoids, resized
from ops.weights import Weight

POSITIONS = ("learned", "sinusoidal", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model; hashable.

    Attributes:
        image_size: height and width of the images it is trained on.
        patch: side of a patch.
        channels: of an image.
        classes: what it tells apart.
        hidden_size, num_layers, num_heads: of the transformer; heads divide the width.
        position: what is added to the patches: a ``learned`` table of the trained grid,
            ``sinusoidal`` rows and columns, or ``none``.

    Raises:
        ValueError: sizes that do not divide, or an unknown kind of positions.
    """

    image_size: tuple[int, int]
    patch: int
    channels: int
    classes: int
    hidden_size: int
    num_layers: int
    num_heads: int
    position: str = "learned"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"{self.num_heads} heads do not divide a width of {self.hidden_size}: change one."
            )
        if self.position not in POSITIONS:
            raise ValueError(f"position is {self.position!r}: use one of {', '.join(POSITIONS)}.")
        self.grid_of(self.image_size)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches down and across an image of this size.

        Raises:
            ValueError: patches do not fill it.
        """
        if any(n < self.patch or n % self.patch for n in size):
            raise ValueError(
                f"images of {size[0]} x {size[1]} are no whole patches of {self.patch}: resize "
                "them or take another patch."
            )
        return size[0] // self.patch, size[1] // self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across in training."""
        return self.grid_of(self.image_size)

    @property
    def trunk(self) -> decoder.Config:
        """The layers, as those of a decoder of GPT-2's kind that is not causal."""
        return decoder.Config(
            vocab_size=self.classes,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=4 * self.hidden_size,
            max_length=self.grid[0] * self.grid[1] + 1,
            activation="gelu",
            gated_mlp=False,
            norm="layer",
            norm_eps=1e-6,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            position="none",
            causal=False,
        )


@struct.dataclass
class Params:
    """Patch projection, class token, layers and final norm, head, and learned positions."""

    patch: Linear  # (patch * patch * channels, width)
    class_token: Weight  # (width,)
    trunk: Any  # decoder.Params without token embeddings
    head: Linear  # (width, classes)
    position_embed: Weight = None  # (rows, columns, width)
    class_position: Weight = None  # (width,)


def specs(cfg: Config) -> Params:
    """The abstract parameters."""
    width, std = cfg.hidden_size, 0.02

    def vector() -> ParamSpec:
        return ParamSpec((width,), ("embed",), Normal(std))

    trunk = dataclasses.replace(decoder.specs(cfg.trunk), embed=None)
    learned = cfg.position == "learned"
    inner = cfg.patch**2 * cfg.channels
    return Params(
        patch=linear_specs((inner, width), ("patch", "embed"), True, inner**-0.5),
        class_token=vector(),
        trunk=trunk,
        head=linear_specs((width, cfg.classes), ("embed", "vocab"), True, std),
        position_embed=ParamSpec((*cfg.grid, width), (None, None, "embed"), Normal(std))
        if learned
        else None,
        class_position=vector() if learned else None,
    )


def patches(cfg: Config, images: Float[Array, "b h w c"]) -> Float[Array, "b patches inner"]:
    """Patches row by row, each with its pixels row by row."""
    rows, columns = cfg.grid_of((images.shape[1], images.shape[2]))
    cut = images.reshape(-1, rows, cfg.patch, columns, cfg.patch, images.shape[3])
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape[0], rows * columns, -1)


def forward(
    params: Params,
    cfg: Config,
    images: Float[Array, "b h w c"],
    *,
    policy: AttentionPolicy | None = None,
    added: Float[Array, "#b t width"] | None = None,
    remat: bool = False,
) -> decoder.Output:
    """Hidden states of the class token and, row by row, of all patches.

    Args:
        images: of any size that patches fill.
        policy: how queries meet keys; tokens stand at 0 (the class token), 1, 2, ...
        added: what is added to the tokens beside the model's own positions.

    Raises:
        ValueError: patches do not fill the images, or other channels than the model's.
    """
    if images.shape[3] != cfg.channels:
        raise ValueError(f"images have {images.shape[3]} channels and the model {cfg.channels}.")
    grid = cfg.grid_of((images.shape[1], images.shape[2]))
    x = linear(patches(cfg, images), params.patch)
    token = jnp.broadcast_to(params.class_token[None, None], (x.shape[0], 1, cfg.hidden_size))
    x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
    for more in (own_positions(params, cfg, grid), added):
        if more is not None:
            x = x + more.astype(x.dtype)
    row = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    step = Step(jnp.broadcast_to(row, x.shape[:2]), causal=False)
    return decoder.forward(params.trunk, cfg.trunk, embeds=x, step=step, policy=policy, remat=remat)


def own_positions(
    params: Params, cfg: Config, grid: tuple[int, int]
) -> Float[Array, "1 t width"] | None:
    """What the model adds to the class token and the patches of a grid; None for nothing.

    Patches are about as large as sinusoids when training begins; the class token has none.
    """
    width = cfg.hidden_size
    if cfg.position == "none":
        return None
    if cfg.position == "learned":
        table, first = resized(params.position_embed, grid), params.class_position
    else:
        table, first = grid_sinusoids(grid, width), jnp.zeros((width,))
    return jnp.concatenate([first[None], table.reshape(-1, width)])[None]


def classify(params: Params, out: decoder.Output) -> Float[Array, "b classes"]:
    """Float32 logits from the class token."""
    return linear(out.hidden[:, 0], params.head).astype(jnp.float32)
