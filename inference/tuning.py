"""How much a pass costs by its width on this machine, and the draft that pays best for it.

A pass over n tokens takes as long as a pass over one on an accelerator that waits for its memory,
and several times as long on a CPU. So how much to draft is measured, not assumed.
"""

import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from inference.drafter import NoDrafter
from inference.drafters.lookup import LookupDrafter
from inference.engine import make_engine
from models.load import Model
from ops.sampling import SamplingParams

WIDTHS = (1, 2, 4, 8, 16, 32)


def pass_seconds(
    model: Model, widths: Sequence[int] = WIDTHS, tokens: int = 48, repeats: int = 3
) -> dict[int, float]:
    """Median seconds of a decoding round by the width of its pass, at batch 1.

    Compilation and prefill are not counted. Widths are measured in turn, so that a drifting
    machine hits all of them.
    """
    prompt = [1 % model.cfg.vocab_size] * 16
    greedy = SamplingParams.make()
    engines = {
        width: make_engine(model.params, model.cfg, drafter=NoDrafter(width)) for width in widths
    }
    taken: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(repeats + 1):  # the first time is the compiler's
        for width, engine in engines.items():
            state, seeds = engine.start([prompt], tokens, greedy)
            jax.block_until_ready(state)
            start = time.perf_counter()
            state = jax.block_until_ready(engine.run(state, seeds, greedy, ()))
            seconds = (time.perf_counter() - start) / int(state.stats.rounds[0])
            taken[width] += [seconds] if repeat else []
    return {width: float(np.median(times)) for width, times in taken.items()}


def best_length(seconds: Mapping[int, float], by_depth: Sequence[float]) -> int:
    """The chain length at which drafting rounds give most tokens per second, 0 for none.

    Args:
        seconds: of a pass by its width, 1 among them; between widths the cost is interpolated.
        by_depth: share of drafting rounds in which more than 0, 1, ... drafted tokens are accepted.

    Raises:
        ValueError: the cost of a plain pass is missing.
    """
    if 1 not in seconds:
        raise ValueError("the cost of a pass over one token is missing: measure width 1, too.")
    widths = sorted(seconds)
    lengths = np.arange(len(by_depth) + 1)
    cost = np.interp(1 + lengths, widths, [seconds[width] for width in widths])
    gained = 1 + np.concatenate([[0.0], np.cumsum(by_depth)])
    return int(np.argmax(gained / cost))


def tuned_lookup(
    model: Model,
    prompts: Sequence[Sequence[int]],
    seconds: Mapping[int, float],
    new_tokens: int = 64,
    longest: int = 15,
) -> LookupDrafter:
    """Prompt lookup whose length suits the machine's costs and the prompts, and is at least 1.

    Only rounds in which something was found count, since the others cost a plain pass.
    """
    drafter = LookupDrafter(longest)
    engine = make_engine(model.params, model.cfg, drafter=drafter)
    made = engine.generate(prompts, new_tokens, eos=model.tokenizer.end_ids)
    drafting = max(1, int(np.sum(made.stats.drafted)) // longest)
    by_depth = np.sum(made.stats.by_depth, axis=0) / drafting
    return LookupDrafter(max(1, best_length(seconds, by_depth.tolist())))
