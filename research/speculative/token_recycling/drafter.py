"""Token Recycling: drafts read from a table of the candidates that earlier passes computed.

Source: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models
with Token Recycling", arXiv 2408.08696.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from inference.drafter import (
    Context,
    Draft,
    FixedTree,
    Request,
    Target,
    TargetOutputs,
    on_path,
    static_draft,
)
from ops.tree import TOKEN_RECYCLING_80, StaticTree

UPDATES = ("all", "accepted", "none")


@struct.dataclass
class RecyclingState:
    """``matrix[t, r]``: the successor of rank r when token t was last processed. One per engine."""

    matrix: Any  # (v, k) int32


@dataclasses.dataclass(frozen=True)
class TokenRecycling(FixedTree):
    """Drafts a static tree from the recycled candidates of all rows together.

    ``params`` is the matrix to start from, or None for zeros (as the paper does). A matrix of
    corpus bigrams with ``update="none"`` is the frozen baseline (:func:`bigram_matrix`).

    Attributes:
        tree: paths of candidate ranks.
        k: candidates kept per token.
        update: learn from every node of the tree (the method), from the accepted ones only (an
            ablation), or not at all.
        update_on_prefill: learn from the prompt too (off, as in the official code).

    Raises:
        ValueError: an unknown ``update``, or a tree that uses ranks beyond ``k``.
    """

    tree: StaticTree = TOKEN_RECYCLING_80
    k: int = 8
    update: str = "all"
    update_on_prefill: bool = False
    shared_state: bool = True

    def __post_init__(self):
        if self.update not in UPDATES:
            raise ValueError(f"unknown update {self.update!r}: choose one of {', '.join(UPDATES)}.")
        if self.tree.rank.max() >= self.k:
            raise ValueError(
                f"the tree uses rank {self.tree.rank.max()} but {self.k} candidates are kept: "
                f"raise k or prune the tree."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The logits of every node, unless nothing is learnt."""
        return frozenset() if self.update == "none" else frozenset({"logits"})

    @property
    def prompt_needs(self) -> frozenset[str]:
        """The prompt's logits, only if they are learnt from."""
        return frozenset({"logits"}) if self.update_on_prefill else frozenset()

    def init(
        self, params: Any, target: Target, request: Request, prompt: TargetOutputs, capacity: int
    ) -> RecyclingState:
        """The matrix of the earlier call if there is one, else ``params``, else zeros."""
        if request.memory is not None:
            matrix = request.memory.matrix
        else:
            matrix = init_matrix(target.cfg.vocab_size, self.k) if params is None else params
        if matrix.shape != (target.cfg.vocab_size, self.k):
            raise ValueError(
                f"the matrix has shape {matrix.shape} but this model and drafter need "
                f"{(target.cfg.vocab_size, self.k)}: start from one of the same tokenizer and k."
            )
        if self.update_on_prefill and prompt.logits is not None:
            index = jnp.arange(prompt.tokens.shape[1])[None]
            # The last prompt token is the root: its row comes with the first round.
            seen = index < request.lengths[:, None] - 1
            matrix = update_matrix(matrix, prompt.tokens, top_ids(prompt.logits, self.k), seen)
        return RecyclingState(matrix)

    def propose(
        self,
        params: Any,
        state: RecyclingState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, RecyclingState, Any]:
        """The tree below the root, read from the matrix level by level.

        Candidates that repeat stay in the tree: the verifier walks equal siblings as one.
        """
        return static_draft(self.tree, draft_tree(state.matrix, root, self.tree)), state, cache

    def observe(
        self,
        params: Any,
        state: RecyclingState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> RecyclingState:
        """Each processed token's row becomes the top candidates of its pass."""
        if self.update == "none":
            return state
        learnt = draft.valid & (n > 0)[:, None]
        if self.update == "accepted":
            learnt &= on_path(path, n, draft.tokens.shape[1])
        candidates = top_ids(outputs.logits, self.k)
        return RecyclingState(update_matrix(state.matrix, draft.tokens, candidates, learnt))


def init_matrix(vocab_size: int, k: int) -> Int[Array, "v k"]:
    """The cold matrix: zeros."""
    return jnp.zeros((vocab_size, k), jnp.int32)


def draft_tree(
    matrix: Int[Array, "v k"], root: Int[Array, " b"], tree: StaticTree
) -> Int[Array, "b n"]:
    """Tokens of all nodes, one gather per level."""
    levels = [root.astype(jnp.int32)[:, None]]
    start = 0
    for level in tree.levels:
        above = levels[-1][:, level.parent - start]
        levels.append(matrix[above, level.rank[None]])
        start = level.start
    return jnp.concatenate(levels, axis=1)


def top_ids(logits: Any, k: int) -> Int[Array, "b n k"]:
    """Ids of the ``k`` largest logits in descending order, lower ids first on ties."""
    return jax.lax.top_k(logits, k)[1].astype(jnp.int32)


def update_matrix(
    matrix: Int[Array, "v k"],
    tokens: Int[Array, "b n"],
    candidates: Int[Array, "b n k"],
    learnt: Bool[Array, "b n"],
) -> Int[Array, "v k"]:
    """``matrix`` with the rows of all ``learnt`` tokens replaced by their candidates.

    Where a token occurs more than once the last one wins: rows of the batch in order, then nodes
    in order. (A scatter with repeated indices leaves the winner open.)
    """
    vocab = matrix.shape[0]
    flat = jnp.where(learnt, tokens, vocab).reshape(-1)
    order = jnp.arange(flat.shape[0])
    last = jnp.full((vocab + 1,), -1, order.dtype).at[flat].max(order)
    winner = jnp.where(last[flat] == order, flat, vocab)
    return matrix.at[winner].set(candidates.reshape(-1, matrix.shape[1]), mode="drop")


def bigram_matrix(tokens: Sequence[int] | np.ndarray, vocab_size: int, k: int = 8) -> np.ndarray:
    """The ``k`` most frequent successors of every token in a corpus, (vocab_size, k) int32.

    Ties prefer the lower id. Tokens with fewer successors are filled up with the most frequent
    tokens of the corpus.

    Raises:
        ValueError: fewer than two tokens, or an id outside the vocabulary.
    """
    ids = np.asarray(tokens, np.int64)
    if ids.size < 2 or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"counting bigrams needs at least two token ids in 0..{vocab_size - 1}: check that "
            f"the corpus was encoded with this model's tokenizer."
        )
    common = np.argsort(-np.bincount(ids, minlength=vocab_size), kind="stable")
    pairs, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    order = np.lexsort((second, -counts, first))
    first, second = first[order], second[order]
    starts = np.searchsorted(first, np.arange(vocab_size + 1))
    matrix = np.empty((vocab_size, k), np.int32)
    for token in range(vocab_size):
        known = second[starts[token] : starts[token + 1]][:k]
        rest = common[: k + len(known)]
        matrix[token] = np.concatenate([known, rest[~np.isin(rest, known)]])[:k]
    return matrix


def load(argument: str, model: Any) -> tuple[TokenRecycling, None]:
    """The drafter as the paper describes it, from a cold matrix: there is nothing to load."""
    return TokenRecycling(), None
