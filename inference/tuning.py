"""How much a pass costs by its width on this machine, and the draft that pays best for it.

A pass over n tokens takes as long as a pass over one on an accelerator that waits for its memory,
and several times as long on a CPU. So how much to draft is measured, not assumed.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from inference.drafter import Drafter, NoDrafter
from inference.drafters.draft_model import DraftModel
from inference.drafters.lookup import LookupDrafter
from inference.engine import Engine, make_engine
from inference.loop import Stats
from models.load import Model
from ops.sampling import SamplingParams
from ops.tree import StaticTree, tree_from_paths

WIDTHS = (1, 2, 4, 8, 16, 32)
LONGEST_LOOKUP, LONGEST_CHAIN = 15, 8
"""Tokens of a draft that lengths are chosen up to: of prompt lookup, and of a draft model."""


def round_seconds(engine: Engine, prompt: Sequence[int], tokens: int) -> float:
    """Seconds of a decoding round at batch 1, greedy; prefill is not counted."""
    greedy = SamplingParams.make()
    state, seeds = engine.start([prompt], tokens, greedy)
    jax.block_until_ready(state)
    start = time.perf_counter()
    state = jax.block_until_ready(engine.run(state, seeds, greedy, ()))
    return (time.perf_counter() - start) / int(state.stats.rounds[0])


def pass_seconds(
    model: Model, widths: Sequence[int] = WIDTHS, tokens: int = 48, repeats: int = 3
) -> dict[int, float]:
    """Median seconds of a decoding round by the width of its pass, at batch 1.

    Compilation and prefill are not counted. Widths are measured in turn, so that a drifting
    machine hits all of them.
    """
    prompt = [1 % model.cfg.vocab_size] * 16
    engines = {
        width: make_engine(model.params, model.cfg, drafter=NoDrafter(width)) for width in widths
    }
    taken: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(repeats + 1):  # the first time is the compiler's
        for width, engine in engines.items():
            seconds = round_seconds(engine, prompt, tokens)
            taken[width] += [seconds] if repeat else []
    return {width: float(np.median(times)) for width, times in taken.items()}


def best_count(
    seconds: Mapping[int, float],
    gains: Sequence[float],
    drafting: float = 0.0,
    least: int = 0,
    each: float = 0.0,
) -> int:
    """The number of drafted tokens at which rounds give most tokens per second, 0 for none.

    Args:
        seconds: of a pass by its width, 1 among them; between widths the cost is interpolated.
        gains: what the first, second, ... drafted token adds to the tokens of a round: the share
            of rounds in which it is right.
        drafting: seconds that making a draft takes, whatever its size.
        least: what is drafted in any case.
        each: seconds that every drafted token takes besides.

    Raises:
        ValueError: the cost of a plain pass is missing.
    """
    if 1 not in seconds:
        raise ValueError("the cost of a pass over one token is missing: measure width 1, too.")
    counts = np.arange(len(gains) + 1)
    cost = _at_widths(seconds, 1 + counts) + drafting * (counts > 0) + each * counts
    gained = 1 + np.concatenate([[0.0], np.cumsum(gains)])
    return least + int(np.argmax((gained / cost)[least:]))


def by_gain(tree: StaticTree, shares: np.ndarray) -> list[int]:
    """A tree's nodes but the root, those that are right most often first.

    A node never comes before its parent or before a sibling of lower rank, so that every beginning
    of the list is a tree without gaps in its ranks.
    """
    keys, parent = np.asarray(shares, float).copy(), tree.parent
    for node in range(1, tree.size):
        keys[node] = min(keys[node], keys[parent[node]])
        if parent[node - 1] == parent[node]:  # siblings stand side by side, the lower rank first
            keys[node] = min(keys[node], keys[node - 1])
    return sorted(range(1, tree.size), key=lambda node: (-keys[node], node))


def tuned(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    seconds: Mapping[int, float],
    new_tokens: int = 64,
) -> Drafter:
    """The drafter with the draft that suits the machine's costs and the prompts.

    Prompt lookup and a draft model get a length, a drafter over a static tree the part of it that
    pays: what is right how often is counted while the prompts are decoded with the whole draft, and
    what making a draft takes is measured. A draft has at least one token.

    Args:
        prompts: like those that will be asked, but others.
        seconds: see :func:`pass_seconds`.

    Raises:
        ValueError: a drafter that is none of these.
    """
    if isinstance(drafter, LookupDrafter):
        whole: Any = dataclasses.replace(drafter, length=LONGEST_LOOKUP)
    elif isinstance(drafter, DraftModel):
        whole = dataclasses.replace(drafter, length=LONGEST_CHAIN)
    elif isinstance(getattr(drafter, "tree", None), StaticTree):
        whole = drafter
    else:
        raise ValueError(
            f"{type(drafter).__name__} has no static tree to choose a part of: tune prompt lookup, "
            "a draft model or a drafter with a tree."
        )

    stats = counted(model, whole, params, prompts, new_tokens)
    counts = np.sum(stats.by_node, axis=0)
    if isinstance(whole, LookupDrafter):
        # Where nothing was found the pass is a plain one: such rounds do not count.
        rounds = max(1, int(np.sum(stats.drafted)) // LONGEST_LOOKUP)
        count = best_count(seconds, (counts[1:] / rounds).tolist(), least=1)
        return dataclasses.replace(whole, length=count)
    shares = counts / max(1, int(np.sum(stats.rounds)))
    if isinstance(whole, DraftModel):
        taken = drafting_seconds(model, whole, params, prompts[0], seconds, new_tokens)
        gains, each = shares[1:].tolist(), taken / LONGEST_CHAIN
        return dataclasses.replace(whole, length=best_count(seconds, gains, least=1, each=each))
    order = by_gain(whole.tree, shares)

    def part(drafting: float) -> Any:
        count = best_count(seconds, shares[order].tolist(), drafting, least=1)
        paths = [whole.tree.paths[node - 1] for node in order[:count]]
        return dataclasses.replace(whole, tree=tree_from_paths(paths))

    return part(drafting_seconds(model, part(0.0), params, prompts[0], seconds, new_tokens))


def counted(
    model: Model, drafter: Drafter, params: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> Stats:
    """The counters of decoding the prompts together, greedily."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    return engine.generate(prompts, new_tokens, eos=model.tokenizer.end_ids).stats


def drafting_seconds(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompt: Sequence[int],
    seconds: Mapping[int, float],
    tokens: int,
) -> float:
    """What a round with the drafter takes beyond a pass of its width."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    taken = [round_seconds(engine, prompt, tokens) for _ in range(4)][1:]  # the first compiles
    return max(0.0, float(np.median(taken) - _at_widths(seconds, drafter.width)))


def _at_widths(seconds: Mapping[int, float], widths: Any) -> Any:
    """Seconds of a pass at any widths: between those measured interpolated, beyond them flat."""
    known = sorted(seconds)
    return np.interp(widths, known, [seconds[width] for width in known])
