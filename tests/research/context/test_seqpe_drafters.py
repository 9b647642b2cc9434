"""Every kind of drafter on models whose only positions are SeqPE's vectors or ALiBi's slopes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Drafter, NoDrafter
from inference.drafters.draft_model import draft_model
from inference.drafters.eagle import EagleDrafter, EagleParams
from inference.drafters.lookup import LookupDrafter
from inference.drafters.medusa import MedusaDrafter, MedusaParams
from models import clover, decoder, eagle, longspec, medusa, seqpe
from models.params import init
from ops.tree import tree_from_paths
from research.context.seqpe.policy import SeqPEPolicy, make_policy
from research.speculative.clover.drafter import CloverDrafter, CloverParams
from research.speculative.longspec.drafter import LongSpecDrafter
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import config, engine, weights

PROMPTS = [[3], [1, 2], [5, 0, 4], [(7 * i) % 8 for i in range(17)]]
NEW = 16
NARROW = tree_from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
TARGETS = {name: config(vocab_size=8, tied=False, position=name) for name in ("none", "alibi")}


def vectors(projection: str = "single") -> SeqPEPolicy:
    """The vectors of a random encoder, large enough to matter."""
    injection, cfg = seqpe.Injection(projection=projection), seqpe.Config(16, 2, 200, layers=1)
    specs = (seqpe.specs(cfg), seqpe.projection_specs(injection, 16, TARGETS["none"]))
    params, matrices = jax.tree.map(lambda x: 12 * x, init(specs, jax.random.key(5)))
    return make_policy(params, cfg, matrices, injection, 160)


@functools.cache
def policy(position: str) -> Any:
    """SeqPE's for the model without positions, else the model's own."""
    return vectors() if position == "none" else decoder.default_policy(TARGETS[position])


def noisy(params: Any) -> Any:
    """Heads away from their symmetric start."""
    key = jax.random.key(3)
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), params)


def drafter_of(kind: str, target: decoder.Config) -> tuple[Drafter, Any]:
    """An untrained drafter for a target."""
    params, key = weights(target), jax.random.key(1)
    if kind == "lookup":
        return LookupDrafter(), None
    if kind == "recycling":
        return TokenRecycling(tree=NARROW), None
    if kind == "draft model":
        return draft_model(target, params, target, 4, sampled=False)
    if kind == "longspec":
        cfg = longspec.LongSpecConfig(window=7)
        return LongSpecDrafter(cfg, (2, 4, 3)), noisy(init(longspec.specs(cfg, target), key))
    if kind == "clover":
        heads = clover.CloverConfig(num_heads=3, num_layers=1)
        start = clover.init_from_target(params, target, heads, key)
        return CloverDrafter(heads, NARROW), CloverParams(noisy(start), None)
    if kind == "medusa":
        cfg = medusa.MedusaConfig()
        start = medusa.init_from_target(params, target, cfg, key)
        return MedusaDrafter(cfg, NARROW), MedusaParams(noisy(start), None)
    layer = init(eagle.specs(eagle.EagleConfig(), target), key)
    return EagleDrafter(eagle.EagleConfig(), NARROW), EagleParams(layer)


@functools.cache
def plain(position: str, width: int) -> list[list[int]]:
    """Greedy continuations without a drafter at a width."""
    eng = engine(TARGETS[position], drafter=NoDrafter(width), policy=policy(position))
    return eng.generate(PROMPTS, NEW).tokens


QUICK = {
    ("none", "recycling"), ("none", "clover"), ("none", "eagle"),
    ("alibi", "draft model"), ("alibi", "eagle"),
}  # fmt: skip
KINDS = ("lookup", "recycling", "draft model", "clover", "medusa", "eagle", "longspec")
CASES = [
    pytest.param(p, k, marks=[] if (p, k) in QUICK else [pytest.mark.slow])
    for p in TARGETS
    for k in KINDS
]


@pytest.mark.parametrize(("position", "kind"), CASES)
def test_drafting_changes_nothing(position: str, kind: str):
    target = TARGETS[position]
    drafter, params = drafter_of(kind, target)
    eng = engine(target, drafter=drafter, drafter_params=params, policy=policy(position))
    found = eng.generate(PROMPTS, NEW)
    assert found.tokens == plain(position, drafter.width)
    assert found.stats.accepted.sum() > 0


def test_the_texts_are_those_of_their_positions():
    """Without its vectors the first model writes something else."""
    alone = engine(TARGETS["none"], drafter=NoDrafter(8)).generate(PROMPTS, NEW).tokens
    assert alone != plain("none", 8)
    text = jnp.asarray([PROMPTS[3] + plain("none", 8)[3]], jnp.int32)
    params = weights(TARGETS["none"])
    out = decoder.forward(params, TARGETS["none"], text, policy=policy("none"))
    rows = np.asarray(decoder.unembed(params, TARGETS["none"], out.hidden))[0, 16:-1]
    chosen = np.take_along_axis(rows, np.asarray(plain("none", 8)[3])[:, None], 1)[:, 0]
    assert np.all(chosen >= rows.max(1) - 1e-4)
