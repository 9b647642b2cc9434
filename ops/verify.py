"""Verification of drafted tokens: which path of a draft tree to keep, and which token follows it.

A draft is a padded tree: ``tokens`` and ``parent`` (-1 at padding, node 0 is the root) and
``valid``. The target's forward pass gives ``target_logits``, row i for the successor of node i.
``draft_probs`` row i is the law from which the children of node i were REALLY drawn.

Every mode is exact for any draft, good or bad, except where :data:`LOSSLESS` says otherwise. All
arithmetic is float32. In a fixed tree, nodes of equal token path are walked together, so that
duplicates lose nothing. In a drawn tree they are not: keys do not tell nodes of one level apart,
so the children of two such nodes are not independent draws.

Sources: those of :mod:`ops.acceptance`, EAGLE-2 arXiv 2406.16858 (deterministic trees) and Medusa
2401.10774 (typical acceptance). A further acceptance rule is one more entry of ``_ROWS``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ops.acceptance import SiblingRule, first, try_siblings, verify_chain_with_uniforms
from ops.sampling import Number, SamplingParams, Use, request_key, sample
from ops.transfer import Transfer, verify_transfer_greedily, verify_transfer_with_uniforms
from ops.tree import tree_from_parents

LOSSLESS: dict[str, bool] = {
    "greedy": True,  # equals greedy decoding token for token; sampling parameters are not used
    "deterministic": True,  # the tree is a function of the context, not of a draw
    "swor": True,  # siblings drawn without replacement, numbered in the order drawn
    "with_replacement": True,  # siblings drawn independently
    "chain": True,  # one path, each token drawn
    "typical": False,  # Medusa's typical acceptance changes the law
    "transfer": False,  # RAPID moves the target's law towards the drafter's, unless eta is 0
}

_NEEDS_DRAFT_PROBS = ("swor", "with_replacement", "chain", "transfer")


@struct.dataclass
class Verdict:
    """What a verification decided, per row."""

    path: Any  # (b, d + 1) int32 accepted nodes from the root on, padded with -1
    num_accepted: Any  # (b,) int32 accepted drafted tokens, the root not counted
    next_token: Any  # (b,) int32 token that follows them


@struct.dataclass
class _Row:
    """One row of a batch: a draft, the target's view of it, and the sources of its draws."""

    tokens: Any  # (n,)
    parent: Any  # (n,)
    valid: Any  # (n,)
    logits: Any  # (n, v)
    params: SamplingParams
    seed: Any
    index: Any  # index in the text of the first token to decide
    draft_probs: Any  # (n, v) or None


