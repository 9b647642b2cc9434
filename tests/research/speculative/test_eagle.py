"""EAGLE with a layer that cannot err: what a perfect drafter drafts is accepted whole."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafters.eagle import EagleDrafter, EagleParams
from inference.drafters.eagle_tree import EagleTreeDrafter
from inference.drafters.pairs import Run
from models import decoder, eagle
from ops.tree import chain_tree
from tests.inference.models import NEW, config, engine, prompts, weights
from tests.inference.test_loop import one_round_at_a_time

CFG, LENGTH = config(tied=False), 4
PROMPTS = prompts(2, 3, 7, 9)  # a prompt of one token has no pair to draft from at first


def true_features(table: jax.Array, late: int) -> Run:
    """In place of the layer: the target's own features, ``late`` positions too old.

    ``table`` (b, l, width) has those of the texts to come. The pair at position i is to be followed
    by feature i + 1.
    """

    def run(features: Any, tokens: Any, step: Any, layers: Any) -> tuple[jax.Array, Any]:
        at = jnp.clip(step.positions + 1 - late, 0, table.shape[1] - 1)
        return jnp.take_along_axis(table, at[..., None], axis=1), layers

    return run


@dataclasses.dataclass(frozen=True)
class TrueChain(EagleDrafter):
    """The static tree's drafter over a chain; its params' layer is the table."""

    late: int = 0

    def _run(self, params: EagleParams, target: Any) -> Run:
        return true_features(params.layer, self.late)


@dataclasses.dataclass(frozen=True)
class TrueTree(EagleTreeDrafter):
    """EAGLE-2's drafter of one child per node; its params' layer is the table."""

    late: int = 0

    def _run(self, params: EagleParams, target: Any) -> Run:
        return true_features(params.layer, self.late)


def drafter(kind: str, late: int) -> EagleDrafter:
    """A chain of ``LENGTH`` tokens, by either drafter."""
    cfg = eagle.EagleConfig()
    if kind == "chain":
        return TrueChain(cfg, chain_tree(LENGTH), late=late)
    return TrueTree(cfg, total=LENGTH, depth=LENGTH - 1, top_k=1, late=late)


@functools.cache
def plain() -> list[list[int]]:
    """Greedy continuations without a drafter."""
    return engine(CFG).generate(PROMPTS, NEW).tokens


@functools.cache
def features() -> jax.Array:
    """The target's features along these texts, by one pass without a cache."""
    texts = np.zeros((len(PROMPTS), 32), np.int32)
    for row, prompt, new in zip(texts, PROMPTS, plain(), strict=True):
        row[: len(prompt) + NEW] = [*prompt, *new]
    run = jax.jit(lambda p, tokens: decoder.forward(p, CFG, tokens).hidden)
    return run(weights(CFG), jnp.asarray(texts))


def decoded(kind: str, late: int) -> Any:
    """The last state; after every round all committed tokens but the root are pairs."""

    def only_committed_pairs(state: Any) -> None:
        pairs = state.drafter.cache.length + state.drafter.count
        np.testing.assert_array_equal(pairs, state.length - 1)
        np.testing.assert_array_equal(state.drafter.cache.scratch, 0)

    eng = engine(CFG, drafter=drafter(kind, late), drafter_params=EagleParams(features()))
    state = one_round_at_a_time(eng, PROMPTS, NEW, only_committed_pairs)
    for row, prompt, new in zip(np.asarray(state.tokens), PROMPTS, plain(), strict=True):
        assert row[: len(prompt) + NEW].tolist() == [*prompt, *new]
    return jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_a_perfect_drafters_draft_is_accepted_whole(kind: str) -> None:
    stats = decoded(kind, late=0).stats
    np.testing.assert_array_equal(stats.rounds, NEW // (LENGTH + 1))
    np.testing.assert_array_equal(stats.drafted, LENGTH * stats.rounds)
    np.testing.assert_array_equal(stats.accepted, stats.drafted)


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_features_one_step_late_are_not(kind: str) -> None:
    """The usual mistake, as a control: the same text from more rounds."""
    stats = decoded(kind, late=1).stats
    assert np.all(stats.accepted < stats.drafted)
    assert stats.rounds.sum() > 2 * len(PROMPTS) * NEW // (LENGTH + 1)
