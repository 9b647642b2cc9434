"""The equivalence harness: does batched decoding say what decoding one prompt at a time says?

Greedy texts are compared row by row with plain decoding at batch 1. Other batch sizes mean other
shapes, and those round differently, so a text may part where the two best logits nearly tie; every
such case is counted. Anything else is wrong.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.cache import Cache
from inference.engine import Engine, as_ids, bucket
from inference.loop import State, decode_rounds
from models import decoder
from ops.sampling import SamplingParams

TOLERANCE = 1e-4
"""Two logits that lie closer than this nearly tie, in float32."""

Texts = list[list[int]]
Run = Callable[[Sequence[Sequence[int]]], Texts]
"""Decodes prompts together: new tokens of each."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What each prompt gives alone, and the best logit's lead over the second at each token."""

    texts: Texts
    margins: list[np.ndarray]

    @property
    def least_margin(self) -> float:
        """The closest decision of all."""
        return float(min(m.min() for m in self.margins if len(m)))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How many rows are exact, part at a near-tie, or are wrong."""

    exact: int = 0
    near_ties: int = 0
    wrong: int = 0

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.exact + other.exact, self.near_ties + other.near_ties, self.wrong + other.wrong
        )

    @property
    def rows(self) -> int:
        """Rows compared."""
        return self.exact + self.near_ties + self.wrong


def reference(
    engine: Engine, prompts: Sequence[Sequence[int]], new: int, eos: Sequence[int] = ()
) -> Reference:
    """Plain greedy decoding, one prompt at a time, with the margins along each text."""
    plain = Engine(engine.params, engine.cfg, policy=engine.policy)
    texts = [plain.generate([prompt], new, eos=eos).tokens[0] for prompt in prompts]
    size = bucket(max(len(p) + len(t) for p, t in zip(prompts, texts, strict=True)), 16)

    @jax.jit
    def margins(params: Any, tokens: Any) -> Any:
        out = decoder.forward(params, engine.cfg, tokens, policy=engine.policy)
        best = jax.lax.top_k(decoder.unembed(params, engine.cfg, out.hidden), 2)[0]
        return best[..., 0] - best[..., 1]

    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        row = np.zeros((1, size), np.int32)
        row[0, : len(prompt) + len(text)] = [*prompt, *text]
        whole = np.asarray(margins(engine.params, jnp.asarray(row)))[0]
        found.append(whole[len(prompt) - 1 : len(prompt) - 1 + len(text)])
    return Reference(texts, found)


def compare(want: Reference, texts: Texts, tolerance: float = TOLERANCE) -> Outcome:
    """Row by row; after a near-tie the rest of a row says nothing and is not compared."""
    outcome = Outcome()
    for text, right, margins in zip(texts, want.texts, want.margins, strict=True):
        if text == right:
            outcome += Outcome(exact=1)
            continue
        pairs = zip(text, right, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        # A text that ends too soon or too late parts at no token at all.
        tie = first is not None and margins[first] < tolerance
        outcome += Outcome(near_ties=1) if tie else Outcome(wrong=1)
    return outcome


def check_batches(
    run: Run, prompts: Sequence[Sequence[int]], want: Reference, batch: int
) -> Outcome:
    """Prompts in batches of this size, in their order."""
    texts: Texts = []
    for start in range(0, len(prompts), batch):
        texts += run(prompts[start : start + batch])
    return compare(want, texts)


def check_permutation(
    run: Run, prompts: Sequence[Sequence[int]], want: Reference, seed: int
) -> Outcome:
    """All prompts together in another order: outputs must be permuted alike."""
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    texts = run([prompts[i] for i in order])
    back = [text for _, text in sorted(zip(order, texts, strict=True))]
    return compare(want, back)


def check_poison(
    engine: Engine, prompts: Sequence[Sequence[int]], want: Reference, new: int,
    eos: Sequence[int] = (),
) -> Outcome:  # fmt: skip
    """All prompts together, with garbage in every stale slot of all caches before each round."""
    greedy = SamplingParams.make()
    state, seeds = engine.start(prompts, new, greedy)
    ends = as_ids(eos)
    while not bool(state.done.all()):
        state = decode_rounds(
            engine.params, engine.cfg, engine.policy_in_force, engine.drafter,
            engine.drafter_params, poison(state), seeds, greedy, ends, jnp.asarray(1, jnp.int32),
            extent=state.cache.capacity, rule="greedy",
        )  # fmt: skip
    tokens, length = np.asarray(state.tokens), np.asarray(state.length)
    texts = [tokens[i, len(p) : length[i]].tolist() for i, p in enumerate(prompts)]
    return compare(want, texts)


@jax.jit
def poison(state: State) -> State:
    """A state whose caches hold large finite numbers in all slots that are not committed.

    The drafter's own caches too. (What is not finite would leak through products with zero.)
    """

    def one(node: Any) -> Any:
        if not isinstance(node, Cache):
            return node
        stale = jnp.arange(node.capacity)[None] >= node.length[:, None]

        def fill(leaf: Any) -> Any:
            wide = stale.reshape(stale.shape[0], 1, -1, 1)
            return jnp.where(wide, jnp.asarray(1e4, leaf.dtype), leaf)

        return dataclasses.replace(node, layers=jax.tree.map(fill, node.layers))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, Cache))
