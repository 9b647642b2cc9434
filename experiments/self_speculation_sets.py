"""SWIFT's protocol: which sub-layers to skip, how the set was found, and how the draft ends.

Every set is judged on the same held-out prompts with the search at rest. Costs are shares of the
layers' parameters; nothing here is a measured time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measure, record
from experiments.exactness import EXACT
from experiments.statements import Row, Statement, Test, at_least, value
from inference.drafter import Context, NoDrafter, Request, Target, TargetOutputs
from inference.engine import Generation, make_engine
from models import decoder
from models.load import Model
from ops.sampling import SamplingParams
from research.speculative.del_exit.drafter import early_exit
from research.speculative.swift.drafter import swift
from research.speculative.swift.matchness import matchness
from research.speculative.swift.search import Search, SkipSet, num_skipped, uniform_set

NEVER = 10**9
WINDOW = 32
FIXED_LENGTH = 8
NUMBERS = (
    "matchness",
    "tokens_per_pass",
    "acceptance",
    "steps",
    "draft_cost",
    "modelled_speedup",
)


def _recovers(rows: dict[str, Row], seed: int) -> bool:
    """A new search in the other domain is at least as good there as what the first one found."""
    return value(rows["other reset"], "matchness", seed) >= value(rows["other"], "matchness", seed)


def _more(a: str, b: str, name: str) -> Test:
    return lambda rows, seed: value(rows[a], name, seed) > value(rows[b], name, seed)


STATEMENTS = (
    Statement(
        "the found set predicts more of the text than every second layer does",
        ("found", "uniform"),
        _more("found", "uniform", "matchness"),
    ),
    Statement(
        "the found set gives more tokens per pass than every second layer does",
        ("found", "uniform"),
        _more("found", "uniform", "tokens_per_pass"),
    ),
    Statement(
        "ending drafts by confidence accepts a larger share than a fixed length of 8",
        ("found chain", "fixed length"),
        _more("found chain", "fixed length", "acceptance"),
    ),
    Statement(
        "the comb gives more tokens per pass than the chain",
        ("found", "found chain"),
        _more("found", "found chain", "tokens_per_pass"),
    ),
    Statement(
        "the Gaussian process finds at least as good a set as random proposals alone",
        ("found", "random search"),
        at_least("found", "random search", "matchness"),
    ),
    Statement(
        "the search while serving finds at least as good a set as the offline one",
        ("found", "offline"),
        at_least("found", "offline", "matchness"),
    ),
    Statement(
        "the found set makes decoding faster by the model of costs",
        ("found",),
        lambda rows, seed: value(rows["found"], "modelled_speedup", seed) > 1,
    ),
    Statement(
        "in another domain a new search does at least as well as the old set",
        ("other", "other reset"),
        _recovers,
    ),
    EXACT,
)


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search's outcome: the set, and the best score after every iteration."""

    skip: SkipSet
    best: list[float]


def _outcome(search: Search) -> Searched:
    scores = np.asarray(search.scores)[: int(search.iterations)]
    return Searched(search.skip, np.maximum.accumulate(scores).tolist())


def search_stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ratio: float,
    bayes_every: int,
    max_score: float,
) -> Searched:
    """The search while the prompts are decoded one after the other."""
    memory: Any = None
    drafter, params = swift(
        model.cfg,
        controls={"skip_ratio": ratio, "bayes_every": bayes_every, "max_score": max_score},
        context_window=WINDOW,
    )
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    for prompt in prompts:
        out = engine.generate(
            [prompt], new_tokens, eos=model.tokenizer.end_ids, drafter_state=memory
        )
        memory = out.drafter_state
    return _outcome(memory.search)


@dataclasses.dataclass(frozen=True)
class Passages:
    """Texts that are decoded already, their cache and where they began."""

    target: Target
    state: Any
    begin: jax.Array

    @classmethod
    def decoded(cls, model: Model, prompts: Sequence[Sequence[int]]) -> "Passages":
        """Greedy texts long enough for one window, none ended early."""
        engine = make_engine(model.params, model.cfg, drafter=NoDrafter())
        greedy = SamplingParams.make()
        state, seeds = engine.start(prompts, WINDOW + 3, greedy)
        state = engine.run(state, seeds, greedy, ())
        target = Target(engine.params, model.cfg, decoder.default_policy(model.cfg))
        return cls(target, state, jnp.asarray([len(p) for p in prompts], jnp.int32))

    def score(self, skip: SkipSet) -> float:
        """Mean matchness of a set."""
        state = self.state
        scores = matchness(
            self.target, state.cache, state.tokens, self.begin, state.limit, skip,
            WINDOW + 1, state.cache.capacity,
        )  # fmt: skip
        return float(np.mean(np.asarray(scores)))


def search_offline(passages: Passages, ratio: float, iterations: int) -> Searched:
    """As many iterations over fixed passages, every second one Bayesian (as Self-SD's)."""
    cfg, state = passages.target.cfg, passages.state
    drafter, params = swift(
        cfg, controls={"skip_ratio": ratio, "bayes_every": 2, "max_score": 2.0},
        context_window=WINDOW, max_iterations=max(iterations, 1),
    )  # fmt: skip
    greedy = SamplingParams.make()
    request = Request(state.tokens, passages.begin, passages.begin, greedy)
    nothing = TargetOutputs(tokens=None)
    search = drafter.init(params, passages.target, request, nothing, state.cache.capacity)
    context = Context(
        state.tokens, state.length, passages.begin, greedy, state.limit, begin=passages.begin
    )
    for _ in range(iterations):
        search = dataclasses.replace(search, rounds=jnp.ones((), jnp.int32))
        search = drafter.tune(params, search, passages.target, state.cache, context)
    return _outcome(search.search)


