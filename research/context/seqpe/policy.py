"""Attention under SeqPE's vectors, in training, in prefill and with a cache.

Source: arXiv 2506.13277. Vectors are looked up in a table: that of all positions from 0 on, made
once, or while training that of the window that is read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.policies.positions_file import read_positions, read_weights
from models import decoder, seqpe
from models.attention import Attended, Step, dense_mask
from models.layers import Linear
from models.mesh_attention import mesh_attention
from ops.attention import AttentionMask


@struct.dataclass
class SeqPEPolicy:
    """Dense attention that is told positions by vectors alone.

    Row p of ``vectors`` is the u of a token at position p of its text. With a first axis of more
    than 1, rows of the batch have tables of their own, as under shifted windows. Keys are cached
    with their u_k applied and never change.

    Positions are whole numbers below :attr:`max_length`, the limit that an engine goes by.
    """

    vectors: Any  # (1 or b, positions, width of u)
    projection: Any = None  # Linear, stacked: (layers or 1, width of u, (h + g) d)
    injection: seqpe.Injection = struct.field(pytree_node=False, default=seqpe.Injection())
    implementation: str = struct.field(pytree_node=False, default="auto")

    @property
    def max_length(self) -> int:
        """The longest text that there are vectors for."""
        return self.vectors.shape[-2]

    def per_layer(self, num_layers: int) -> Linear | None:
        """Each layer's own projection.

        Raises:
            ValueError: another number of projections than layers.
        """
        if self.injection.projection != "multi":
            return None
        if self.projection.w.shape[0] != num_layers:
            raise ValueError(
                f"SeqPE has projections for {self.projection.w.shape[0]} layers and the model has "
                f"{num_layers}: give those of this model."
            )
        return self.projection

    def key_width(self, cfg: decoder.Config) -> int:
        """See :meth:`models.seqpe.Injection.key_width`."""
        return self.injection.key_width(cfg.head_dim)

    def prepare(self, cfg: decoder.Config, step: Step) -> Any:
        """The tokens' vectors (b, t, width), or u_q and u_k by head if all layers share them.

        Raises:
            ValueError: a model or positions that the vectors are not for.
        """
        seqpe.check_injection(self.injection, self.vectors.shape[-1], cfg)
        if not jnp.issubdtype(jnp.asarray(step.positions).dtype, jnp.integer):
            raise ValueError("SeqPE reads digits: positions must be whole numbers.")
        length = step.positions.shape[1]
        if step.start is None and length > self.max_length:
            raise ValueError(
                f"a text of {length} tokens and SeqPE vectors for {self.max_length}: make a longer "
                "table (make_policy) within the digits of the encoder."
            )
        found = _look_up(self.vectors, step.positions)
        if self.injection.method == "input_add" or self.injection.projection == "multi":
            return found
        single = jax.tree.map(lambda leaf: leaf[0], self.projection)
        return seqpe.head_vectors(found, single, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)

    def embed(
        self, params: decoder.Params, cfg: decoder.Config, tokens: Array, shared: Any, step: Step
    ) -> Float[Array, "b t width"]:
        """See :class:`models.attention.EmbeddingPolicy`."""
        x = decoder.embed(params, cfg, tokens, step.positions)
        return x + shared.astype(x.dtype) if self.injection.method == "input_add" else x

    def attend(
        self,
        layer: Linear | None,
        shared: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
        x: Any,
        step: Step,
        cache: Any,
    ) -> Attended:
        """See :class:`models.attention.AttentionPolicy`."""
        k = self.cached_keys(layer, shared, k)
        if cache is not None:
            cache = cache.append(k, v, step.start)
            k, v = cache.read(step.extent)
        mask = dense_mask(step, None, cached=cache is not None)
        out = self.cross_attend(layer, shared, q, k, v, step, mask)
        return Attended(out=out, cache=cache)

    def cached_keys(
        self, layer: Linear | None, shared: Any, k: Float[Array, "b t g d"]
    ) -> Float[Array, "b t g wide"]:
        """See :class:`models.attention.LendingPolicy`."""
        if self.injection.method == "input_add":
            return k
        return seqpe.apply_to_keys(k, _of_heads(layer, shared, *k.shape[2:])[1], self.injection)

    def cross_attend(
        self,
        layer: Linear | None,
        shared: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g wide"],
        v: Float[Array, "b s g dv"],
        step: Step,
        mask: AttentionMask,
    ) -> Float[Array, "b t h dv"]:
        """See :class:`models.attention.LendingPolicy`."""
        scale = q.shape[-1] ** -0.5
        if self.injection.method != "input_add":
            u_q, _ = _of_heads(layer, shared, k.shape[2], q.shape[3])
            q = seqpe.apply_to_queries(q, u_q, self.injection)
        return mesh_attention(q, k, v, mask=mask, scale=scale, implementation=self.implementation)


def _of_heads(layer: Linear | None, shared: Any, g: int, d: int) -> tuple[Array, Array]:
    """u_q and u_k of one layer, by its own projection where it has one."""
    if layer is None:
        return shared
    return seqpe.head_vectors(shared, layer, layer.w.shape[-1] // d - g, g, d)


def _look_up(
    vectors: Float[Array, "rows n width"], positions: Int[Array, "b t"]
) -> Float[Array, "b t width"]:
    # Padding may stand beyond the table: nobody reads what it is given, but it must be finite.
    at = jnp.clip(positions, 0, vectors.shape[1] - 1)
    if vectors.shape[0] == 1:
        return vectors[0][at]
    return jnp.take_along_axis(vectors, at[..., None], axis=1)


def make_policy(
    params: seqpe.Params,
    cfg: seqpe.Config,
    projection: Linear | None,
    injection: seqpe.Injection,
    length: int,
) -> SeqPEPolicy:
    """The policy for texts of up to ``length`` tokens; encodes their positions once.

    Raises:
        ValueError: more positions than the encoder's digits can tell.
    """
    table = jax.jit(seqpe.extend_table, static_argnums=(1, 2))(params, cfg, (length,))
    return SeqPEPolicy(table[None], projection, injection)


def describe(cfg: seqpe.Config, injection: seqpe.Injection) -> dict[str, Any]:
    """The settings as JSON values; the weights lie beside them."""
    return {"encoder": dataclasses.asdict(cfg), "injection": dataclasses.asdict(injection)}


def load_policy(arguments: list[str], cfg: decoder.Config) -> SeqPEPolicy:
    """The vectors of an exported run for all positions of its training, for ``--policy=seqpe:DIR``.

    Raises:
        FileNotFoundError, ValueError: see :mod:`inference.policies.positions_file`, or an encoder
            that is damaged or of another model.
    """
    facts = read_positions(arguments[0], "seqpe")
    try:
        encoder = seqpe.Config(**facts["encoder"])
        injection = seqpe.Injection(**facts["injection"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{arguments[0]} tells no encoder ({error}): export it again.") from error
    wanted = {
        "encoder": seqpe.specs(encoder),
        "projection": seqpe.projection_specs(injection, encoder.out, cfg),
    }
    weights = read_weights(arguments[0], wanted)
    length = encoder.axis_length
    return make_policy(weights["encoder"], encoder, weights["projection"], injection, length)
