from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Context, NoDrafter, Target
from inference.drafters.eagle import EagleParams
from inference.drafters.eagle_tree import EagleTreeDrafter, prune
from inference.drafters.registry import check_name
from models import decoder, eagle, params
from models.draft_head import draft_vocabulary
from ops.dynamic_tree import DynamicTree
from ops.sampling import SamplingParams
from ops.tree import tree_from_parents
from tests.inference.models import NEW, config, engine, prompts, weights

CFG = config()
TEXT = [3, 1, 4, 1, 5, 9, 2, 6]


def layer(ids: Any = None) -> EagleParams:
    made = params.init(eagle.specs(eagle.EagleConfig(), CFG), jax.random.key(4))
    return EagleParams(made, None if ids is None else draft_vocabulary(weights(CFG), CFG, ids))


def drafter(**changes: Any) -> EagleTreeDrafter:
    return EagleTreeDrafter(eagle.EagleConfig(), **({"total": 9, "depth": 2, "top_k": 3} | changes))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("changes", "ids"),
    [({}, None), ({"least": 0.1}, None), ({}, [8, 10, 13, 20, 2, 5])],
    ids=["whole", "pruned", "draft vocabulary"],
)
def test_texts_are_those_of_plain_decoding(changes: Any, ids: Any, temperature: float):
    sampling = SamplingParams.make(temperature)
    mine = drafter(**changes)
    eng = engine(CFG, drafter=mine, drafter_params=layer(ids), widths=())
    got = eng.generate(prompts(), NEW, sampling=sampling)
    plain = engine(CFG, drafter=NoDrafter(mine.width)).generate(prompts(), NEW, sampling=sampling)
    assert got.tokens == plain.tokens
    assert got.stats.accepted.sum() > 0
    if not changes:
        # A prompt of one token has nothing to draft from in its first round.
        rounds = got.stats.rounds - np.array([1, 0, 0, 0])
        np.testing.assert_array_equal(got.stats.drafted, 9 * rounds)
    elif "least" in changes:
        assert 0 < got.stats.drafted.sum() < 9 * got.stats.rounds.sum()


@pytest.mark.slow
def test_every_node_scores_what_a_pass_over_its_path_gives():
    mine, given = drafter(total=21), layer()
    eng = engine(CFG, drafter=mine, drafter_params=given)
    state, seeds = eng.start([TEXT], 8, SamplingParams.make())
    context = Context(state.tokens, state.length, seeds, SamplingParams.make())
    draft, _, _ = mine.propose(
        given, state.drafter, Target(weights(CFG), CFG), None, jnp.asarray(TEXT[-1:]), context
    )
    tokens, mask = np.asarray(draft.tokens[0]), np.asarray(draft.mask[0])
    target = weights(CFG)
    out = decoder.forward(target, CFG, jnp.asarray([TEXT[:-1]]))

    def law(path: list[int]) -> np.ndarray:
        """The drafter's law after the root and a path, by one causal pass per token."""
        features, embeds = out.hidden, target.embed[jnp.asarray(TEXT[1:])][None]
        for token in [*path, None]:
            last = eagle.forward(given.layer, CFG, features, embeds)[0][:, -1:]
            if token is None:
                return np.asarray(jax.nn.softmax(decoder.unembed(target, CFG, last[0, 0])))
            features = jnp.concatenate([features, last], axis=1)
            embeds = jnp.concatenate([embeds, target.embed[token][None, None]], axis=1)
        raise AssertionError("a path ends with None")

    laws: dict[int, np.ndarray] = {}
    chosen: dict[int, list[int]] = {}
    for node in range(1, len(tokens)):
        parent = int(draft.parent[0, node])
        chosen.setdefault(parent, []).append(int(tokens[node]))
    for parent, children in chosen.items():
        path = [int(t) for t in tokens[np.flatnonzero(mask[parent])][1:]]
        laws[parent] = law(path)
        best = np.argsort(-laws[parent])[: len(children)]
        assert sorted(best.tolist()) == sorted(children)
    assert len(chosen) > 3


def test_pruning_keeps_the_nodes_that_promise_enough_and_moves_them_to_the_front():
    parent = jnp.asarray([[-1, 0, 0, 1, 1, 2, 3]], jnp.int32)
    scores = jnp.log(jnp.asarray([[1.0, 0.3, 0.6, 0.02, 0.2, 0.5, 0.01]]))
    tokens = jnp.asarray([[-1, 11, 12, 13, 14, 15, 16]], jnp.int32)
    made = DynamicTree(tokens, tree_from_parents(parent), scores)
    got, tree = prune(made, jnp.log(0.1))
    assert got[0, :5].tolist() == [-1, 11, 12, 14, 15]
    assert tree.parent[0].tolist() == [-1, 0, 0, 1, 2, -1, -1]
    assert tree.valid[0].tolist() == [True] * 5 + [False] * 2
    assert tree.depth[0, :5].tolist() == [0, 1, 1, 2, 2]
    whole, same = prune(made, -jnp.inf)
    np.testing.assert_array_equal(whole, tokens)
    np.testing.assert_array_equal(same.mask, made.tree.mask)


def test_what_the_tree_cannot_be_is_refused():
    with pytest.raises(ValueError, match="a fixed set"):
        drafter(sampled=True)
    with pytest.raises(ValueError, match="least is a probability"):
        drafter(least=1.0)
    assert check_name("eagle2:python-5m-eagle")[1] == "python-5m-eagle"