def sub_layer_parameters(model: Model) -> tuple[float, float]:
    """How many parameters the attention and the MLP of a layer have."""
    layer = decoder.unstack(model.params).segments[0].layers

    def count(*parts: Any) -> float:
        return float(sum(x.size for x in jax.tree.leaves(parts)))

    return count(layer.attn, layer.attn_norm), count(layer.mlp, layer.mlp_norm)


def draft_cost(model: Model, skip: SkipSet) -> float:
    """The share of the layers' parameters that a draft step reads."""
    attention, mlp = sub_layer_parameters(model)
    kept = attention * float(jnp.sum(~skip.attention)) + mlp * float(jnp.sum(~skip.mlp))
    return kept / ((attention + mlp) * model.cfg.num_layers)


def measured(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    drafter: Any,
    params: Any,
    cost: float,
    layers: float,
) -> dict[str, Any]:
    """What one way of drafting does; ``layers`` of the model run for a drafted step."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    out: Generation = engine.generate(prompts, new_tokens, eos=model.tokenizer.end_ids)
    plain = make_engine(model.params, model.cfg, drafter=NoDrafter(drafter.width))
    same = plain.generate(prompts[:2], new_tokens, eos=model.tokenizer.end_ids).tokens
    stats = out.stats
    rounds, accepted = float(np.sum(stats.rounds)), float(np.sum(stats.accepted))
    steps = (float(np.sum(stats.layer_passes)) - model.cfg.num_layers * rounds) / layers
    per_pass = out.tokens_per_pass
    texts = [*same, *[None] * (len(prompts) - len(same))]
    return {
        "tokens_per_pass": per_pass,
        "acceptance": accepted / max(steps, 1),
        "steps": steps / rounds,
        "draft_cost": cost,
        "modelled_speedup": per_pass / (1 + steps / rounds * cost),
        "exactness": dataclasses.asdict(measure.exactness(model, prompts, out.tokens, texts)),
    }


def measure_set(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    passages: Passages,
    skip: SkipSet,
    threshold: float = 0.8,
    **settings: Any,
) -> dict[str, Any]:
    """One set at rest; ``settings`` are the drafter's."""
    drafter, params = swift(
        model.cfg, skip, {"stop_threshold": threshold}, search=False, **settings
    )
    kept = float(jnp.sum(~skip.attention) + jnp.sum(~skip.mlp)) / 2
    row = measured(model, prompts, new_tokens, drafter, params, draft_cost(model, skip), kept)
    sizes = [int(jnp.sum(x)) for x in (skip.attention, skip.mlp)]
    return row | {"matchness": passages.score(skip), "skipped": sizes}


def measure_exit(
    model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, skip: SkipSet
) -> dict[str, Any]:
    """The first layers as the draft, of about the cost of a set, in drafts of 4."""
    layers = model.cfg.num_layers
    exit_layer = min(max(round(draft_cost(model, skip) * layers), 1), layers - 1)
    drafter, params = early_exit(model.cfg, {"exit_layer": exit_layer, "gamma": 4}, method="fixed")
    cost = exit_layer / layers
    row = measured(model, prompts, new_tokens, drafter, params, cost, float(exit_layer))
    # The draft's layers are not run again over its tokens, whatever the model of costs says.
    return row | {"exit_layer": exit_layer}


def measure_seed(
    model: Model,
    stream: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]],
    passages: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    settings: Any,
) -> dict[str, dict[str, Any]]:
    """All rows of one seed.

    Args:
        stream: prompts that are decoded while the set is searched.
        heldout: prompts that every set is measured on.
        passages: prompts of the training split, for the offline search.
        other: prompts of another domain, or none.
    """
    new, enough = settings.new_tokens, settings.max_score
    found = search_stream(model, stream, new, settings.ratio, 25, enough)
    rivals = {
        "random search": search_stream(model, stream, new, settings.ratio, NEVER, enough),
        "offline": search_offline(
            Passages.decoded(model, passages), settings.ratio, len(found.best)
        ),
    }
    judged = Passages.decoded(model, heldout)
    args = (model, heldout, new, judged)
    rows = {
        "found": measure_set(*args, found.skip) | {"best": found.best},
        "found chain": measure_set(*args, found.skip, max_nodes=0),
        "fixed length": measure_set(*args, found.skip, 0.0, max_nodes=0, max_steps=FIXED_LENGTH),
        "uniform": measure_set(*args, uniform_set(model.cfg.num_layers)),
        "first layers": measure_exit(model, heldout, new, found.skip),
    }
    for name, searched in rivals.items():
        rows[name] = measure_set(*args, searched.skip) | {"best": searched.best}
    for ratio in settings.ratios:
        tried = search_stream(model, stream, new, ratio, 25, enough)
        rows[f"ratio {ratio}"] = measure_set(*args, tried.skip) | {"best": tried.best}
    if other:
        half = len(other) // 2
        judged = Passages.decoded(model, other[half:])
        again = search_stream(model, other[:half], new, settings.ratio, 25, enough)
        args = (model, other[half:], new, judged)
        rows["other"] = measure_set(*args, found.skip)
        rows["other reset"] = measure_set(*args, again.skip) | {"best": again.best}
    return rows


def check_ratio(model: Model, ratios: Sequence[float]) -> None:
    """Raise ValueError for a ratio that skips nothing or too much."""
    for ratio in ratios:
        num_skipped(model.cfg.num_layers, ratio)


def summarise(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of all seeds."""
    row: dict[str, Any] = {"method": method}
    for name in NUMBERS:
        if name in runs[0]:
            row[name] = record.sample([r[name] for r in runs])
    for name in ("best", "skipped", "exit_layer"):
        if name in runs[0]:
            row[name] = [r[name] for r in runs]
    row["exactness"] = [r["exactness"] for r in runs]
    return row
