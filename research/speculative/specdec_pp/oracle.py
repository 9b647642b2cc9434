"""The best that any rule could do with a draft model: end at the first token that is rejected.

It asks the target itself, so it is a bound and not a way to decode faster. The rejected token stays
in the draft: were it dropped, the target's own token would take its place, and the text's law would
be lost.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from inference.drafter import Context, Draft, Target
from inference.drafters.adaptive import AdaptiveDraftModel, AdaptiveParams, AdaptiveState
from inference.loop import score_draft
from models import decoder
from ops.verify import verify


@dataclasses.dataclass(frozen=True)
class OracleDraftModel(AdaptiveDraftModel):
    """Drafts as far as it may and keeps what ends with the first rejection.

    Under the target's default attention policy only.
    """

    def propose(
        self,
        params: AdaptiveParams,
        state: AdaptiveState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, AdaptiveState, Any]:
        """The draft up to the token that the verifier, with its own random numbers, will reject."""
        draft, state, cache = super().propose(params, state, target, cache, root, context)
        policy = decoder.default_policy(target.cfg)
        # The target's pass leaves no trace: its cache is forgotten.
        _, out = score_draft(
            target.params, target.cfg, policy, cache, draft, context.length, context.extent,
            frozenset(),
        )  # fmt: skip
        verdict = verify(
            draft.mode,
            draft.tokens,
            draft.parent,
            draft.valid,
            decoder.unembed(target.params, target.cfg, out.hidden),
            context.sampling,
            context.seeds,
            context.length,
            draft.probs,
            draft.max_depth,
        )
        nodes = jnp.arange(self.width)[None]
        valid = draft.valid & (nodes <= verdict.num_accepted[:, None] + 1)
        tokens = jnp.where(valid, draft.tokens, -1)
        return dataclasses.replace(draft, tokens=tokens, valid=valid), state, cache
