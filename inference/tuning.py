"""How much a pass costs by its width on this machine, and the draft that pays best for it.

A pass over n tokens takes as long as a pass over one on an accelerator that waits for its memory,
and several times as long on a CPU. So how much to draft is measured, not assumed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.drafter import Drafter, NoDrafter
from inference.drafters.draft_model import DraftModel
from inference.drafters.lookup import LookupDrafter, copy_after_match
from inference.engine import Engine, Generation, bucket, make_engine
from models.load import Model
from ops.sampling import SamplingParams
from ops.tree import StaticTree, tree_from_paths

WIDTHS = (1, 2, 4, 8, 16, 32)
LONGEST_CHAIN = 8
"""Tokens up to which a draft model's length is chosen."""
LOOKUP_NGRAMS, LOOKUP_LENGTHS = (4, 3, 2), (0, 1, 2, 3, 4, 5, 7, 10, 15)
"""N-gram sizes of a tuned prompt lookup, and the lengths that each one's is chosen from.

Every length that differs is one more pass to compile."""


def round_seconds(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds of a decoding round, greedy; prefill is not counted."""
    greedy = SamplingParams.make()
    state, seeds = engine.start(prompts, tokens, greedy)
    jax.block_until_ready(state)
    start = time.perf_counter()
    state = jax.block_until_ready(engine.run(state, seeds, greedy, ()))
    return (time.perf_counter() - start) / int(np.max(state.stats.rounds))


def pass_seconds(
    model: Model,
    widths: Sequence[int] = WIDTHS,
    tokens: int = 48,
    repeats: int = 3,
    batch: int = 1,
) -> dict[int, float]:
    """Median seconds of a decoding round by the width of its pass, for ``batch`` rows.

    Compilation and prefill are not counted. Widths are measured in turn, so that a drifting
    machine hits all of them.
    """
    prompts = [[1 % model.cfg.vocab_size] * 16] * batch
    engines = {
        width: make_engine(model.params, model.cfg, drafter=NoDrafter(width)) for width in widths
    }
    taken = seconds_in_turn(engines, prompts, tokens, repeats)
    return {width: float(np.median(times)) for width, times in taken.items()}


def seconds_in_turn(
    engines: Mapping[Any, Engine], prompts: Sequence[Sequence[int]], tokens: int, repeats: int
) -> dict[Any, list[float]]:
    """Seconds of ``repeats`` rounds of each engine, by its name; see :func:`in_turn`."""
    taken: dict[Any, list[float]] = {name: [] for name in engines}
    ways = {n: functools.partial(round_seconds, e, prompts, tokens) for n, e in engines.items()}
    for repeat, name, seconds in in_turn(ways, repeats):
        taken[name] += [seconds] if repeat else []
    return taken


def in_turn(ways: Mapping[Any, Callable[[], Any]], repeats: int) -> Iterator[tuple[int, Any, Any]]:
    """Call every way ``repeats`` times, and once before that as repeat 0, which is the compiler's.

    Ways take turns, so that a drifting machine hits all of them; every other turn is reversed.

    Yields:
        The repeat, the way's name, and what it gave.
    """
    for repeat in range(repeats + 1):
        for name in ways if repeat % 2 else reversed(list(ways)):
            yield repeat, name, ways[name]()


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


def lookup_lengths(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    ngrams: tuple[int, ...],
    seconds: Mapping[int, float],
    batch: int = 1,
) -> tuple[int, ...]:
    """The tokens to draft after a match of each n-gram size that give most tokens per second.

    What lookup drafts depends on the text alone, so rounds are counted, not run: ``batch`` texts
    advance together, and a round costs what its longest draft does. One length is changed at a time
    until none improves; at least one is above 0.

    Args:
        texts: prompts, and how greedy decoding went on after each.
        seconds: of a pass by its width, 1 among them.
    """
    longest = max(LOOKUP_LENGTHS)
    rows = [_lookups(prompt, new, ngrams, longest) for prompt, new in texts]
    groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    cost = _at_widths(seconds, 1 + np.arange(longest + 1))

    def rate(lengths: tuple[int, ...]) -> float:
        drafts = np.array([*lengths, 0])
        taken = sum(_replayed_seconds(group, drafts, cost) for group in groups)
        return sum(len(places) for places, _ in rows) / taken

    def changed(lengths: tuple[int, ...], at: int) -> list[tuple[int, ...]]:
        every = [(*lengths[:at], length, *lengths[at + 1 :]) for length in LOOKUP_LENGTHS]
        return [lengths, *(some for some in every if any(some))]  # ties go to what there is

    best = max([(length,) * len(ngrams) for length in LOOKUP_LENGTHS[1:]], key=rate)
    before = None
    while best != before:
        before = best
        for at in range(len(ngrams)):
            best = max(changed(best, at), key=rate)
    return best


def _lookups(
    prompt: Sequence[int], new: Sequence[int], ngrams: tuple[int, ...], longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of every new token: which n-gram size matches before it, and how many copies are right."""
    text = np.asarray([*prompt, *new], np.int32)
    padded = jnp.asarray(np.pad(text, (0, bucket(len(text)) - len(text))))
    starts = np.arange(len(prompt), len(text))
    copied, places = _copies(padded, jnp.asarray(starts, jnp.int32), ngrams, longest)
    follows = np.concatenate([text, np.full(longest, -1, np.int32)])
    wanted = follows[starts[:, None] + np.arange(longest)]
    return np.asarray(places), np.cumprod(np.asarray(copied) == wanted, axis=1).sum(1)


@functools.partial(jax.jit, static_argnames=("ngrams", "count"))
def _copies(text: Any, starts: Any, ngrams: tuple[int, ...], count: int) -> tuple[Any, Any]:
    return jax.vmap(lambda n: copy_after_match(text, n, ngrams, count))(starts)


def _replayed_seconds(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], drafts: np.ndarray, cost: np.ndarray
) -> float:
    """What decoding the rows together takes with ``drafts[i]`` tokens after a match of size i."""
    at, total = [0] * len(rows), 0.0
    while going := [r for r, (places, _) in enumerate(rows) if at[r] < len(places)]:
        counts = [int(drafts[rows[r][0][at[r]]]) for r in going]
        total += float(cost[max(counts)])
        for r, count in zip(going, counts, strict=True):
            at[r] += 1 + min(count, int(rows[r][1][at[r]]))
    return total


