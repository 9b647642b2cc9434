"""RAPID's drafter: a model of the target's size or larger that reads a short retrieved context.

It drafts a chain by sampling, in a cache of its own over its own prompt; the target, which has read
everything, verifies it by the rule ``transfer`` (:mod:`ops.transfer`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from inference.drafters.draft_model import DraftModel, DraftModelState, check_vocabulary
from models import decoder
from ops.sampling import Number
from ops.transfer import Transfer


@struct.dataclass
class RapidParams:
    """The drafter's weights (unstacked) and the numbers of the method, all of them data."""

    model: decoder.Params
    transfer: Transfer
    confidence: Number  # a draft ends after a token less likely than that; 0: never


@dataclasses.dataclass(frozen=True)
class RapidDrafter(DraftModel):
    """A chain of ``length`` sampled tokens, verified with transfer.

    Lossless only with ``transfer.eta`` 0. At temperature 0 tokens are drafted and verified by
    argmax, and the drafter's law is the one at temperature 1.
    """

    length: int = 10
    verification: str = "transfer"

    def init(
        self,
        params: RapidParams,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> DraftModelState:
        """The drafter's own pass over its prompt but the last token."""
        return super().init(params.model, target, request, prompt, capacity)

    def propose(
        self,
        params: RapidParams,
        state: DraftModelState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, DraftModelState, Any]:
        """The chain of the draft model, cut after a token that it was not sure of."""
        draft, state, cache = super().propose(params.model, state, target, cache, root, context)
        valid = draft.valid & sure(draft.probs, params.confidence)
        draft = dataclasses.replace(
            draft,
            tokens=jnp.where(valid, draft.tokens, -1),
            valid=valid,
            mode="transfer",
            transfer=params.transfer,
        )
        return draft, state, cache

    def observe(
        self,
        params: RapidParams,
        state: DraftModelState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> DraftModelState:
        """Keep the entries of committed tokens."""
        return super().observe(params.model, state, draft, outputs, path, n, root)

    def draws(self, context: Context) -> bool:
        """The transfer needs laws at every temperature."""
        return True

    def _choose(
        self, logits: Float[Array, "b v"], context: Context, i: int | Array
    ) -> tuple[Int[Array, " b"], Any]:
        token, law = super()._choose(logits, context, i)
        sampled = context.sampling.per_row(logits.shape[0]).temperature > 0
        # A one-hot law says nothing about which way to pull.
        return token, jnp.where(sampled[:, None], law, jax.nn.softmax(logits, axis=-1))


def sure(probs: Float[Array, "b n v"], confidence: Number) -> Bool[Array, "b n"]:
    """Which nodes of a chain follow only tokens whose law had a maximum of ``confidence``.

    The first token that falls below it is still drafted; row i of ``probs`` is the law of node
    i + 1.
    """
    unsure = jnp.max(probs, axis=-1) < confidence
    before = jnp.cumsum(unsure[:, :-1].astype(jnp.int32), axis=1) - unsure[:, :-1]
    return jnp.pad(before == 0, ((0, 0), (1, 0)), constant_values=True)


def rapid_drafter(
    target_cfg: decoder.Config,
    params: decoder.Params,
    cfg: decoder.Config,
    length: int = 10,
    transfer: Transfer | None = None,
    confidence: float = 0.0,
) -> tuple[RapidDrafter, RapidParams]:
    """A drafter for a target, from stacked or unstacked weights: the drafter and its params.

    The same weights as the target's make it self-speculation, a larger model's upward
    speculation.

    Raises:
        ValueError: the vocabularies differ in size, ``length`` is below 1, or ``confidence``
            outside [0, 1].
    """
    check_vocabulary(cfg, target_cfg)
    if length < 1 or not 0 <= confidence <= 1:
        raise ValueError(
            f"a draft needs at least one token and a confidence within 0 and 1, got length "
            f"{length} and {confidence}."
        )
    settings = Transfer.make() if transfer is None else transfer
    return RapidDrafter(cfg, length), RapidParams(
        decoder.unstack(params), settings, np.float32(confidence)
    )
