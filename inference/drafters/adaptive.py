"""A draft model that decides token by token how long its draft should be.

After every drafted token a rule names the risk that something drafted is wrong; a draft ends when
that exceeds a threshold. Ending is decided by what was drafted and always keeps the newest token,
so every drafted token is verified and the text keeps the target's law. Threshold and bounds are
data. Rows that have ended wait for the others.

The rules here need no training: a fixed length, the draft model's confidence and its entropy, and
the heuristic of Hugging Face's assisted generation, which adapts the length between rounds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from inference.drafters.draft_model import DraftModel, DraftModelState


@struct.dataclass
class Limits:
    """When a draft ends. Build it with :meth:`make`, which checks the values."""

    threshold: Any  # () float32: end when the risk exceeds it
    shortest: Any  # () int32: but not before so many tokens
    longest: Any  # () int32: and at the latest after so many

    @classmethod
    def make(cls, threshold: float = 1.0, shortest: int = 1, longest: int = 20) -> "Limits":
        """Checked limits; they may change between calls without compiling again.

        Raises:
            ValueError: bounds that are not ``1 <= shortest <= longest``.
        """
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"a draft needs 1 <= shortest <= longest, got {shortest} and {longest}."
            )
        return cls(
            jnp.asarray(threshold, jnp.float32),
            jnp.asarray(shortest, jnp.int32),
            jnp.asarray(longest, jnp.int32),
        )


@struct.dataclass
class AdaptiveParams:
    """The draft model's weights, its limits, and what the rule has learnt (None: nothing)."""

    model: Any  # unstacked
    limits: Any
    rule: Any = None


@struct.dataclass
class AdaptiveState(DraftModelState):
    """The draft model's state, and the most tokens of each row's next draft."""

    allowed: Any = None  # (b,) int32


@runtime_checkable
class Rule(Protocol):
    """What a draft's risk is. Rules are frozen dataclasses; what they learnt are ``params``."""

    def begin(self, batch: int) -> Any:
        """What is known before the first token of a round."""
        ...

    def risk(
        self,
        params: Any,
        known: Any,
        count: Array,
        hidden: Float[Array, "b width"],
        logits: Float[Array, "b v"],
    ) -> tuple[Float[Array, " b"], Any]:
        """The risk after token number ``count`` (0, 1, ...) was drawn, and what is known then.

        ``logits`` are those it was drawn from and ``hidden`` the state below them: it belongs to
        the token before, for the first one to text that is certain.
        """
        ...

    def allow(
        self, allowed: Int[Array, " b"], drafted: Int[Array, " b"], accepted: Int[Array, " b"]
    ) -> Int[Array, " b"]:
        """The most tokens of the next draft after one of which so many were accepted."""
        ...


@dataclasses.dataclass(frozen=True)
class Fixed:
    """No risk ever: every draft has ``limits.longest`` tokens."""

    def begin(self, batch: int) -> None:
        """Nothing."""

    def risk(self, params: Any, known: Any, count: Array, hidden: Array, logits: Array) -> Any:
        """Zero."""
        return jnp.zeros(logits.shape[0], jnp.float32), known

    def allow(self, allowed: Array, drafted: Array, accepted: Array) -> Array:
        """As before."""
        return allowed


class Confidence(Fixed):
    """One less the largest probability: ends below a confidence of ``1 - threshold``.

    The law is the model's own, at temperature 1, so that it also says something of greedy drafts.
    """

    def risk(self, params: Any, known: Any, count: Array, hidden: Array, logits: Array) -> Any:
        """See the class."""
        return 1.0 - jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1), known


class Entropy(Fixed):
    """The entropy of the model's law at temperature 1, in nats."""

    def risk(self, params: Any, known: Any, count: Array, hidden: Array, logits: Array) -> Any:
        """See the class."""
        log_p = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), known


class Heuristic(Fixed):
    """Two tokens more after a draft that was accepted whole, otherwise one less, at least one."""

    def allow(self, allowed: Array, drafted: Array, accepted: Array) -> Array:
        """See the class."""
        whole = accepted >= drafted
        return jnp.where(whole, allowed + 2, jnp.maximum(allowed - 1, 1))


Step = Callable[[Array, Any], tuple[Array, Array, Any]]
"""``step(count, carry) -> (risk (b,), ended (b,), carry)`` draws token number ``count``."""


