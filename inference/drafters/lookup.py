"""Prompt lookup: the text so far is the draft model. The strong simple baseline without training.

The last few tokens are looked up in the text before them; what followed there is the draft.
Source: A. Saxena, "Prompt Lookup Decoding" (2023). Departures: the most recent match is taken, and
where it lies less than a draft's length from the end, the stretch between is repeated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from inference.drafter import Context, Draft, Stateless, Target, static_draft
from ops.tree import chain_tree


@dataclasses.dataclass(frozen=True)
class LookupDrafter(Stateless):
    """A chain of tokens copied from after the longest matching n-gram.

    Attributes:
        length: tokens per draft, or one number for each n-gram size: longer matches go wrong less
            often. After a match of a size with 0 nothing is drafted.
        ngrams: sizes of the suffix to look up, the preferred one first.

    Raises:
        ValueError: an n-gram size below 1, no length above 0, or not one for each size.
    """

    length: int | tuple[int, ...] = 10
    ngrams: tuple[int, ...] = (3, 2)
    needs: frozenset[str] = frozenset()
    widths: tuple[int, ...] = (1,)  # without a match the pass is that of plain decoding

    def __post_init__(self):
        if not self.ngrams or min(self.ngrams) < 1 or max(self.lengths) < 1:
            raise ValueError(
                f"lookup needs a length and n-gram sizes of 1 or more, got {self.length} and "
                f"{self.ngrams}."
            )
        if len(self.lengths) != len(self.ngrams) or min(self.lengths) < 0:
            raise ValueError(
                f"lookup needs one length, or one of 0 or more for each of the n-gram sizes "
                f"{self.ngrams}, got {self.length}."
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a draft after a match of each n-gram size."""
        return self.length if isinstance(self.length, tuple) else (self.length,) * len(self.ngrams)

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.max_depth + 1

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return max(self.lengths)

    def propose(
        self,
        params: Any,
        state: Any,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, Any, Any]:
        """See :class:`inference.drafter.Drafter`; without a match only the root is valid."""
        text = context.tokens[:, : context.extent]
        copied, match = jax.vmap(
            lambda row, n: copy_after_match(row, n, self.ngrams, self.max_depth)
        )(text, context.length)
        tokens = jnp.concatenate([root[:, None], copied], axis=1)
        drafted = jnp.asarray((*self.lengths, 0), jnp.int32)[match]
        valid = jnp.arange(self.width, dtype=jnp.int32)[None] <= drafted[:, None]
        return static_draft(chain_tree(self.max_depth), tokens, valid), state, cache


def copy_after_match(
    tokens: Int[Array, " l"], length: Int[Array, ""], ngrams: tuple[int, ...], count: int
) -> tuple[Int[Array, " count"], Int[Array, ""]]:
    """``count`` tokens that followed the most recent earlier occurrence of the text's suffix.

    Args:
        tokens: the text, of which the first ``length`` tokens count.
        ngrams: suffix sizes; the first that occurs earlier in the text is used.
        count: tokens to copy. A match at distance d from the end repeats with period d.

    Returns:
        The tokens (anything if there is no match), and the place in ``ngrams`` of the size that
        matched, their number if none did.
    """
    at = jnp.arange(tokens.shape[0])
    distance, place = jnp.zeros((), jnp.int32), jnp.full((), len(ngrams), jnp.int32)
    for number, size in enumerate(ngrams):
        # Position i matches if the n-gram that ends there equals the one at the end of the text.
        match = (at >= size - 1) & (at < length - 1)
        for back in range(size):
            last = tokens[jnp.maximum(length - 1 - back, 0)]
            match &= jnp.roll(tokens, back) == last
        latest = jnp.max(jnp.where(match, at, -1)).astype(jnp.int32)
        here = jnp.where(latest >= 0, length - 1 - latest, 0).astype(jnp.int32)
        place = jnp.where((distance == 0) & (here > 0), number, place)
        distance = jnp.where(distance > 0, distance, here)
    offset = jnp.arange(count) % jnp.maximum(distance, 1)
    source = jnp.clip(length - distance + offset, 0, tokens.shape[0] - 1)
    return tokens[source].astype(jnp.int32), place


def load(argument: str, model: Any) -> tuple[LookupDrafter, None]:
    """The drafter with its usual settings: there is nothing to load."""
    return LookupDrafter(), None
