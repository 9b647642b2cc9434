"""Draft trees whose shape depends on the draft's own confidence, with static buffer sizes.

:func:`dynamic_tree` is EAGLE-2's builder (arXiv 2406.16858); :func:`beam_tree` is LongSpec's
(arXiv 2502.17421); :func:`budget_level` is Clover-1's rule for small budgets (arXiv 2405.00263).
All depend on the context only, not on a random draw, so their trees are deterministic sets for
the verifier.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ops.sampling import Number
from ops.tree import Tree, tree_from_parents


@struct.dataclass
class Frontier:
    """The ``k`` nodes that one expansion feeds to the draft.

    ``ancestors[b, i, j]`` says that slot ``j`` of the nodes fed so far is node ``i`` or one of its
    ancestors. In :func:`dynamic_tree` expansion ``e`` fills slots ``e k`` to ``e k + k - 1`` of all
    ``depth * k``; in :func:`beam_tree` the slots are all nodes fed up to now, in order.
    """

    tokens: Any  # (b, k) int32
    source: Any  # (b, k) int32: slot of each node's parent in the frontier before, 0 at first
    ancestors: Any  # (b, k, slots) bool
    level: Any  # scalar int32: expansions done before this one; the nodes have depth level + 1


@struct.dataclass
class DynamicTree:
    """A drafted tree: root first, then nodes in order of creation."""

    tokens: Any  # (b, total + 1) int32; -1 at the root, which is the caller's, and at padding
    tree: Tree
    scores: Any  # (b, total + 1) float32 path log-probability, 0 at the root


StepFunction = Callable[[Any, Frontier], tuple[Array, Any]]
"""``(state, frontier) -> (log-probabilities (b, k, v) of the frontier's successors, state)``."""


@struct.dataclass
class _Pool:
    tokens: Array  # (b, created)
    scores: Array
    parent: Array  # pool index of the parent, -1 for the root


def _best_children(
    log_probs: Float[Array, "b k v"], scores: Float[Array, "b k"], count: int
) -> tuple[Int[Array, "b k*{count}"], Float[Array, "b k*{count}"]]:
    """Top ``count`` successors of every node and their path scores, flattened node by node.

    A log-probability that rounding pushed above 0 counts as 0: no child outscores its parent.
    """
    log_probs = jnp.minimum(log_probs.astype(jnp.float32), 0.0)
    best, tokens = jax.lax.top_k(log_probs, count)
    batch = tokens.shape[0]
    return tokens.reshape(batch, -1), (best + scores[..., None]).reshape(batch, -1)


def _expand(
    step_fn: StepFunction, state: Any, first: _Pool, depth: int, top_k: int
) -> tuple[_Pool, Any]:
    """``depth`` expansions of the best ``top_k`` newest nodes; all created nodes."""
    batch = first.tokens.shape[0]
    slots = jnp.arange(depth * top_k)[None, None, :]
    own = jnp.arange(top_k)[None, :, None]

    def expand(carry: Any, level: Array) -> Any:
        state, tokens, scores, created, source, seen = carry
        take = jnp.broadcast_to(source[..., None], seen.shape)
        seen = jnp.take_along_axis(seen, take, axis=1) | (slots == level * top_k + own)
        log_probs, state = step_fn(state, Frontier(tokens, source, seen, level))
        child_tokens, child_scores = _best_children(log_probs, scores, top_k)
        parent = jnp.repeat(created, top_k, axis=1)
        next_scores, order = jax.lax.top_k(child_scores, top_k)
        next_tokens = jnp.take_along_axis(child_tokens, order, axis=1)
        created = top_k + level * top_k**2 + order
        carry = (state, next_tokens, next_scores, created, order // top_k, seen)
        return carry, _Pool(child_tokens, child_scores, parent)

    none = jnp.zeros((batch, top_k), jnp.int32)
    created = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32)[None], (batch, top_k))
    seen = jnp.zeros((batch, top_k, depth * top_k), bool)
    carry = (state, first.tokens, first.scores, created, none, seen)
    carry, levels = jax.lax.scan(expand, carry, jnp.arange(depth, dtype=jnp.int32))
    flat = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1), levels)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, flat), carry[0]