def draft_until(
    step: Step,
    first: tuple[Float[Array, " b"], Bool[Array, " b"], Any],
    going: Bool[Array, " b"],
    limits: Limits,
    most: Int[Array, " b"],
) -> tuple[Int[Array, " b"], Any]:
    """Draft until every row has ended: each row's number of tokens, and the last carry.

    Args:
        step: draws tokens 1, 2, ... of all rows; those of rows that have ended do not count.
        first: what it gave for token 0.
        going: rows that draft at all; the others get 0 tokens.
        most: tokens per row at most, besides ``limits.longest``; at least 1.
    """
    longest = jnp.minimum(limits.longest, most)

    def tally(count: Array, going: Array, length: Array, risk: Array, ended: Array) -> Any:
        length = jnp.where(going, count, length)
        risky = (count >= limits.shortest) & (risk > limits.threshold)
        return count, going & ~(ended | risky | (count >= longest)), length

    def more(carry: Any) -> Array:
        return jnp.any(carry[0][1])

    def one(carry: Any) -> Any:
        (count, going, length), inner = carry
        risk, ended, inner = step(count, inner)
        return tally(count + 1, going, length, risk, ended), inner

    risk, ended, inner = first
    zero = jnp.zeros(going.shape, jnp.int32)
    start = tally(jnp.asarray(1, jnp.int32), going, zero, risk, ended)
    (_, _, length), inner = jax.lax.while_loop(more, one, (start, inner))
    return length, inner


@struct.dataclass
class _Drafted:
    """A growing draft."""

    cache: Any
    known: Any
    tokens: Any  # (b, k)
    laws: Any  # (b, k, v), or None if they are not needed


@dataclasses.dataclass(frozen=True)
class AdaptiveDraftModel(DraftModel):
    """A chain of at most ``length`` tokens that ends by a rule; params: :class:`AdaptiveParams`.

    Attributes:
        rule: see :class:`Rule`.
        first_length: most tokens of a text's first draft, for rules that change it from round to
            round; None: ``length``.
    """

    length: int = 20
    rule: Rule = Fixed()
    first_length: int | None = None
    widths: tuple[int, ...] = (4, 8)  # drafts are often much shorter than the longest

    def init(
        self,
        params: AdaptiveParams,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> AdaptiveState:
        """The draft model's own pass over the prompt but its last token."""
        state = super().init(params.model, target, request, prompt, capacity)
        first = self.length if self.first_length is None else self.first_length
        allowed = jnp.full(request.lengths.shape, first, jnp.int32)
        return AdaptiveState(state.cache, state.missing, state.ahead, state.own_prompts, allowed)

    def propose(
        self,
        params: AdaptiveParams,
        state: AdaptiveState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, AdaptiveState, Any]:
        """The first token from all that is new to the model, then one by one while rows go on."""
        batch = root.shape[0]
        hidden, logits, own = self._read_text(params.model, state, context)
        extent = own.extent(context)
        draft = _Drafted(
            own.cache,
            self.rule.begin(batch),
            jnp.full((batch, self.length), -1, jnp.int32),
            jnp.zeros((batch, self.length, logits.shape[-1]), jnp.float32)
            if self.draws(context)
            else None,
        )

        def draw(count: Any, hidden: Array, logits: Array, draft: _Drafted) -> Any:
            token, law = self._choose(logits, context, count)
            risk, known = self.rule.risk(params.rule, draft.known, count, hidden, logits)
            laws = None if draft.laws is None else draft.laws.at[:, count].set(law)
            tokens = draft.tokens.at[:, count].set(token)
            draft = dataclasses.replace(draft, known=known, tokens=tokens, laws=laws)
            return risk, _ends(token, context), draft

        def step(count: Array, draft: _Drafted) -> Any:
            newest = jax.lax.dynamic_slice_in_dim(draft.tokens, count - 1, 1, axis=1)
            hidden, logits, cache = self._run(params.model, draft.cache, newest, extent)
            return draw(count, hidden[:, 0], logits[:, 0], dataclasses.replace(draft, cache=cache))

        going = jnp.ones((batch,), bool) if context.done is None else ~context.done
        length, draft = draft_until(
            step,
            draw(jnp.asarray(0, jnp.int32), hidden, logits, draft),
            going,
            params.limits,
            jnp.minimum(state.allowed, self.length),
        )
        valid = jnp.arange(self.width)[None] <= length[:, None]
        chain = self._chain(root, draft.tokens, draft.laws, valid)
        return chain, dataclasses.replace(own, cache=draft.cache), cache

    def observe(
        self,
        params: AdaptiveParams,
        state: AdaptiveState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> AdaptiveState:
        """Keep the entries of committed tokens; let the rule say how long the next draft may be."""
        kept = super().observe(params.model, state, draft, outputs, path, n, root)
        drafted = jnp.sum(draft.valid, axis=1, dtype=jnp.int32) - 1
        allowed = self.rule.allow(state.allowed, drafted, n - 1)
        allowed = jnp.minimum(allowed, self.length)
        allowed = jnp.where(n > 0, allowed, state.allowed)
        return dataclasses.replace(state, cache=kept.cache, allowed=allowed)


def _ends(token: Int[Array, " b"], context: Context) -> Bool[Array, " b"]:
    """Whether the token ends its text."""
    if context.eos is None:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == context.eos[None, :], axis=-1)