def tuned(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    seconds: Mapping[int, float],
    new_tokens: int = 64,
    batch: int = 1,
) -> Drafter:
    """The drafter with the draft that suits the machine's costs and the prompts.

    Prompt lookup gets a length for each n-gram size, a draft model one length, a drafter over a
    static tree the part of it that pays: what is right how often is counted while the prompts are
    decoded with the whole draft, and what making a draft takes is measured. A draft has at least
    one token.

    Args:
        prompts: like those that will be asked, but others.
        seconds: see :func:`pass_seconds`, which should have been measured for ``batch`` rows.

    Raises:
        ValueError: a drafter that is none of these.
    """
    if isinstance(drafter, LookupDrafter):
        texts = decoded(model, drafter, params, prompts, new_tokens).tokens
        pairs = list(zip(prompts, texts, strict=True))
        lengths = lookup_lengths(pairs, LOOKUP_NGRAMS, seconds, batch)
        widths = (1, *sorted({1 + length for length in lengths if length}))
        return LookupDrafter(lengths, LOOKUP_NGRAMS, widths=widths[:-1])
    if isinstance(drafter, DraftModel):
        whole: Any = dataclasses.replace(drafter, length=LONGEST_CHAIN)
    elif isinstance(getattr(drafter, "tree", None), StaticTree):
        whole = drafter
    else:
        raise ValueError(
            f"{type(drafter).__name__} has no static tree to choose a part of: tune prompt lookup, "
            "a draft model or a drafter with a tree."
        )

    stats = decoded(model, whole, params, prompts, new_tokens).stats
    counts = np.sum(stats.by_node, axis=0)
    rows = [prompts[i % len(prompts)] for i in range(batch)]
    shares = counts / max(1, int(np.sum(stats.rounds)))
    if isinstance(whole, DraftModel):
        taken = drafting_seconds(model, whole, params, rows, seconds, new_tokens)
        gains, each = shares[1:].tolist(), taken / LONGEST_CHAIN
        return dataclasses.replace(whole, length=best_count(seconds, gains, least=1, each=each))
    order = by_gain(whole.tree, shares)

    def part(drafting: float) -> Any:
        count = best_count(seconds, shares[order].tolist(), drafting, least=1)
        paths = [whole.tree.paths[node - 1] for node in order[:count]]
        return dataclasses.replace(whole, tree=tree_from_paths(paths))

    return part(drafting_seconds(model, part(0.0), params, rows, seconds, new_tokens))


def decoded(
    model: Model, drafter: Drafter, params: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> Generation:
    """Texts and counters of decoding the prompts together, greedily."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    return engine.generate(prompts, new_tokens, eos=model.tokenizer.end_ids)


def drafting_seconds(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    seconds: Mapping[int, float],
    tokens: int,
) -> float:
    """What a round with the drafter takes beyond a pass of its width."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    taken = [round_seconds(engine, prompts, tokens) for _ in range(4)][1:]  # the first compiles
    return max(0.0, float(np.median(taken) - _at_widths(seconds, drafter.width)))


def _at_widths(seconds: Mapping[int, float], widths: Any) -> Any:
    """Seconds of a pass at any widths: between those measured interpolated, beyond them flat."""
    known = sorted(seconds)
    return np.interp(widths, known, [seconds[width] for width in known])
