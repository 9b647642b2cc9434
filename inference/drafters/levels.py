"""Filling a static draft tree level by level, by a drafter that scores each node's successors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from inference.drafter import Context, Draft, static_draft
from models.decoder import Config
from models.draft_head import DraftVocabulary, spread, token_ids
from ops.sampling import Use, request_key, sample_without_replacement
from ops.tree import StaticTree

Expand = Callable[[int, Array, Array, Any], tuple[Array, Array, Any]]
"""``expand(level, tokens (b, w), states (b, w, width), carry) -> (states, logits, carry)``.

The ``w`` nodes are those of the level above that have children; ``states`` come from their
parents, and what is returned goes to their children.
"""


def draft_levels(
    tree: StaticTree,
    root: Int[Array, " b"],
    state: Float[Array, "b width"],
    ready: Bool[Array, " b"],
    expand: Expand,
    carry: Any,
    vocabulary: DraftVocabulary | None,
    cfg: Config,
    context: Context,
    sampled: bool,
) -> tuple[Draft, Any]:
    """The tree below each root, and the last carry.

    Args:
        state: what ``expand`` gets for the root.
        ready: rows that draft; the others propose the root alone.
        sampled: draw each node's children without replacement from its warped law, which is then
            kept for the verifier. Otherwise, and where no row samples, they are its most likely
            tokens, a fixed set.
    """
    batch, sampled = root.shape[0], sampled and not context.greedy
    laws = jnp.zeros((batch, tree.size, cfg.vocab_size), jnp.float32) if sampled else None
    tokens, valid = [root.astype(jnp.int32)[:, None]], [jnp.ones((batch, 1), bool)]
    states, source, start = state[:, None], None, 0
    for number, level in enumerate(tree.levels, 1):
        above = level.expanded - start  # the expanded nodes within the level above
        given = states if source is None else states[:, source[above]]
        states, logits, carry = expand(number, tokens[-1][:, above], given, carry)
        count = int(level.rank.max()) + 1
        if logits.shape[-1] < count:
            raise ValueError(
                f"the tree takes {count} children of a node but {logits.shape[-1]} tokens can be "
                f"drafted: use a narrower tree or a larger draft vocabulary."
            )
        if laws is None:
            index = jax.lax.top_k(logits, count)[1]
            there = jnp.ones(index.shape, bool)
        else:
            index, there, law = _draw(logits, context, number, level.expanded, count)
            laws = laws.at[:, level.expanded].set(spread(vocabulary, cfg, law))
        chosen = token_ids(vocabulary, jnp.maximum(index, 0))
        tokens.append(chosen[:, level.source, level.rank].astype(jnp.int32))
        valid.append(
            there[:, level.source, level.rank] & valid[-1][:, level.parent - start] & ready[:, None]
        )
        source, start = level.source, level.start
    draft = static_draft(
        tree,
        jnp.concatenate(tokens, axis=1),
        valid=jnp.concatenate(valid, axis=1),
        probs=laws,
        mode="swor" if sampled else "deterministic",
    )
    return draft, carry


def _draw(
    logits: Float[Array, "b w v"], context: Context, number: int, nodes: Any, count: int
) -> tuple[Int[Array, "b w k"], Bool[Array, "b w k"], Float[Array, "b w v"]]:
    """``count`` draws without replacement at every node, in the order drawn, and the laws.

    A node's key has the index of the token to draw and the node's number, so it depends on neither
    batch nor round.
    """
    sampling = context.sampling.per_row(logits.shape[0])
    laws = jax.vmap(lambda row, rule: jax.vmap(rule.warp)(row))(logits, sampling)

    def one(seed: Array, length: Array, node: Array, law: Array) -> tuple[Array, Array]:
        key = request_key(seed, length + number - 1, Use.DRAFT, node)
        return sample_without_replacement(key, law, count)

    over_nodes = jax.vmap(one, in_axes=(None, None, 0, 0))
    over_rows = jax.vmap(over_nodes, in_axes=(0, 0, None, 0))
    index, there = over_rows(context.seeds, context.length, jnp.asarray(nodes), laws)
    return index, there, laws


def check_sampled_tree(tree: StaticTree) -> None:
    """Raise ValueError if a node's ranks have gaps: the verifier must see every sibling drawn."""
    for parent in set(tree.parent[1:].tolist()):
        ranks = tree.rank[1:][tree.parent[1:] == parent]
        if sorted(ranks.tolist()) != list(range(len(ranks))):
            raise ValueError(
                f"sampled drafts need children of ranks 0, 1, ... at every node, but node {parent} "
                f"has {sorted(ranks.tolist())}: fill the gaps."
            )
