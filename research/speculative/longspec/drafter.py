"""LongSpec's drafter: a window of its own, the target's last keys, and a beam for a tree.

Source: arXiv 2502.17421. A round begins with the tokens that the last one emitted. Their own keys
and values depend on token and position alone and enter a ring of constant size, which nothing that
was only drafted ever does: drafted nodes lie beside it until the draft is made. The target's keys
and values are read where the engine keeps them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.cache import Cache, Ring, init_ring
from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from models import decoder, longspec
from models.attention import Step
from models.drafter_io import load_settings, load_weights
from models.load import Model
from models.longspec import Entries
from ops.attention import AttentionMask
from ops.dynamic_tree import Frontier, beam_tree, check_beam

BEAM = (4, 16, 16, 16, 16)
"""Nodes per level of the published tree."""

CHAIN = (1, 1, 1, 1)
"""The published chain."""

KIND = "longspec"


@struct.dataclass
class LongSpecState:
    """The window of own keys and values, and how many of the text's tokens went into it."""

    ring: Ring
    seen: Any  # (b,) int32


@struct.dataclass
class Rows:
    """Tokens that go through the layer together: what goes in, and where they stand."""

    embeds: Any  # (b, t, width)
    place: longspec.Place


@dataclasses.dataclass(frozen=True)
class LongSpecDrafter:
    """A beam from one layer over the target's cache; parameters are :class:`longspec.Params`.

    Attributes:
        cfg: the layer's config.
        shape: nodes per level; ones make a chain.

    Raises:
        ValueError: no level, a level without nodes, or a draft longer than the window.
    """

    cfg: longspec.LongSpecConfig
    shape: tuple[int, ...] = BEAM
    needs: frozenset[str] = frozenset()

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"a tree has at least one level and every level a node, got {self.shape}."
            )
        if len(self.shape) > self.cfg.window:
            raise ValueError(
                f"a draft of {len(self.shape)} levels does not fit a window of {self.cfg.window} "
                "tokens: use fewer levels."
            )

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return 1 + sum(self.shape)

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return len(self.shape)

    def init(
        self,
        params: longspec.Params,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> LongSpecState:
        """Own keys and values of the last tokens before the root.

        Raises:
            ValueError: a tree that the vocabulary cannot fill, or see :func:`longspec.place`.
        """
        check_beam(self.shape, target.cfg.vocab_size)
        # No text outgrows the capacity, so a longer window would hold nothing more.
        window = min(self.cfg.window, capacity)
        dtype = target.params.final_norm.scale.dtype
        batch, size = request.tokens.shape
        ring = init_ring(target.cfg, batch, window, self.max_depth + 1, dtype)
        seen, count = request.lengths - 1, min(window, size)
        alone = Step(None, lengths=request.lengths, mode="decode")
        rows = rows_of(target, request.tokens, seen - count, count, alone)
        _, k, v = longspec.project_own(params, target.cfg, rows.embeds, rows.place.own)
        return LongSpecState(ring.begin(k, v, seen), seen)

    def propose(
        self,
        params: longspec.Params,
        state: LongSpecState,
        target: Target,
        cache: Cache,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, LongSpecState, Cache]:
        """New tokens into the ring; the beam begins with the root's law."""
        held = Step(
            None, start=cache.length, slot_positions=cache.positions, lengths=context.limit,
            extent=context.extent, mode="decode",
        )  # fmt: skip
        new = rows_of(target, context.tokens, state.seen, self.max_depth + 1, held)
        _, k, v = longspec.project_own(params, target.cfg, new.embeds, new.place.own)
        ring = state.ring.append(k, v, state.seen, context.length - state.seen)
        # What the target has of the text: all tokens before the root.
        keys, values = cache.layers[-1].read(context.extent)
        committed = Entries(keys, values, AttentionMask(lengths=cache.length))
        # The other new tokens are in the ring, and nobody reads what the layer makes of them.
        last = rows_of(target, context.tokens, context.length - 1, 1, held)
        laws, _ = token_laws(params, target, last, ring, committed)

        def step(nodes: Any, frontier: Frontier) -> tuple[Array, Any]:
            at = context.length[:, None] + frontier.level
            positions = jnp.broadcast_to(at, frontier.tokens.shape)
            rows = make_rows(target, frontier.tokens, positions, held)
            return token_laws(params, target, rows, ring, committed, nodes, frontier.ancestors)

        made, _ = beam_tree(step, laws[:, 0], None, self.shape)
        draft = Draft(
            tokens=made.tokens.at[:, 0].set(root.astype(jnp.int32)),
            parent=made.tree.parent,
            depth=made.tree.depth,
            mask=made.tree.mask,
            valid=made.tree.valid,
            max_depth=self.max_depth,
        )
        return draft, LongSpecState(ring, context.length), cache

    def observe(
        self,
        params: longspec.Params,
        state: LongSpecState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> LongSpecState:
        """Nothing: the next round reads the new tokens from the text."""
        return state


def make_rows(
    target: Target, tokens: Int[Array, "b t"], positions: Int[Array, "b t"], held: Step
) -> Rows:
    """Tokens at given positions; ``held`` is a step without any, of what the target has cached."""
    policy = decoder.default_policy(target.cfg) if target.policy is None else target.policy
    place = longspec.place(policy, target.cfg, dataclasses.replace(held, positions=positions))
    return Rows(longspec.embed(target.params, target.cfg, jnp.maximum(tokens, 0), place), place)


def rows_of(
    target: Target, text: Int[Array, "b l"], start: Int[Array, " b"], count: int, held: Step
) -> Rows:
    """``count`` tokens of a text from ``start`` on; beyond its ends they may be anything."""
    positions = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    inside = jnp.clip(positions, 0, text.shape[1] - 1)
    return make_rows(target, jnp.take_along_axis(text, inside, axis=1), positions, held)


def token_laws(
    params: longspec.Params,
    target: Target,
    rows: Rows,
    ring: Ring,
    committed: Entries,
    nodes: tuple[Array, Array] | None = None,
    tree: Bool[Array, "b t n"] | None = None,
) -> tuple[Float[Array, "b t v"], tuple[Array, Array] | None]:
    """Log-probabilities of what follows each row, and the drafted nodes' keys and values.

    Args:
        nodes: keys and values of the nodes drafted so far, to which the rows' own are added.
        tree: which of all these nodes each row sees; None where the rows are text in the ring.
    """
    q, k, v = longspec.project_own(params, target.cfg, rows.embeds, rows.place.own)
    if tree is not None:
        before = (k[:, :0], v[:, :0]) if nodes is None else nodes
        nodes = jnp.concatenate([before[0], k], axis=1), jnp.concatenate([before[1], v], axis=1)
    window = Entries(*ring.read(), ring.seen_from(rows.place.step.positions))
    mixed = longspec.attend_own(q, window, nodes, tree)
    hidden = longspec.complete(params, target.cfg, rows.embeds, mixed, rows.place, committed)
    logits = decoder.unembed(target.params, target.cfg, hidden)
    return jax.nn.log_softmax(logits, axis=-1), nodes


def load(directory: str, model: Model) -> tuple[LongSpecDrafter, longspec.Params]:
    """A trained layer for a model, with the published tree.

    Raises:
        FileNotFoundError, ValueError: see :mod:`models.drafter_io`, or a model without rotary
            positions.
    """
    settings = load_settings(directory, KIND, model.cfg)
    cfg = longspec.LongSpecConfig(**settings["config"])
    return LongSpecDrafter(cfg), load_weights(directory, longspec.specs(cfg, model.cfg))


def load_chain(directory: str, model: Model) -> tuple[LongSpecDrafter, longspec.Params]:
    """The same layer drafting a chain; errors as of :func:`load`."""
    drafter, params = load(directory, model)
    return dataclasses.replace(drafter, shape=CHAIN), params
