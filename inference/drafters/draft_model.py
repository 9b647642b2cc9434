"""A smaller decoder with the target's vocabulary as the drafter.

Sources: Leviathan et al. arXiv 2211.17192, Chen et al. 2302.01318. The chain is drawn from the
draft model's own warped law, or taken greedily and verified as a fixed candidate set.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.cache import Cache, init_cache
from inference.drafter import Context, Draft, Request, Target, TargetOutputs, static_draft
from inference.drafters.scratch import run_scratch
from inference.loop import prefill_chunk
from models import decoder
from models.load import Model
from models.load import load as load_model
from ops.sampling import Use, request_key, sample
from ops.tree import chain_tree


@struct.dataclass
class DraftModelState:
    """The draft model's cache, and how many of the text's last tokens it had not seen."""

    cache: Cache
    missing: Any  # (b,) int32, 1 or 2 when drafting: the root, or it and the one before


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """A chain of ``length`` tokens from a decoder of config ``cfg``; its weights are ``params``.

    Attributes:
        cfg: the draft model's config.
        length: tokens per draft.
        sampled: draw from the draft model's law, warped as the target's is, and verify by
            ``chain``. Otherwise draft greedily and verify as a fixed set, which emits the very
            text that plain decoding emits with the same seed.
    """

    cfg: decoder.Config
    length: int = 4
    sampled: bool = True
    needs: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.length + 1

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return self.length

    def init(
        self,
        params: decoder.Params,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> DraftModelState:
        """The draft model's own pass over the prompt but its last token."""
        check_vocabulary(self.cfg, target.cfg)
        batch, size = request.tokens.shape
        cache = init_cache(self.cfg, batch, capacity, params.final_norm.scale.dtype)
        policy = decoder.default_policy(self.cfg)
        cache, _ = prefill_chunk(
            params,
            self.cfg,
            policy,
            cache,
            request.tokens,
            request.lengths - 1,
            None,
            extent=size,
            outputs=frozenset(),
        )
        return DraftModelState(cache.end_prefill(), jnp.ones((batch,), jnp.int32))

    def propose(
        self,
        params: decoder.Params,
        state: DraftModelState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, DraftModelState, Any]:
        """``length`` passes: the first over all that is new to the model, then token by token."""
        own, missing = state.cache, context.length - state.cache.length
        recent = jnp.take_along_axis(
            context.tokens, own.length[:, None] + jnp.arange(2)[None], axis=1
        )
        logits, own = self._run(params, own, jnp.maximum(recent, 0), context.extent)
        # Where one token was missing, the second slot holds padding and is used again.
        own = own.rollback(missing)
        law = jnp.take_along_axis(logits, missing[:, None, None] - 1, axis=1)[:, 0]
        first = self._choose(law, context, 0)

        def extend(carry: tuple[Array, Cache], i: Array) -> tuple[Any, Any]:
            token, own = carry
            logits, own = self._run(params, own, token[:, None], context.extent)
            chosen = self._choose(logits[:, 0], context, i)
            return (chosen[0], own), chosen

        steps = jnp.arange(1, self.length)
        (_, own), rest = jax.lax.scan(extend, (first[0], own), steps)
        drafted, laws = (
            jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], axis=1)
            for one, more in zip(first, rest, strict=True)
        )
        tokens = jnp.concatenate([root[:, None], drafted], axis=1)
        probs = None
        if self.sampled:
            # The last node has no children, so its law is never read.
            probs = jnp.pad(laws, ((0, 0), (0, 1), (0, 0)))
        draft = static_draft(
            chain_tree(self.length),
            tokens,
            probs=probs,
            mode="chain" if self.sampled else "deterministic",
        )
        return draft, DraftModelState(own, missing), cache

    def observe(
        self,
        params: decoder.Params,
        state: DraftModelState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> DraftModelState:
        """Keep the entries of committed tokens; the last drafted token was never run."""
        seen = state.missing - 1 + jnp.minimum(n, self.length)
        return dataclasses.replace(state, cache=state.cache.commit(None, seen))

    def _run(
        self, params: decoder.Params, cache: Cache, tokens: Int[Array, "b t"], extent: int | None
    ) -> tuple[Float[Array, "b t v"], Cache]:
        """Logits of new tokens, whose entries become scratch."""
        out, cache = run_scratch(Target(params, self.cfg), cache, tokens, None, extent)
        return decoder.unembed(params, self.cfg, out.hidden), cache

    def _choose(
        self, logits: Float[Array, "b v"], context: Context, i: int | Array
    ) -> tuple[Int[Array, " b"], Float[Array, "b v"]]:
        """Drafted token number ``i`` of each row, and the law it was drawn from."""
        if not self.sampled:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits
        laws = context.sampling.per_row(logits.shape[0]).warp(logits)
        keys = jax.vmap(lambda seed, at: request_key(seed, at + i, Use.DRAFT))(
            context.seeds, context.length
        )
        return jax.vmap(sample)(keys, laws), laws


def check_vocabulary(draft: decoder.Config, target: decoder.Config) -> None:
    """Raise ValueError unless both models have vocabularies of one size."""
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"the draft model has {draft.vocab_size} tokens and the target {target.vocab_size}: "
            f"use a draft model with the target's tokenizer."
        )


def draft_model(
    target_cfg: decoder.Config,
    params: decoder.Params,
    cfg: decoder.Config,
    length: int = 4,
    sampled: bool = True,
) -> tuple[DraftModel, decoder.Params]:
    """A draft model for a target, from stacked or unstacked weights: the drafter and its params.

    Raises:
        ValueError: the vocabularies differ in size, or ``length`` is below 1.
    """
    check_vocabulary(cfg, target_cfg)
    if length < 1:
        raise ValueError(f"a draft needs at least one token, got length {length}.")
    return DraftModel(cfg, length, sampled), decoder.unstack(params)


def load(argument: str, model: Model) -> tuple[DraftModel, decoder.Params]:
    """The draft model named ``argument`` for ``model``.

    Raises:
        ValueError: it has another tokenizer.
        FileNotFoundError: there is no such model.
    """
    loaded = load_model(argument)
    check_vocabulary(loaded.cfg, model.cfg)
    if loaded.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise ValueError(
            f"{argument} has another tokenizer than {model.name}: use a draft model with the "
            f"target's tokenizer."
        )
    return draft_model(model.cfg, loaded.params, loaded.cfg)
