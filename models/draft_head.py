"""The target's language-model head as a drafter sees it: frozen, and maybe only some of its rows.

Drafters score with the target's own head and may embed tokens by its rows. A drafter can also keep
to a :class:`DraftVocabulary`, the rows of frequent tokens alone: it then never drafts the others,
which costs acceptance but not exactness.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from models import decoder
from models.decoder import Config
from ops.weights import WeightLeaf, matmul, take


@struct.dataclass
class DraftVocabulary:
    """Rows of the target's head for the tokens that may be drafted, gathered once."""

    ids: Any  # (d,) int32, ascending
    rows: Any  # (d, width)


def head_rows(
    params: decoder.Params, cfg: Config, ids: Int[Array, "*batch"]
) -> Float[Array, "*batch width"]:
    """Rows of the target's head for tokens ``ids``, used as token embeddings."""
    if params.head is None:
        return take(params.embed, ids)
    if isinstance(params.head, WeightLeaf):
        # A codec offers rows of its (width, vocab) matrix, so columns come as a product.
        chosen = jax.nn.one_hot(ids, cfg.vocab_size, dtype=params.final_norm.scale.dtype)
        return matmul(chosen, params.head, transpose=True)
    return jnp.moveaxis(jnp.take(params.head, ids, axis=1), 0, -1)


def draft_vocabulary(
    params: decoder.Params, cfg: Config, ids: Sequence[int] | np.ndarray
) -> DraftVocabulary:
    """The rows of ``ids``, sorted.

    Raises:
        ValueError: no ids, repeated ids, or ids outside the vocabulary.
    """
    chosen = np.sort(np.asarray(ids, np.int64).reshape(-1))
    if chosen.size == 0 or chosen[0] < 0 or chosen[-1] >= cfg.vocab_size:
        raise ValueError(
            f"a draft vocabulary needs token ids in 0..{cfg.vocab_size - 1}: count them with the "
            f"target's tokenizer."
        )
    if np.any(chosen[1:] == chosen[:-1]):
        raise ValueError("a draft vocabulary names each token once: remove the repeated ids.")
    array = jnp.asarray(chosen, jnp.int32)
    return DraftVocabulary(array, head_rows(params, cfg, array))


def frequent_tokens(tokens: Sequence[int] | np.ndarray, vocab_size: int, count: int) -> np.ndarray:
    """The ``count`` most frequent ids of a text, ascending; ties prefer the lower id.

    Raises:
        ValueError: ``count`` is not within 1 and the size of the vocabulary.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"choose between 1 and {vocab_size} tokens, got {count}.")
    counts = np.bincount(np.asarray(tokens, np.int64).reshape(-1), minlength=vocab_size)
    return np.sort(np.argsort(-counts, kind="stable")[:count])


def draft_logits(
    params: decoder.Params,
    cfg: Config,
    vocabulary: DraftVocabulary | None,
    hidden: Float[Array, "*batch width"],
) -> Float[Array, "*batch d"]:
    """Float32 logits of the target's head over the draft vocabulary (None: over all tokens)."""
    if vocabulary is None:
        return decoder.unembed(params, cfg, hidden)
    return matmul(hidden, vocabulary.rows, transpose=True).astype(jnp.float32)


def token_ids(
    vocabulary: DraftVocabulary | None, index: Int[Array, "*batch"]
) -> Int[Array, "*batch"]:
    """Token ids of indices into the draft vocabulary."""
    return index if vocabulary is None else jnp.take(vocabulary.ids, index)


def spread(
    vocabulary: DraftVocabulary | None, cfg: Config, probs: Float[Array, "*batch d"]
) -> Float[Array, "*batch vocab"]:
    """A law over the draft vocabulary as one over all tokens."""
    if vocabulary is None:
        return probs
    full = jnp.zeros((*probs.shape[:-1], cfg.vocab_size), probs.dtype)
    return full.at[..., vocabulary.ids].set(probs)
