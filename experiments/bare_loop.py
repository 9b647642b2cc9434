"""Greedy decoding with nothing but the model, for what the speculative loop costs beside it."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.measure import timed
from inference.cache import Cache
from inference.engine import make_engine
from models import decoder
from models.attention import Step
from models.load import Model
from ops.sampling import SamplingParams


@functools.partial(jax.jit, static_argnames=("cfg", "extent"), donate_argnames=("cache",))
def bare_decoding(
    params: Any,
    cfg: decoder.Config,
    cache: Cache,
    root: Int[Array, " b"],
    count: Int[Array, ""],
    extent: int,
) -> tuple[Int[Array, " b"], Cache]:
    """``count`` greedy tokens after ``root``; the last of them, and the cache.

    No stop tokens, counters, seeds or drafts; rows and rounds are those of the engine's loop.
    """

    def one(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        token, cache = carry
        positions = cache.next_position[:, None]
        cache, start = cache.append_scratch(positions)
        step = Step(
            positions=positions, start=start, slot_positions=cache.positions, extent=extent,
            mode="decode",
        )  # fmt: skip
        out = decoder.forward(params, cfg, token[:, None], step=step, cache=cache.layers)
        logits = decoder.unembed(params, cfg, out.hidden)[:, 0]
        kept = Cache(
            out.cache, cache.positions, cache.length, cache.scratch, cache.next_position
        ).commit(None, jnp.ones_like(token))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), kept

    return jax.lax.fori_loop(0, count, one, (root, cache))


def loop_overhead(model: Model, tokens: int, repeats: int) -> list[float]:
    """What the loop without a drafter takes beyond the bare one, as shares of the bare one's time.

    Both decode the same tokens from the same cache, in turn; the first time is the compiler's.

    Raises:
        RuntimeError: they do not end with the same token.
    """
    engine = make_engine(model.params, model.cfg)
    greedy, prompt = SamplingParams.make(), [1 % model.cfg.vocab_size] * 16
    shares = []
    for repeat in range(repeats + 1):
        ours, state = timed(engine, [prompt], tokens, greedy, ())
        last = int(np.asarray(state.tokens)[0, len(prompt) + tokens - 1])
        state, _ = engine.start([prompt], tokens, greedy)
        jax.block_until_ready(state)
        root = jnp.asarray([prompt[-1]], jnp.int32)
        count = jnp.asarray(tokens, jnp.int32)
        extent = engine.extent(len(prompt) + tokens, state.cache.capacity)
        start = time.perf_counter()
        token, _ = jax.block_until_ready(
            bare_decoding(engine.params, model.cfg, state.cache, root, count, extent)
        )
        bare = time.perf_counter() - start
        if int(token[0]) != last:
            raise RuntimeError(f"the loops end with different tokens, {int(token[0])} and {last}.")
        shares += [ours / bare - 1] if repeat else []
    return shares
