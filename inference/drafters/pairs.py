"""Drafters with a cache of their own over pairs of a true hidden state and the token after it.

Clover's augmenting block and EAGLE's layer see the text as pairs (hidden state of position s, token
s + 1). Pairs arrive when a draft has been verified and are run at the start of the next round, when
it is known how many slots attention must read. Nothing that was only guessed enters the cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.cache import init_cache
from inference.drafter import Draft, Request, committed
from models import decoder
from models.attention import Step

Run = Callable[[Array, Array, Step, Any], tuple[Array, Any]]
"""``run(hidden, tokens, step, layer_caches) -> (outputs, layer_caches)``."""


@struct.dataclass
class PairState:
    """The cache over pairs seen, the output at the last one, and pairs not yet run."""

    cache: Any
    last: Any  # (b, width) output at the last pair, zeros before the first
    hidden: Any  # (b, d, width) hidden states of new pairs
    tokens: Any  # (b, d) the tokens after them
    count: Any  # (b,) how many of the d there are

    @property
    def ready(self) -> Bool[Array, " b"]:
        """Rows with at least one pair in the cache: others cannot draft yet."""
        return self.cache.length > 0


def init_pairs(
    run: Run,
    cfg: decoder.Config,
    request: Request,
    hidden: Any,
    width: int,
    depth: int,
    capacity: int,
    dtype: Any,
) -> PairState:
    """The state after the prompt, whose pairs are all run at once.

    Args:
        cfg: the drafter's own layers as a decoder, for the cache.
        hidden: (b, p, width) the prompt's hidden states but the last; None if no prompt has two
            tokens.
        depth: most drafted tokens that one round can accept.
    """
    batch = request.tokens.shape[0]
    state = PairState(
        cache=init_cache(cfg, batch, capacity, dtype),
        last=jnp.zeros((batch, width), dtype),
        hidden=jnp.zeros((batch, depth + 1, width), dtype),
        tokens=jnp.zeros((batch, depth + 1), jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
    )
    if hidden is None or hidden.shape[1] == 0:
        return state
    size = min(hidden.shape[1], request.tokens.shape[1] - 1)
    following = jnp.maximum(request.tokens[:, 1 : size + 1], 0)
    prompt = dataclasses.replace(
        state, hidden=hidden[:, :size].astype(dtype), tokens=following, count=request.lengths - 1
    )
    prompt = run_pairs(run, prompt, extent=size, mode="prefill")
    return dataclasses.replace(state, cache=prompt.cache.end_prefill(), last=prompt.last)


def run_pairs(run: Run, state: PairState, extent: int | None, mode: str = "decode") -> PairState:
    """Run the new pairs and commit them; rows without any keep what they had."""
    size = state.tokens.shape[1]
    cache = state.cache
    positions = cache.next_position[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    cache, start = cache.append_scratch(positions)
    step = Step(
        positions=positions,
        start=start,
        slot_positions=cache.positions,
        extent=extent,
        mode=mode,
    )
    out, layers = run(state.hidden, state.tokens, step, cache.layers)
    cache = dataclasses.replace(cache, layers=layers).commit(None, state.count)
    newest = jnp.maximum(state.count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(out, newest, axis=1)[:, 0]
    return dataclasses.replace(
        state,
        cache=cache,
        last=jnp.where((state.count > 0)[:, None], last, state.last).astype(state.last.dtype),
        count=jnp.zeros_like(state.count),
    )


def run_nodes(
    run: Run,
    cache: Any,
    features: Float[Array, "b k width"],
    tokens: Int[Array, "b k"],
    positions: Int[Array, "b k"],
    tree: Bool[Array, "b k n"],
    extent: int | None,
) -> tuple[Float[Array, "b k width"], Any]:
    """Run guessed pairs behind the committed ones: outputs, and the cache with them as scratch.

    ``tree`` says which of the scratch slots each node sees.
    """
    tree_start = cache.length
    cache, start = cache.append_scratch(positions)
    step = Step(
        positions=positions,
        start=start,
        slot_positions=cache.positions,
        tree=tree,
        tree_start=tree_start,
        extent=extent,
        mode="decode",
    )
    out, layers = run(features, tokens, step, cache.layers)
    return out, dataclasses.replace(cache, layers=layers)


def keep_committed(
    state: PairState,
    draft: Draft,
    hidden: Float[Array, "b n width"],
    path: Int[Array, "b d"],
    n: Int[Array, " b"],
    root: Int[Array, " b"],
) -> PairState:
    """The pairs of the ``n`` committed nodes of a verified draft, to be run next round.

    Each node's hidden state goes with the token after it: the next node's on the path, and for the
    last one the new root.
    """
    index = jnp.arange(path.shape[1])[None]
    after = jnp.pad(path[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    tokens = jnp.where(index == n[:, None] - 1, root[:, None], committed(draft.tokens, after))
    return dataclasses.replace(
        state,
        hidden=committed(hidden, path).astype(state.hidden.dtype),
        tokens=jnp.maximum(tokens, 0),
        count=n,
    )
