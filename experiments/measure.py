"""Measuring a drafter on a model: tokens per pass, exactness, cost and speed.

Everything here takes a model and a drafter as they are; training the heads and choosing what to
compare is the experiments' part.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.drafter import Drafter, NoDrafter
from inference.engine import Engine, Generation, bucket, make_engine
from inference.loop import State, decode_round, propose
from models import decoder
from models.flops import product_flops
from models.load import Model
from ops.sampling import SamplingParams

MARGIN = 4.0
"""A token counts as greedy within this many times the measured error between widths."""


@dataclasses.dataclass(frozen=True)
class Exactness:
    """How greedy texts compare with plain decoding, token by token.

    ``differing`` tokens are not what a pass over the same prefix at another width prefers; they are
    ``near_ties`` if their logit lies within ``MARGIN`` times ``width_error`` of the best, else
    ``wrong``. ``same_width_mismatches`` counts prompts whose text is not, bit for bit, that of
    plain decoding at the drafter's own width.
    """

    tokens: int
    differing: int
    near_ties: int
    width_error: float
    same_width_mismatches: int

    @property
    def wrong(self) -> int:
        """Tokens that no rounding explains."""
        return self.differing - self.near_ties


@functools.partial(jax.jit, static_argnames=("cfg",))
def _logits(params: Any, cfg: decoder.Config, tokens: Any) -> Any:
    return decoder.unembed(params, cfg, decoder.forward(params, cfg, tokens).hidden)


def _scores(model: Model, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits at every position of one text after the other, by one pass over each."""
    length = bucket(max(len(t) for t in texts), 16)
    for text in texts:
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(text)] = text
        yield np.asarray(_logits(model.params, model.cfg, jnp.asarray(tokens)))[0, : len(text)]


def width_error(model: Model, texts: Sequence[Sequence[int]]) -> float:
    """Largest difference of logits between a pass over the text and passes of half its length."""
    error = 0.0
    for text in texts:
        half = len(text) // 2
        whole, part = next(_scores(model, [text])), next(_scores(model, [text[:half]]))
        error = max(error, float(np.abs(whole[:half] - part).max()))
    return error


def exactness(
    model: Model,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    same_width: Sequence[Sequence[int] | None],
) -> Exactness:
    """Check greedy ``texts`` against the model itself; see :class:`Exactness`.

    ``same_width`` holds plain decoding's texts, None for prompts that were not decoded so.
    """
    whole = [[*p, *t] for p, t in zip(prompts, texts, strict=True)]
    error = width_error(model, whole[:2])
    differing = near = total = 0
    for prompt, text, logits in zip(prompts, texts, _scores(model, whole), strict=True):
        rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(text)]
        gaps = rows.max(axis=-1) - rows[np.arange(len(text)), text]
        total += len(text)
        differing += int(np.sum(gaps > 0))
        near += int(np.sum((gaps > 0) & (gaps <= MARGIN * error)))
    mismatches = sum(
        plain is not None and list(text) != list(plain)
        for text, plain in zip(texts, same_width, strict=True)
    )
    return Exactness(total, differing, near, error, mismatches)


def draft_cost(model: Model, drafter: Drafter, params: Any, prompt: Sequence[int]) -> float:
    """FLOPs of one draft's matrix products as a share of those of one plain pass.

    Raises:
        ValueError: a drafter that ends its drafts as it sees fit.
    """
    cost, each = draft_costs(model, drafter, params, prompt)
    if each:
        raise ValueError(
            f"what a draft of {type(drafter).__name__} costs depends on its tokens: see draft_costs"
        )
    return cost


def draft_costs(
    model: Model, drafter: Drafter, params: Any, prompt: Sequence[int]
) -> tuple[float, float]:
    """What a draft costs, by FLOPs of matrix products in plain passes: in any case, and per token.

    The second is 0 but for drafters that end a draft as they see fit. Theirs is a turn of a loop;
    the first token is drawn in front of it.
    """
    if isinstance(drafter, NoDrafter):
        return 0.0, 0.0
    greedy = SamplingParams.make()

    def flops(drafter: Drafter, params: Any, function: Any, *turns: float) -> list[float]:
        engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
        state, seeds = engine.start([prompt], 32, greedy)
        given = engine.params, params, state, seeds
        return [product_flops(function, *given, turns=n) for n in turns]

    def draft(weights: Any, params: Any, state: State, seeds: Any) -> Any:
        extent = state.cache.capacity
        return propose(weights, model.cfg, drafter, params, state, seeds, greedy, extent)

    def plain(weights: Any, params: Any, state: State, seeds: Any) -> State:
        policy, none = decoder.default_policy(model.cfg), jnp.zeros((0,), jnp.int32)
        return decode_round(
            weights,
            model.cfg,
            policy,
            NoDrafter(),
            None,
            state,
            seeds,
            greedy,
            none,
            None,
            "greedy",
        )

    (one,) = flops(NoDrafter(), None, plain, 0.0)
    first, second = flops(drafter, params, draft, 0.0, 1.0)
    each = (second - first) / one
    return first / one - each, each


def generate(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float,
    seed: int,
) -> Generation:
    """All prompts as one batch; the texts do not depend on that.

    Every pass has the drafter's full width, so that texts compare bit for bit.
    """
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params, widths=())
    seeds = [1000 * seed + i for i in range(len(prompts))]
    return engine.generate(
        prompts,
        new_tokens,
        sampling=SamplingParams.make(temperature),
        seeds=seeds,
        eos=model.tokenizer.end_ids,
    )


def prefilled(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: SamplingParams,
    eos: Sequence[int],
    capacity: int | None = None,
    memory: Any = None,
) -> Callable[[], tuple[float, State]]:
    """Read the prompts; each call then decodes from there: its seconds, and the loop's last state.

    Batches with the same ``capacity`` (slots per row) share their programs. ``memory`` is what a
    drafter remembers of earlier ones, if it shares its state.
    """
    state, seeds = engine.start(
        prompts, new_tokens, sampling, drafter_state=memory, capacity=capacity
    )

    def decode() -> tuple[float, State]:
        # A copy, because the loop donates its state.
        own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        last = jax.block_until_ready(engine.run(own, seeds, sampling, eos))
        return time.perf_counter() - start, last

    return decode


def timed(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: SamplingParams,
    eos: Sequence[int],
) -> tuple[float, State]:
    """Seconds of decoding a batch, prefill not counted, and the loop's last state."""
    return prefilled(engine, prompts, new_tokens, sampling, eos)()


def speed(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float,
) -> float:
    """Tokens per second at batch 1 over all prompts, prefill and compilation not counted."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    sampling = SamplingParams.make(temperature)
    eos = model.tokenizer.end_ids
    engine.generate(prompts[:1], new_tokens, sampling=sampling, eos=eos)
    tokens = seconds = 0.0
    for prompt in prompts:
        taken, state = timed(engine, [prompt], new_tokens, sampling, eos)
        seconds += taken
        tokens += int(state.stats.emitted[0])
    return tokens / seconds
