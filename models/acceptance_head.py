"""SpecDec++'s head: will the target accept this drafted token?

It reads the draft model's last hidden state (after the final norm) at the position of the drafted
token: residual blocks ``x + silu(W x + b)``, then two logits, of rejection and of acceptance.

Source: Huang et al., "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths",
arXiv 2405.19715.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.layers import Linear, linear
from models.params import ParamSpec, Uniform
from ops.weights import Weight


@dataclasses.dataclass(frozen=True)
class AcceptanceConfig:
    """Shape of the head, and the weight of its loss.

    Attributes:
        num_layers: residual blocks.
        tie_blocks: use one block's weights ``num_layers`` times, as the released code and its
            checkpoints do; the paper describes separate blocks.
        rejection_weight: how much more a rejection counts in the loss than an acceptance.
    """

    num_layers: int = 3
    tie_blocks: bool = False
    rejection_weight: float = 6.0

    def __post_init__(self):
        if self.num_layers < 1 or not self.rejection_weight > 0:
            raise ValueError(
                f"an acceptance head needs num_layers of 1 or more and a positive "
                f"rejection_weight, got {self.num_layers} and {self.rejection_weight}."
            )

    @property
    def stored_blocks(self) -> int:
        """Blocks that have weights of their own."""
        return 1 if self.tie_blocks else self.num_layers


@struct.dataclass
class Params:
    """Residual blocks, stacked, and the map to the two logits."""

    blocks: Linear  # (blocks, width, width), (blocks, width)
    out: Linear  # (width, 2), (2,)


def specs(cfg: AcceptanceConfig, draft: decoder.Config) -> Params:
    """The abstract parameters of a head on a draft model.

    Every map starts uniform within ``width ** -0.5``, the usual default of linear layers.
    """
    blocks, width = cfg.stored_blocks, draft.hidden_size
    start = Uniform(-(width**-0.5), width**-0.5)

    def spec(*shape: int) -> Weight:
        return ParamSpec(shape, (None,) * len(shape), start)

    return Params(
        blocks=Linear(spec(blocks, width, width), spec(blocks, width)),
        out=Linear(spec(width, 2), spec(2)),
    )


def logits(
    params: Params, cfg: AcceptanceConfig, hidden: Float[Array, "*batch width"]
) -> Float[Array, "*batch 2"]:
    """Logits of (rejected, accepted), float32 whatever the draft model computes in."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    x = hidden.astype(jnp.float32)
    for i in range(cfg.num_layers):
        number = 0 if cfg.tie_blocks else i
        block = Linear(params.blocks.w[number], params.blocks.b[number])
        x = x + jax.nn.silu(linear(x, block))
    return linear(x, params.out)


def acceptance(
    params: Params, cfg: AcceptanceConfig, hidden: Float[Array, "*batch width"]
) -> Float[Array, "*batch"]:
    """Predicted probability that the token is accepted if all before it are."""
    return jax.nn.softmax(logits(params, cfg, hidden), axis=-1)[..., 1]