def dynamic_tree(
    step_fn: StepFunction,
    root_logprobs: Float[Array, "b v"],
    state: Any,
    total_tokens: int,
    depth: int,
    top_k: int,
) -> tuple[DynamicTree, Any]:
    """EAGLE-2's tree: expand the most likely paths, then keep the best nodes of all created.

    Args:
        step_fn: runs the draft on a :class:`Frontier`; it may keep caches in ``state``.
        root_logprobs: the draft's log-probabilities of the root's successors.
        state: handed to ``step_fn`` and from each call to the next.
        total_tokens: drafted nodes kept (the root is not counted; EAGLE-2's "60" means 59).
        depth: expansions after the first, so nodes have depth 1 to ``depth + 1``.
        top_k: nodes expanded per level, and children of each.

    Returns:
        The tree and the last state. A child never outscores its parent, and on exact ties the
        older node is kept, so every kept node's parent is kept. Nodes of probability 0 are
        padding.

    Raises:
        ValueError: sizes below 1 (depth below 0), or more tokens asked than the builder creates
            or the vocabulary holds.
    """
    created = top_k + depth * top_k**2
    if top_k < 1 or depth < 0 or not 1 <= total_tokens <= created:
        raise ValueError(
            f"a tree of {total_tokens} tokens needs top_k >= 1, depth >= 0 and between 1 and "
            f"top_k + depth * top_k**2 = {created} tokens."
        )
    if top_k > root_logprobs.shape[-1]:
        raise ValueError(f"top_k {top_k} exceeds the draft's {root_logprobs.shape[-1]} tokens.")
    batch = root_logprobs.shape[0]
    root_score = jnp.zeros((batch, 1), jnp.float32)
    tokens, scores = _best_children(root_logprobs[:, None], root_score, top_k)
    pool = _Pool(tokens, scores, jnp.full((batch, top_k), -1, jnp.int32))
    if depth:
        pool, state = _expand(step_fn, state, pool, depth, top_k)
    _, kept = jax.lax.top_k(pool.scores, total_tokens)  # the lower index wins ties
    kept = jnp.sort(kept, axis=1)
    best = jax.tree.map(lambda x: jnp.take_along_axis(x, kept, axis=1), pool)
    parent = 1 + jax.vmap(jnp.searchsorted)(kept, best.parent).astype(jnp.int32)
    parent = jnp.where(best.parent < 0, 0, parent)
    return _rooted(best, parent), state


def beam_tree(
    step_fn: StepFunction, root_logprobs: Float[Array, "b v"], state: Any, shape: tuple[int, ...]
) -> tuple[DynamicTree, Any]:
    """LongSpec's tree: a beam of which every level is kept.

    Level 1 holds the ``shape[0]`` most likely successors of the root, and level i + 1 the
    ``shape[i]`` best of all pairs of a node of level i and a token, by the log-probability of the
    path. All nodes of a level but the last are fed to the draft at once.

    Args:
        step_fn, root_logprobs, state: as of :func:`dynamic_tree`.
        shape: nodes of each level.

    Returns:
        The tree, each level from its best node to its worst (the lower index wins ties), and the
        last state. No child outscores its parent. Nodes of probability 0 are padding.

    Raises:
        ValueError: a level without nodes, or with more than there are candidates for it.
    """
    check_beam(shape, root_logprobs.shape[-1])
    batch, log_probs, start = root_logprobs.shape[0], root_logprobs[:, None], 0
    above, seen = jnp.zeros((batch, 1), jnp.float32), jnp.zeros((batch, 1, 0), bool)
    levels = []
    for number, count in enumerate(shape):
        each = min(count, log_probs.shape[-1])
        tokens, scores = _best_children(log_probs, above, each)
        above, order = jax.lax.top_k(scores, count)
        tokens, source = jnp.take_along_axis(tokens, order, axis=1), order // each
        # The root is node 0, and every level begins behind the one above it.
        parent = source + start
        levels.append(_Pool(tokens, above, parent))
        start += 1 if number == 0 else shape[number - 1]
        if number + 1 == len(shape):
            break
        before = jnp.take_along_axis(seen, source[..., None], axis=1)
        own = jnp.broadcast_to(jnp.eye(count, dtype=bool)[None], (batch, count, count))
        seen = jnp.concatenate([before, own], axis=2)
        frontier = Frontier(tokens, source, seen, jnp.asarray(number, jnp.int32))
        log_probs, state = step_fn(state, frontier)
    made = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *levels)
    return _rooted(made, made.parent), state


