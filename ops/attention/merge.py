"""Joining two attentions over disjoint sets of slots into the attention over their union."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
    out_a: Float[Array, "*rows dv"],
    lse_a: Float[Array, "*rows"],
    out_b: Float[Array, "*rows dv"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float[Array, "*rows dv"], Float[Array, "*rows"]]:
    """Attention over the union of two disjoint slot sets, from each one's output and lse.

    out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b) and lse = log of the denominator,
    in float32; the output has out_a's dtype. A half that saw nothing (lse = -inf) leaves the other
    half unchanged to the last bit; two empty halves give zeros and -inf. This is the combination
    step of online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    lse_a, lse_b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
    top = jnp.maximum(lse_a, lse_b)
    filled = top > -jnp.inf
    top = jnp.where(filled, top, 0.0)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = jnp.where(filled, weight_a + weight_b, 1.0)
    part_a = jnp.where(weight_a > 0, weight_a / total, 0.0)[..., None] * out_a.astype(jnp.float32)
    part_b = jnp.where(weight_b > 0, weight_b / total, 0.0)[..., None] * out_b.astype(jnp.float32)
    lse = jnp.where(filled, top + jnp.log(total), -jnp.inf)
    return (part_a + part_b).astype(out_a.dtype), lse
