"""SpecDec++: a draft ends when it is likely that the target rejects something in it.

A trained head on the draft model says of each drafted token whether it will be accepted. Their
product is the chance that the whole draft is; one less that is the risk. The head reads the state
that is computed to draw the NEXT token, so the newest token is part of the draft but not yet of the
risk, as in the released code.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from inference.drafters.adaptive import AdaptiveDraftModel, AdaptiveParams, Fixed, Limits
from inference.drafters.draft_model import check_tokenizer, check_vocabulary
from models import acceptance_head, decoder
from models.acceptance_head import AcceptanceConfig
from models.drafter_io import load_settings, load_weights
from models.load import Model
from models.load import load as load_model
from models.params import validate

THRESHOLD = 0.7
"""In the middle of the paper's best region; its sweep is 0.1, 0.3, 0.5, 0.7, 0.9."""
SHORTEST, LONGEST = 2, 20
"""The released code's bounds."""


@dataclasses.dataclass(frozen=True)
class RejectionRisk(Fixed):
    """The probability that at least one drafted token is rejected; params are the head's."""

    head: AcceptanceConfig

    def begin(self, batch: int) -> Float[Array, " b"]:
        """Nothing was drafted, so nothing is rejected."""
        return jnp.ones((batch,), jnp.float32)

    def risk(self, params: Any, known: Any, count: Array, hidden: Array, logits: Array) -> Any:
        """One less the product of acceptances; the state at ``count`` 0 is of certain text."""
        accepted = acceptance_head.acceptance(params, self.head, hidden)
        known = jnp.where(count > 0, known * accepted, known)
        return 1.0 - known, known


def specdec(
    target_cfg: decoder.Config,
    params: decoder.Params,
    cfg: decoder.Config,
    head_params: acceptance_head.Params,
    head: AcceptanceConfig,
    limits: Limits | None = None,
    sampled: bool = True,
) -> tuple[AdaptiveDraftModel, AdaptiveParams]:
    """The drafter and its params from a draft model and a head for it.

    Raises:
        ValueError: vocabularies of different sizes, or a head of another size than its config and
            the draft model say.
    """
    check_vocabulary(cfg, target_cfg)
    validate(head_params, acceptance_head.specs(head, cfg))
    bounds = Limits.make(THRESHOLD, SHORTEST, LONGEST) if limits is None else limits
    drafter = AdaptiveDraftModel(cfg, sampled=sampled, rule=RejectionRisk(head))
    return drafter, AdaptiveParams(decoder.unstack(params), bounds, head_params)


def load(argument: str, model: Model) -> tuple[AdaptiveDraftModel, AdaptiveParams]:
    """``DRAFT:HEADS``: a draft model by name and the folder of its head.

    Raises:
        ValueError: another tokenizer, or a head for another draft model.
        FileNotFoundError: nothing there; see also :mod:`models.drafter_io`.
    """
    name, _, folder = argument.rpartition(":")
    draft = load_model(name)
    check_tokenizer(draft, model)
    settings = load_settings(folder, "specdec", draft.cfg)
    head = AcceptanceConfig(**settings["config"])
    weights = load_weights(folder, acceptance_head.specs(head, draft.cfg))
    return specdec(model.cfg, draft.params, draft.cfg, weights, head)
