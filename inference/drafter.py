"""What a drafter is: the tree it proposes, what it may look at, and the null drafter.

A drafter is a frozen, hashable dataclass (its static settings) with three pure methods. What it
learned is ``params``; what it remembers between rounds is ``state``, one row per sequence unless
it says otherwise. It may read the target's weights and cache but write only scratch slots.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from models.decoder import Config
from ops.sampling import SamplingParams
from ops.tree import StaticTree


@struct.dataclass
class Resume:
    """Where the target's pass over a draft goes on, for drafts made with its own lower layers.

    Layers below ``layer`` have run on every node: their cache entries lie in the scratch slots
    that the nodes are about to take.
    """

    hidden: Any  # (b, n, width), the stream after ``layer`` layers
    layer: Any  # int32, the first layer still to run


@struct.dataclass
class Draft:
    """A padded tree of drafted tokens; node 0 is the root, the last token already certain.

    ``mode`` names the verification rule that fits how the tokens were chosen (``ops.verify``):
    ``deterministic`` for a fixed candidate set, ``chain``, ``swor`` or ``with_replacement`` for
    tokens drawn from ``probs``, which then holds the law each node's children were drawn from;
    ``transfer``, with its settings, for a chain towards which the target is pulled.
    """

    tokens: Any  # (b, n) int32, -1 where not valid
    parent: Any  # (b, n) int32, -1 for the root and for padding
    depth: Any  # (b, n) int32
    mask: Any  # (b, n, n) bool, ancestor or self
    valid: Any  # (b, n) bool
    probs: Any = None  # (b, n, v) float32
    transfer: Any = None  # ops.transfer.Transfer, for mode ``transfer``
    resume: Resume | None = None
    layer_passes: Any = None  # (b,) float32, layers of the target that drafting ran in turn
    mode: str = struct.field(pytree_node=False, default="deterministic")
    max_depth: int | None = struct.field(pytree_node=False, default=None)  # None: n - 1

    @property
    def is_chain(self) -> bool:
        """Whether the nodes are known to lie one below the other, in order."""
        return self.max_depth == self.tokens.shape[1] - 1


@struct.dataclass
class Target:
    """A drafter's read-only view of the model it drafts for."""

    params: Any
    cfg: Config = struct.field(pytree_node=False)
    policy: Any = None  # how its queries meet keys, for drafters that run its layers


@struct.dataclass
class DraftPrompts:
    """What a drafter reads in place of the prompts; left-aligned, padded with -1.

    Each ends with the last token of its prompt, after which both texts go on alike.
    """

    tokens: Any  # (b, p) int32
    lengths: Any  # (b,) int32
    capacity: int = struct.field(pytree_node=False)  # slots for them, new tokens and drafts


@struct.dataclass
class Request:
    """The prompts of a batch, and how to sample. Prompts are left-aligned, padded with -1."""

    tokens: Any  # (b, p) int32
    lengths: Any  # (b,) int32
    seeds: Any  # (b,) int32
    sampling: SamplingParams
    memory: Any = None  # state of an earlier call, for drafters that share theirs
    draft: DraftPrompts | None = None  # for drafters that read a prompt of their own


@struct.dataclass
class TargetOutputs:
    """What the target computed for some tokens: only the fields that the drafter ``needs``."""

    tokens: Any  # (b, n)
    pre_norm: Any = None  # (b, n, hidden)
    hidden: Any = None  # (b, n, hidden), post-norm
    hidden_states: Any = None  # (layers + 1, b, n, hidden)
    logits: Any = None  # (b, n, vocab) float32


@runtime_checkable
class Drafter(Protocol):
    """How tokens are proposed. ``needs`` is a subset of the fields of :class:`TargetOutputs`.

    Some attributes are optional. ``prompt_needs`` is what ``init`` reads, where that is less than
    ``needs`` (logits of a whole prompt are large). ``shared_state = True`` declares that the state
    belongs to all rows together and may be carried into the next call as ``Request.memory``.
    ``widths`` are narrower passes that its drafts often fit (:mod:`inference.widths`).
    ``draft_limit`` is the longest text it can read by itself, of a drafter that takes
    ``Request.draft``. ``verification`` names its verification rule at every temperature, also where
    no row samples: for rules that are not lossless.
    A drafter that searches on the host between rounds is a :class:`Tuned` one.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Which target outputs ``init`` and ``observe`` read."""
        ...

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        ...

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        ...

    def init(
        self, params: Any, target: Target, request: Request, prompt: TargetOutputs, capacity: int
    ) -> Any:
        """State after the prompt. ``prompt`` covers all prompt tokens but the last (the root)."""
        ...

    def propose(
        self, params: Any, state: Any, target: Target, cache: Any, root: Array, context: "Context"
    ) -> tuple[Draft, Any, Any]:
        """The next draft, the new state, and the target's cache (scratch slots may be written)."""
        ...

    def observe(
        self,
        params: Any,
        state: Any,
        draft: Draft,
        outputs: TargetOutputs,
        path: Array,
        n: Array,
        root: Array,
    ) -> Any:
        """Learn from a verified draft.

        ``path`` (b, d) are node ids of the kept path, of which the first ``n`` (root included)
        were committed; n is 0 for finished rows. ``root`` is the next round's root.
        """
        ...