def check_beam(shape: tuple[int, ...], vocabulary: int) -> None:
    """Raise ValueError for levels that a beam over ``vocabulary`` tokens cannot fill."""
    nodes = 1
    for number, count in enumerate(shape, 1):
        if not 1 <= count <= nodes * vocabulary:
            raise ValueError(
                f"level {number} of a tree {shape} needs between 1 and {nodes * vocabulary} nodes, "
                f"a token for each of {nodes} above: change the shape."
            )
        nodes = count
    if not shape:
        raise ValueError("a tree needs at least one level: give nodes per level, such as (4, 16).")


def _rooted(kept: _Pool, parent: Int[Array, "b n"]) -> DynamicTree:
    """Nodes in their order behind a root; what is impossible becomes padding."""
    batch = parent.shape[0]
    possible = jnp.isfinite(kept.scores)
    root = jnp.full((batch, 1), -1, jnp.int32)
    return DynamicTree(
        tokens=jnp.concatenate([root, jnp.where(possible, kept.tokens, -1)], axis=1),
        tree=tree_from_parents(jnp.concatenate([root, jnp.where(possible, parent, -1)], axis=1)),
        scores=jnp.concatenate([jnp.zeros((batch, 1), jnp.float32), kept.scores], axis=1),
    )


@struct.dataclass
class BudgetLevel:
    """One level of a tree under a token budget; ``slots`` entries, best joint probability first."""

    tokens: Any  # (slots,) int32, -1 where not valid
    source: Any  # (slots,) int32: which parent each token continues, -1 where not valid
    joint: Any  # (slots,) float32 probability of the path, 0 where not valid
    valid: Any  # (slots,) bool
    budget: Any  # scalar int32: what is left for deeper levels


def budget_level(
    probs: Float[Array, "w v"],
    joint: Float[Array, " w"],
    valid: Bool[Array, " w"],
    budget: Number,
    slots: int,
    top_p: Number = 0.95,
    ratio: Number = 0.25,
    one_per_node: Number = False,
) -> BudgetLevel:
    """Children kept at one level by Clover-1's rule for small budgets.

    Of each parent the tokens are kept in decreasing probability until their cumulative
    probability exceeds ``top_p``; those below ``ratio`` times the parent's best are dropped. Of
    what remains, the best by joint probability are kept within ``budget``.

    Args:
        probs: the draft's law after each of ``w`` parents.
        joint: probability of each parent's path.
        valid: which parents exist.
        budget: tokens left for this level and the deeper ones, traced.
        slots: static size of the result, at least the largest budget.
        top_p: cumulative cut; traced.
        ratio: cut relative to the best token; traced, 0 turns it off.
        one_per_node: serve each parent's best token before any second token, as the released
            variant does on all levels but the last; traced.

    Raises:
        ValueError: ``slots`` is below 1.
    """
    if slots < 1:
        raise ValueError(f"a level needs at least one slot, got {slots}.")
    per_node = min(slots, probs.shape[-1])
    best, tokens = jax.lax.top_k(probs.astype(jnp.float32), per_node)
    before = jnp.cumsum(best, axis=-1) - best
    keep = (before <= top_p) & (best >= ratio * best[:, :1]) & (best > 0) & valid[:, None]
    path = best * joint[:, None]
    first = (jnp.arange(per_node) == 0)[None] & jnp.asarray(one_per_node, bool)
    order = jnp.where(keep, path + 2.0 * first, -1.0).reshape(-1)
    order = jnp.pad(order, (0, max(slots - order.shape[0], 0)), constant_values=-1.0)
    priority, index = jax.lax.top_k(order, slots)
    kept = (priority >= 0) & (jnp.arange(slots) < budget)
    index = jnp.where(kept, index, 0)
    return BudgetLevel(
        tokens=jnp.where(kept, tokens.reshape(-1)[index], -1),
        source=jnp.where(kept, index // per_node, -1).astype(jnp.int32),
        joint=jnp.where(kept, path.reshape(-1)[index], 0.0),
        valid=kept,
        budget=jnp.asarray(budget, jnp.int32) - jnp.sum(kept, dtype=jnp.int32),
    )