def _path_to(node: Array, parent: Int[Array, " n"], depth: Array, max_depth: int) -> Array:
    """(max_depth + 1,) nodes from the root to ``node``, which lies at ``depth``; -1 beyond."""

    def climb(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        node, path = carry
        level = depth - step
        path = jnp.where(jnp.arange(max_depth + 1) == level, node, path)
        return jnp.where(level > 0, parent[node], node), path

    path = jnp.full((max_depth + 1,), -1, jnp.int32)
    return jax.lax.fori_loop(0, max_depth + 1, climb, (node, path))[1]


def _walk(
    choose: Callable[..., Any],
    tokens: Int[Array, " n"],
    parent: Int[Array, " n"],
    valid: Bool[Array, " n"],
    outcome: Any,
    max_depth: int,
    merge: bool,
) -> tuple[Array, Array, Any]:
    """Descend from the root while ``choose`` accepts a child.

    ``choose(node, children, level, outcome) -> (token or -1, outcome)`` sees the children of the
    active nodes as a mask. With ``merge`` all nodes of the accepted token path are active, else
    the first. Returns the path, its length and the last outcome.
    """
    ids = jnp.arange(tokens.shape[0])
    drafted = valid & (ids > 0) & (tokens >= 0)

    def descend(carry: Any) -> Any:
        active, _, level, outcome = carry
        children = drafted & (parent >= 0) & active[parent] & (level < max_depth)
        token, outcome = choose(first(active), children, level, outcome)
        chosen = children & (tokens == token)
        moved = jnp.any(chosen)
        if not merge:
            chosen = chosen & (ids == first(chosen))
        return jnp.where(moved, chosen, active), ~moved, level + moved, outcome

    start = (ids == 0, jnp.asarray(False), jnp.asarray(0, jnp.int32), outcome)
    active, _, accepted, outcome = jax.lax.while_loop(lambda carry: ~carry[1], descend, start)
    return _path_to(first(active), parent, accepted, max_depth), accepted, outcome


def _greedy_row(row: _Row, max_depth: int) -> Verdict:
    def choose(node: Array, children: Array, level: Array, outcome: Array) -> Any:
        token = jnp.argmax(row.logits[node]).astype(jnp.int32)
        return token, token

    none = jnp.asarray(-1, jnp.int32)
    return Verdict(*_walk(choose, row.tokens, row.parent, row.valid, none, max_depth, True))


def _deterministic_row(row: _Row, max_depth: int) -> Verdict:
    """Draw from the target at each node of the path and follow the child that carries the token.

    The emitted tokens have the law of the sibling loop with q = 1. The draws are those of plain
    decoding with the same seed, so the text is that of plain decoding, token for token.
    """

    def choose(node: Array, children: Array, level: Array, outcome: Array) -> Any:
        key = request_key(row.seed, row.index + level, Use.TARGET)
        token = sample(key, row.params.warp(row.logits[node]))
        return token, token

    none = jnp.asarray(-1, jnp.int32)
    return Verdict(*_walk(choose, row.tokens, row.parent, row.valid, none, max_depth, True))


def _sampled_row(row: _Row, max_depth: int, rule: SiblingRule) -> Verdict:
    def choose(node: Array, children: Array, level: Array, law: Array) -> Any:
        def uniform(rank: Array) -> Array:
            return jax.random.uniform(request_key(row.seed, row.index + level, Use.ACCEPT, rank))

        p, q = row.params.warp(row.logits[node]), row.draft_probs[node]
        token, p, _ = try_siblings(row.tokens, children, p, q, rule, uniform)
        return token, p

    law = jnp.zeros((row.logits.shape[-1],), jnp.float32)
    path, accepted, law = _walk(choose, row.tokens, row.parent, row.valid, law, max_depth, False)
    key = request_key(row.seed, row.index + accepted, Use.RESIDUAL)
    return Verdict(path, accepted, sample(key, law))


def verify_tree_with_uniforms(
    tokens: Int[Array, " n"],
    parent: Int[Array, " n"],
    valid: Bool[Array, " n"],
    target_probs: Float[Array, "n v"],
    uniforms: Float[Array, " m"],
    rule: SiblingRule,
    draft_probs: Float[Array, "n v"] | None = None,
) -> tuple[Int[Array, " n"], Int[Array, ""], Float[Array, " v"], Int[Array, ""]]:
    """One tree verified by the sibling loop with given uniform numbers, read in order of use.

    For replaying other implementations and for exact enumeration. ``draft_probs`` is None for the
    deterministic rule only.

    Returns:
        The path, the number of accepted tokens, the law of the next token, and how many uniforms
        were used.

    Raises:
        ValueError: fewer uniforms than drafted nodes, or ``draft_probs`` missing or superfluous.
    """
    n = tokens.shape[0]
    if uniforms.shape[0] < n - 1:
        raise ValueError(
            f"{n - 1} drafted nodes may need as many uniforms: got {uniforms.shape[0]}."
        )
    if (draft_probs is None) != (rule == "deterministic"):
        raise ValueError("give draft_probs for sampled siblings, and none for a deterministic set.")
    target_probs = target_probs.astype(jnp.float32)

    def choose(node: Array, children: Array, level: Array, outcome: Any) -> Any:
        _, used = outcome
        q = None if draft_probs is None else draft_probs[node].astype(jnp.float32)
        token, law, tried = try_siblings(
            tokens, children, target_probs[node], q, rule, lambda rank: uniforms[used + rank]
        )
        return token, (law, used + tried)

    outcome = (jnp.zeros_like(target_probs[0]), jnp.asarray(0, jnp.int32))
    merge = rule == "deterministic"
    path, accepted, (law, used) = _walk(choose, tokens, parent, valid, outcome, n - 1, merge)
    return path, accepted, law, used


def _chain(row: _Row, max_depth: int) -> tuple[Array, Array]:
    """Uniform numbers for a chain's drafted tokens, and which of these count, as a batch of one."""
    steps = jnp.arange(row.tokens.shape[0] - 1)
    keys = jax.vmap(lambda k: request_key(row.seed, row.index + k, Use.ACCEPT))(steps)
    valid = row.valid[1:] & (row.tokens[1:] >= 0) & (steps < max_depth)
    return jax.vmap(jax.random.uniform)(keys)[None], valid[None]


def _along_chain(accepted: Array, next_token: Array, max_depth: int) -> Verdict:
    nodes = jnp.arange(max_depth + 1)
    return Verdict(jnp.where(nodes <= accepted, nodes, -1), accepted, next_token)


def _chain_row(row: _Row, max_depth: int) -> Verdict:
    uniforms, valid = _chain(row, max_depth)
    accepted, law = verify_chain_with_uniforms(
        row.params.warp(row.logits)[None],
        row.draft_probs[None, :-1],
        row.tokens[None, 1:],
        uniforms,
        valid,
    )
    key = request_key(row.seed, row.index + accepted[0], Use.RESIDUAL)
    return _along_chain(accepted[0], sample(key, law[0]), max_depth)


def _transfer_row(row: _Row, max_depth: int, transfer: Transfer) -> Verdict:
    uniforms, valid = _chain(row, max_depth)
    q, tokens = row.draft_probs[None, :-1], row.tokens[None, 1:]
    accepted, law = verify_transfer_with_uniforms(
        row.params.warp(row.logits)[None], q, tokens, uniforms, transfer, valid
    )
    key = request_key(row.seed, row.index + accepted[0], Use.RESIDUAL)
    sampled = _along_chain(accepted[0], sample(key, law[0]), max_depth)
    accepted, token = verify_transfer_greedily(row.logits[None], q, tokens, transfer, valid)
    greedy = _along_chain(accepted[0], token[0], max_depth)
    return jax.tree.map(lambda a, b: jnp.where(row.params.temperature > 0, a, b), sampled, greedy)


def _typical_row(row: _Row, max_depth: int, threshold: Array, alpha: Array) -> Verdict:
    """Medusa's typical acceptance; the next token is the argmax, so progress is certain."""
    p = row.params.warp(row.logits)
    entropy = -jnp.sum(p * jnp.log(p + 1e-5), axis=-1)
    bound = jnp.minimum(threshold, alpha * jnp.exp(-entropy))
    above = jnp.maximum(row.parent, 0)
    p_token = p[above, jnp.maximum(row.tokens, 0)]
    tree = tree_from_parents(row.parent)
    kept = row.valid & (row.tokens >= 0) & (p_token > bound[above])
    kept = tree.valid & (kept | (tree.depth == 0)) & (tree.depth <= max_depth)
    kept = jnp.all(kept[None, :] | ~tree.mask, axis=1)
    log_p = jnp.where(kept & (tree.depth > 0), jnp.log(jnp.where(p_token > 0, p_token, 1.0)), 0.0)
    likelihood = jnp.sum(jnp.where(tree.mask, log_p[None, :], 0.0), axis=1)
    accepted = jnp.max(jnp.where(kept, tree.depth, 0))
    deepest = kept & (tree.depth == accepted)
    node = jnp.argmax(jnp.where(deepest, likelihood, -jnp.inf)).astype(jnp.int32)
    path = _path_to(node, row.parent, accepted, max_depth)
    return Verdict(path, accepted, jnp.argmax(row.logits[node]).astype(jnp.int32))


_ROWS: dict[str, Callable[..., Verdict]] = {
    "greedy": _greedy_row,
    "deterministic": _deterministic_row,
    "swor": functools.partial(_sampled_row, rule="swor"),
    "with_replacement": functools.partial(_sampled_row, rule="with_replacement"),
    "chain": _chain_row,
    "typical": _typical_row,
    "transfer": _transfer_row,
}


def verify(
    mode: str,
    tokens: Int[Array, "b n"],
    parent: Int[Array, "#b n"],
    valid: Bool[Array, "#b n"],
    target_logits: Float[Array, "b n v"],
    params: SamplingParams,
    seeds: Int[Array, " b"],
    index: Int[Array, " b"],
    draft_probs: Float[Array, "b n v"] | None = None,
    max_depth: int | None = None,
    typical_threshold: Number = 0.09,
    typical_alpha: Number = 0.3,
    transfer: Transfer | None = None,
) -> Verdict:
    """Verify one draft tree per row.

    Args:
        mode: what the draft is, see :data:`LOSSLESS`. At temperature 0 every lossless mode equals
            greedy.
        tokens: -1 at padding; the root's entry is not read.
        parent: -1 at the root and at padding; for ``"chain"`` and ``"transfer"`` node i's
            parent is i - 1.
        valid: padding and dropped nodes are False.
        target_logits: row i predicts the successor of node i; any float type.
        params: what plain decoding would do with these logits.
        seeds: the requests' seeds.
        index: index in each row's text of the first token that is decided here (its length).
        draft_probs: laws from which each node's children were drawn; for the sampled modes. For
            ``"transfer"`` in rows of temperature 0 they are the drafter's laws at temperature 1.
        max_depth: longest path considered, static; by default n - 1. Deeper nodes are ignored.
        typical_threshold: Medusa's epsilon; traced.
        typical_alpha: Medusa's delta; traced.
        transfer: how far ``"transfer"`` goes.

    A row's verdict depends on that row alone. The draws are keyed by seed and token index.

    Raises:
        ValueError: an unknown mode, ``draft_probs`` or ``transfer`` missing or superfluous, or a
            negative depth.
    """
    if mode not in LOSSLESS:
        raise ValueError(f"unknown verifier mode {mode!r}: choose one of {', '.join(LOSSLESS)}.")
    if (draft_probs is not None) != (mode in _NEEDS_DRAFT_PROBS):
        raise ValueError(
            f"mode {mode!r} {'needs' if draft_probs is None else 'takes no'} draft_probs: they are "
            "the laws of sampled children; a fixed set of children is 'deterministic'."
        )
    batch, n = tokens.shape
    if (transfer is not None) != (mode == "transfer"):
        raise ValueError("mode 'transfer' needs its settings as transfer, other modes take none.")
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"max_depth must not be negative, got {max_depth}.")
    depth = n - 1 if max_depth is None else min(max_depth, n - 1)
    rows = _Row(
        tokens,
        jnp.broadcast_to(parent, (batch, n)),
        jnp.broadcast_to(valid, (batch, n)),
        target_logits.astype(jnp.float32),
        params.per_row(batch),
        seeds,
        index,
        None if draft_probs is None else draft_probs.astype(jnp.float32),
    )
    decide = functools.partial(_ROWS[mode], max_depth=depth)
    if mode == "typical":
        limits = [jnp.asarray(x, jnp.float32) for x in (typical_threshold, typical_alpha)]
        decide = functools.partial(decide, threshold=limits[0], alpha=limits[1])
    if mode == "transfer":
        decide = functools.partial(decide, transfer=transfer)
    return jax.vmap(decide)(rows)


def emitted_tokens(tokens: Int[Array, "b n"], verdict: Verdict) -> Int[Array, "b d"]:
    """The tokens a verdict adds to each row: the accepted ones, then the next; padded with -1.

    ``d`` is the path's width: between 1 and d tokens per row, ``num_accepted + 1`` of them real.
    """
    path, accepted = verdict.path, verdict.num_accepted[:, None]
    nodes = jnp.pad(path[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    drafted = jnp.take_along_axis(tokens, jnp.maximum(nodes, 0), axis=1)
    slots = jnp.arange(path.shape[1])[None]
    after = jnp.where(slots == accepted, verdict.next_token[:, None], -1)
    return jnp.where(slots < accepted, drafted, after)