@runtime_checkable
class Tuned(Protocol):
    """What a drafter adds that changes its state on the host, between rounds."""

    def rounds_to_tuning(self, params: Any, state: Any) -> int:
        """Rounds from now after which ``tune`` wants to be called; 0: not any more."""
        ...

    def tune(self, params: Any, state: Any, target: Target, cache: Any, context: "Context") -> Any:
        """The new state. The cache is read only; arrays are concrete."""
        ...


@struct.dataclass
class Context:
    """Text so far and the sampling in force, for drafters that look at them."""

    tokens: Any  # (b, l) int32
    length: Any  # (b,) int32
    seeds: Any  # (b,) int32
    sampling: SamplingParams
    limit: Any = None  # (b,) int32, final length at most
    eos: Any = None  # (e,) int32, ids that end a row; None: none does
    extent: int | None = struct.field(pytree_node=False, default=None)  # slots that hold all text
    done: Any = None  # (b,) bool: rows that need no draft any more; None: all do
    begin: Any = None  # (b,) int32, length of the prompt; None: not known
    # Known when compiling that no row samples, so that a draft needs no laws and no draws.
    greedy: bool = struct.field(pytree_node=False, default=False)


def prompt_needs(drafter: Drafter) -> frozenset[str]:
    """Which target outputs the drafter's ``init`` reads."""
    return frozenset(getattr(drafter, "prompt_needs", drafter.needs))


def shares_state(drafter: Drafter) -> bool:
    """Whether the drafter's state belongs to all rows together and outlives a call."""
    return getattr(drafter, "shared_state", False)


def narrower_widths(drafter: Drafter) -> tuple[int, ...]:
    """The passes narrower than its own that a drafter's drafts often fit."""
    return tuple(getattr(drafter, "widths", ()))


def static_draft(
    tree: StaticTree,
    tokens: Int[Array, "b n"],
    valid: Any = None,
    probs: Any = None,
    mode: str = "deterministic",
) -> Draft:
    """A draft over a tree whose shape is fixed; ``valid`` marks the nodes that are really there."""
    shape = tree.tree(batch=tokens.shape[0])
    valid = shape.valid if valid is None else valid
    return Draft(
        tokens=jnp.where(valid, tokens, -1),
        parent=shape.parent,
        depth=shape.depth,
        mask=shape.mask,
        valid=valid,
        probs=probs,
        mode=mode,
        max_depth=tree.max_depth,
    )


class FixedTree:
    """The part of a drafter whose drafts all have one shape, its field ``tree``."""

    tree: StaticTree

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.tree.size

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return self.tree.max_depth


class Stateless:
    """The part of a drafter that learns nothing and remembers nothing."""

    def init(
        self, params: Any, target: Target, request: Request, prompt: TargetOutputs, capacity: int
    ) -> None:
        """Nothing to remember."""

    def observe(
        self,
        params: Any,
        state: Any,
        draft: Draft,
        outputs: TargetOutputs,
        path: Any,
        n: Any,
        root: Any,
    ) -> None:
        """Nothing to learn."""


@dataclasses.dataclass(frozen=True)
class NoDrafter(Stateless):
    """Plain decoding: the root alone, padded to ``width`` invalid nodes.

    A width above 1 gives the reference that a drafter of that width must match bit for bit: the
    same shapes go through the same kernels.
    """

    width: int = 1
    needs: frozenset[str] = frozenset()
    max_depth: int = 0

    def propose(
        self,
        params: Any,
        state: Any,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, Any, Any]:
        """The root and padding."""
        tree = StaticTree(tuple((0,) * depth for depth in range(1, self.width)))
        tokens = jnp.broadcast_to(root[:, None], (root.shape[0], self.width))
        valid = jnp.broadcast_to(jnp.asarray(np.arange(self.width) == 0)[None], tokens.shape)
        return static_draft(tree, tokens, valid), state, cache


def on_path(path: Int[Array, "b d"], count: Int[Array, " b"], nodes: int) -> Bool[Array, "b n"]:
    """Which of ``nodes`` nodes are among the first ``count`` of a row's path."""
    kept = jnp.arange(path.shape[1])[None] < count[:, None]
    at = path[:, :, None] == jnp.arange(nodes)[None, None]
    return jnp.any(at & kept[:, :, None], axis=1)


def committed(values: Array, path: Int[Array, "b d"]) -> Array:
    """Rows of ``values`` (b, n, ...) along the kept path: (b, d, ...); padding repeats the root."""
    index = jnp.maximum(path, 0)
    return jax.vmap(lambda row, i: row[i])(values, index)
