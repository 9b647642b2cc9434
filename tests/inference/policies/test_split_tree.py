"""A draft's pass in two parts gives the logits of the pass in one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import static_draft
from inference.loop import score_draft
from inference.policies.registry import make_policy
from inference.policies.split_tree import SplitTreePolicy, split_tree
from models import decoder
from ops.tree import tree_from_paths
from tests.inference.models import config, prefilled, weights


@pytest.mark.parametrize(
    "changes",
    [{}, {"windows": (3, None)}, {"position": "alibi"}],
    ids=["full", "sliding", "channels for positions"],
)
def test_logits_are_those_of_dense_attention(changes) -> None:
    cfg = config(**changes)
    texts = [[3], [1, 2, 3, 4], list(range(9))]
    cache = prefilled(weights(cfg), cfg, texts)
    shape = tree_from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)])
    tokens = jnp.asarray([[text[-1], 5, 6, 7, 8, 9, 10] for text in texts], jnp.int32)
    draft = static_draft(shape, tokens)
    lengths = jnp.asarray([32] * len(texts), jnp.int32)

    @jax.jit
    def hidden(policy):
        _, out = score_draft(weights(cfg), cfg, policy, cache, draft, lengths, 32, frozenset())
        return out.hidden

    dense = decoder.default_policy(cfg)
    both = split_tree(dense)
    np.testing.assert_allclose(hidden(both), hidden(dense), atol=1e-5)
    assert isinstance(make_policy("split_tree", cfg), SplitTreePolicy)
    jax.tree.map(np.testing.assert_array_equal, both.windows, dense.windows)
