"""The law of three sampled tokens from the real loop, against exact enumeration."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from models import decoder
from ops.sampling import SamplingParams
from tests.inference.models import engine, forward_logits

ROWS = 4000


def p_value(cfg: decoder.Config, drafter: Any, params: Any, sampling: SamplingParams) -> float:
    """Pearson's test of ROWS sampled continuations of one token by three; four tokens in all."""
    eng = engine(cfg, drafter=drafter, drafter_params=params)
    got = np.asarray(eng.generate([[2]] * ROWS, 3, sampling=sampling, seeds=range(ROWS)).tokens)
    observed = np.bincount(got @ np.array([16, 4, 1]), minlength=64)
    law = np.zeros((4, 4, 4))
    for a, b, c in itertools.product(range(4), repeat=3):
        rows = sampling.warp(jnp.asarray(forward_logits(cfg, [2, a, b])))
        law[a, b, c] = rows[0, a] * rows[1, b] * rows[2, c]
    expected = ROWS * law.reshape(-1) / law.sum()
    assert not np.any(observed[expected == 0])
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return float(stats.chisquare(observed[keep], expected[keep]).pvalue)
