"""A smaller decoder with the target's vocabulary as the drafter.

Sources: Leviathan et al. arXiv 2211.17192, Chen et al. 2302.01318. The chain is drawn from the
draft model's own warped law, or taken greedily and verified as a fixed candidate set.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

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
    ahead: Any  # (b,) int32, by how much the text is longer than what the draft model reads
    own_prompts: bool = struct.field(pytree_node=False, default=False)

    def extent(self, context: Context) -> int | None:
        """Slots that attention reads: measured on the text, unless the prompts are other ones."""
        return None if self.own_prompts else context.extent


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

    def draws(self, context: Context) -> bool:
        """Whether drafted tokens are drawn from laws, which the verifier then needs."""
        return self.sampled and not context.greedy

    @property
    def draft_limit(self) -> int:
        """The longest text that the draft model can read."""
        return self.cfg.max_length

    def init(
        self,
        params: decoder.Params,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> DraftModelState:
        """The draft model's own pass over the prompt, or its own one, but the last token."""
        check_vocabulary(self.cfg, target.cfg)
        own: Any = request
        if request.draft is not None:
            own, capacity = request.draft, request.draft.capacity
        batch, size = own.tokens.shape
        cache = init_cache(self.cfg, batch, capacity, params.final_norm.scale.dtype)
        policy = decoder.default_policy(self.cfg)
        cache, _ = prefill_chunk(
            params,
            self.cfg,
            policy,
            cache,
            own.tokens,
            own.lengths - 1,
            None,
            extent=size,
            outputs=frozenset(),
        )
        ahead = request.lengths - own.lengths
        return DraftModelState(
            cache.end_prefill(), jnp.ones((batch,), jnp.int32), ahead, request.draft is not None
        )

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
        _, logits, state = self._read_text(params, state, context)
        first, extent = self._choose(logits, context, 0), state.extent(context)

        def extend(carry: tuple[Array, Cache], i: Array) -> tuple[Any, Any]:
            token, own = carry
            _, logits, own = self._run(params, own, token[:, None], extent)
            chosen = self._choose(logits[:, 0], context, i)
            return (chosen[0], own), chosen

        steps = jnp.arange(1, self.length)
        (_, own), rest = jax.lax.scan(extend, (first[0], state.cache), steps)
        drafted, laws = jax.tree.map(
            lambda one, more: jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], axis=1),
            first,
            rest,
        )
        return self._chain(root, drafted, laws), dataclasses.replace(state, cache=own), cache

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
        drafted = jnp.sum(draft.valid, axis=1) - 1
        seen = state.missing - 1 + jnp.minimum(n, drafted)
        return dataclasses.replace(state, cache=state.cache.commit(None, seen))

    def _read_text(
        self, params: decoder.Params, state: DraftModelState, context: Context
    ) -> tuple[Float[Array, "b width"], Float[Array, "b v"], Any]:
        """Run the one or two tokens that are new to the model: hidden state and logits of the root.

        The state that comes with them has its own type.
        """
        own, seen = state.cache, state.cache.length + state.ahead
        missing = context.length - seen
        recent = jnp.take_along_axis(context.tokens, seen[:, None] + jnp.arange(2)[None], axis=1)
        tokens = jnp.maximum(recent, 0)
        hidden, logits, own = self._run(params, own, tokens, state.extent(context))
        newest = missing[:, None, None] - 1
        hidden, logits = (jnp.take_along_axis(x, newest, axis=1)[:, 0] for x in (hidden, logits))
        # Where one token was missing, the second slot holds padding and is used again.
        state = dataclasses.replace(state, cache=own.rollback(missing), missing=missing)
        return hidden, logits, state

    def _chain(
        self,
        root: Int[Array, " b"],
        drafted: Int[Array, "b k"],
        laws: Float[Array, "b k v"] | None,
        valid: Bool[Array, "b n"] | None = None,
    ) -> Draft:
        """The draft below each root, with the laws it was drawn from, if any."""
        probs = None
        if laws is not None:
            # The last node has no children, so its law is never read.
            probs = jnp.pad(laws, ((0, 0), (0, 1), (0, 0)))
        return static_draft(
            chain_tree(self.length),
            jnp.concatenate([root[:, None], drafted], axis=1),
            valid,
            probs=probs,
            mode="chain" if self.sampled else "deterministic",
        )

    def _run(
        self, params: decoder.Params, cache: Cache, tokens: Int[Array, "b t"], extent: int | None
    ) -> tuple[Float[Array, "b t width"], Float[Array, "b t v"], Cache]:
        """Hidden states and logits of new tokens, whose entries become scratch."""
        out, cache = run_scratch(Target(params, self.cfg), cache, tokens, None, extent)
        return out.hidden, decoder.unembed(params, self.cfg, out.hidden), cache

    def _choose(
        self, logits: Float[Array, "b v"], context: Context, i: int | Array
    ) -> tuple[Int[Array, " b"], Any]:
        """Drafted token number ``i`` of each row, and the law if it was drawn from one."""
        if not self.draws(context):
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
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


def check_tokenizer(draft: Model, model: Model) -> None:
    """Raise ValueError unless the draft model has the tokenizer of the model it drafts for."""
    check_vocabulary(draft.cfg, model.cfg)
    if draft.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise ValueError(
            f"{draft.name} has another tokenizer than {model.name}: use a draft model with the "
            f"target's tokenizer."
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
    check_tokenizer(loaded, model)
    return draft_model(model.cfg, loaded.params, loaded.cfg)
