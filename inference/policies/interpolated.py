"""Longer texts for models that add positions to their inputs: the whole range is squeezed.

The baseline of learned tables and of sinusoids, as position interpolation (arXiv 2306.15595) is
that of rotary models.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.attention import DensePolicy, Step


@struct.dataclass
class InterpolatedPolicy(DensePolicy):
    """Dense attention at inputs whose positions never exceed the trained ones.

    In a text of n tokens, more than the trained length L, position i is read at
    ``i (L - 1) / (n - 1)``: the first on the first, the last on the last. n is that of each row,
    and while generating the final length of the request, so that it does not change on the way.
    """

    trained: Any = None  # L

    def embed(
        self, params: decoder.Params, cfg: decoder.Config, tokens: Array, shared: Any, step: Step
    ) -> Float[Array, "b t width"]:
        """See :class:`models.attention.EmbeddingPolicy`.

        Raises:
            ValueError: a model that adds no positions to its inputs.
        """
        check_model(cfg)
        lengths = jnp.max(step.positions, axis=1) + 1 if step.lengths is None else step.lengths
        last = jnp.maximum(lengths, self.trained).astype(jnp.float32) - 1
        ratio = jnp.where(last > 0, (self.trained - 1) / jnp.maximum(last, 1.0), 1.0)
        # Rounding must not reach beyond the last row.
        at = jnp.minimum(step.positions * ratio[:, None], self.trained - 1.0)
        return decoder.embed(params, cfg, tokens, at)


def check_model(cfg: decoder.Config) -> None:
    """Raise ValueError unless the model adds positions to its inputs."""
    if cfg.position not in ("learned", "sinusoidal"):
        raise ValueError(
            f"policy 'interpolated' is for positions that are added to the inputs, and the model "
            f"has {cfg.position!r}: use 'linear:FACTOR' for rotary ones, or 'dense'."
        )
