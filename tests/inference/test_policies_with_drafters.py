"""Every drafter under another attention policy, and every policy with trained heads that draft.

Two ragged texts of the shipped model: one ends within the first chunk, the other begins beyond the
trained length.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from inference.drafter import NoDrafter
from inference.drafters.registry import DRAFTERS, make_drafter
from inference.engine import Generation, make_engine
from inference.policies.positions_file import write_positions
from inference.policies.registry import POLICIES, make_policy
from models import acceptance_head, clex, longspec, params
from models.drafter_io import save_drafter
from models.load import Model, load
from research.context.clex.scheme import MATRICES
from research.context.giraffe.bases import Basis

pytestmark = pytest.mark.slow

TARGET, TRAINED, NEW = "python-5m", 512, 24
DRAFTERS_WRITTEN = {
    "swift:STEPS": "swift:3",
    "draft:DIR": "draft:python-1m",
    "medusa:DIR": "medusa:python-5m-medusa",
    "eagle:DIR": "eagle:python-5m-eagle",
    "eagle2:DIR": "eagle2:python-5m-eagle",
    "clover:DIR": "clover:python-5m-clover",
}
"""Drafters with their numbers or what ships; others are plain, or get random weights."""
POLICIES_WRITTEN = {
    "window:SIZE": "window:100",
    "linear:FACTOR": "linear:2",
    "ntk:FACTOR": "ntk:2",
    "dynamic:FACTOR": "dynamic:2",
    "yarn:FACTOR": "yarn:2",
    "power:K": "power:0.3",
    "truncated:N": "truncated:64",
    "dual_chunk:CHUNK:LOCAL": "dual_chunk:192:32",
    "dual_chunk:CHUNK:LOCAL:TRAINED": "dual_chunk:192:32:256",
    "vertical_slash:CHUNK:LOCAL:V:S": "vertical_slash:192:32:40:60",
    "vertical_slash:CHUNK:LOCAL:V:S:THRESHOLD": "vertical_slash:192:32:40:60:300",
}
"""Policies with their numbers; the others have none, or get a file."""
OF_OTHER_MODELS = ("interpolated", "seqpe:DIR", "vertical_slash:CHUNK:LOCAL:FILE")
"""Two are not for rotary models; the last differs from its like in where its numbers stand."""


@functools.cache
def target() -> Model:
    return load(TARGET)


def texts() -> list[list[int]]:
    """Real code, so that heads and lookup find what they know."""
    ids = target().tokenizer.encode(pathlib.Path(__file__).read_text())
    assert len(ids) > TRAINED + 40
    return [ids[:50], ids[: TRAINED + 40]]


def random_weights(specs: Any) -> Any:
    return params.init(specs, jax.random.key(1))


def drafter_name(form: str, folder: pathlib.Path) -> str:
    """What to ask for, with weights in ``folder`` where none ship."""
    cfg, out = target().cfg, folder / "weights"
    if form.startswith("longspec"):
        head = longspec.LongSpecConfig(window=20)
        save_drafter(out, "longspec", head, random_weights(longspec.specs(head, cfg)), cfg)
        return form.replace("DIR", str(out))
    if form == "specdec:DIR:HEADS":
        head, draft = acceptance_head.AcceptanceConfig(), load("python-1m").cfg
        made = random_weights(acceptance_head.specs(head, draft))
        save_drafter(out, "specdec", head, made, draft)
        return f"specdec:python-1m:{out}"
    return DRAFTERS_WRITTEN.get(form, form)


def policy_name(form: str, folder: pathlib.Path) -> str:
    """What to ask for, with a file in ``folder`` where one is read."""
    cfg = target().cfg
    if form == "clex:DIR":
        ode = clex.CLEXConfig(cfg.head_dim, cfg.rope_base, TRAINED)
        made = random_weights(clex.specs(ode))
        facts = {name: np.asarray(getattr(made, name)).tolist() for name in MATRICES}
        write_positions(folder, "clex", {"cfg": dataclasses.asdict(ode), **facts})
    elif form == "giraffe:DIR":
        facts = {"basis": dataclasses.asdict(Basis(scale=2.0, xpos=True)), "scale_base": 512}
        write_positions(folder, "giraffe", facts | {"length": TRAINED})
    return POLICIES_WRITTEN.get(form, form.replace("DIR", str(folder)))


def decode(drafter: Any, weights: Any, policy: str) -> Generation:
    """Both texts in one batch; passes of one width, so that texts compare bit for bit."""
    model = target()
    engine = make_engine(
        model.params, model.cfg, drafter=drafter, drafter_params=weights, widths=(),
        policy=make_policy(policy, model.cfg), prefill_size=128, context_limit=2 * TRAINED,
    )  # fmt: skip
    return engine.generate(texts(), NEW)


@pytest.mark.parametrize("form", [form for form in DRAFTERS if form != "none"])
def test_every_drafter_changes_nothing(form: str, tmp_path: pathlib.Path):
    policy = "dual_chunk:192:32"
    drafter, weights = make_drafter(drafter_name(form, tmp_path), target())
    got = decode(drafter, weights, policy)
    assert got.tokens == decode(NoDrafter(drafter.width), None, policy).tokens
    assert all(len(row) == NEW for row in got.tokens)


@pytest.mark.parametrize("form", [form for form in POLICIES if form not in OF_OTHER_MODELS])
def test_under_every_policy_heads_draft_and_change_nothing(form: str, tmp_path: pathlib.Path):
    policy = policy_name(form, tmp_path)
    drafter, weights = make_drafter("eagle:python-5m-eagle", target())
    got = decode(drafter, weights, policy)
    assert got.tokens == decode(NoDrafter(drafter.width), None, policy).tokens
    assert np.all(np.asarray(got.stats.accepted) > 0)
