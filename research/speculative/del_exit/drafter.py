"""Drafting with the target's own first layers: DEL's choice of how many, and static rivals.

Sources: DEL, arXiv 2504.05598; drafting and verification from LayerSkip, arXiv 2404.16710. A draft
leaves its layers' keys and values in the cache's scratch slots, and the target's pass goes on from
the hidden states after them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.cache import check_capacity
from inference.drafter import Context, Draft, Request, Resume, Target, TargetOutputs, static_draft
from models import decoder
from models.readout import likeliest_tokens
from ops.tree import chain_tree
from research.speculative.del_exit.drafting import draft_chain
from research.speculative.del_exit.statistics import (
    ExitStatistics,
    acceptance,
    choose_exit,
    draft_thresholds,
    no_statistics,
    update_statistics,
)

Number = Any
METHODS = ("del", "fixed", "fsm", "dv")
MODES = ("confidence", "gamma", "min")
MISSING = ("official", "half")


@struct.dataclass
class Controls:
    """The numbers that steer drafting; all are data. Made by :func:`early_exit`.

    The last four are Draft & Verify's (arXiv 2309.08168, recalled).
    """

    exit_layer: Number = 1  # of the static methods: layers that draft
    gamma: Number = 6  # of the static methods: tokens per draft, at first (fsm) or at most (dv)
    omega: Number = 0.95  # DEL's decay per round
    always_cut: Number = False  # also after rounds whose chosen length was 0
    threshold: Number = 0.8  # at first
    target_rate: Number = 0.9  # of accepted tokens
    rate_decay: Number = 0.5
    threshold_decay: Number = 0.9
    threshold_step: Number = 0.01


@struct.dataclass
class Round:
    """The last round, to be learnt from when the target's head is at hand again."""

    states: Any  # (b, layers, n, width) the stream after every layer
    valid: Any  # (b, n)


@struct.dataclass
class ExitState:
    """Per row: what drafts, and what is known."""

    exit_layer: Any  # (b,) int32, layers that draft
    gamma: Any  # (b,) int32, chosen draft length
    rounds: Any  # (b,) int32
    statistics: Any = None  # ExitStatistics with leading rows
    last: Any = None  # Round
    threshold: Any = None  # (b,) dv
    rate: Any = None  # (b,) dv


@dataclasses.dataclass(frozen=True)
class ExitDrafter:
    """A chain from the target's first layers. Its params are :class:`Controls`.

    Attributes:
        method: ``del`` chooses exit and length each round from what cached states tell;
            ``fixed`` keeps both; ``fsm`` lengthens by one after a draft that was accepted whole and
            shortens by one else; ``dv`` ends drafts by a threshold that follows a target rate.
        mode: what ends a draft of DEL: its ``confidence`` (as in the authors' code), the chosen
            length ``gamma``, or the first of both (``min``).
        missing: threshold of an exit that was always right or always wrong so far: ``official``
            ends no draft, ``half`` takes the missing mean as 0.
        max_draft: tokens per draft at most; lengths are chosen below it.
        context: last prompt positions that DEL learns from before the first round.
        sampled: draw from the exit's warped law and verify by ``chain``. Otherwise draft greedily
            and verify as a fixed set: the text is that of plain sampling with the same seed.

    Raises:
        ValueError: an unknown method, mode or missing, or a size below 1.
    """

    method: str = "del"
    mode: str = "confidence"
    missing: str = "official"
    max_draft: int = 18
    context: int = 32
    sampled: bool = True

    def __post_init__(self):
        for name, known in (("method", METHODS), ("mode", MODES), ("missing", MISSING)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}."
                )
        if min(self.max_draft, self.context) < 1:
            raise ValueError(
                f"max_draft {self.max_draft} and context {self.context} must be 1 or more."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The states after every layer, for DEL."""
        return frozenset({"hidden_states"} if self.method == "del" else ())

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.max_draft + 1

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return self.max_draft

    def init(
        self,
        params: Controls,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> ExitState:
        """DEL: exit 1, one token, and what the prompt's last positions tell of every exit."""
        check_capacity(self.width, capacity, "a draft")
        check_exits(target.cfg)
        batch, layers = request.lengths.shape[0], target.cfg.num_layers
        nothing = jnp.zeros((batch,), jnp.int32)

        def everywhere(x: Number, dtype: Any) -> Array:
            return jnp.full((batch,), x, dtype)

        if self.method != "del":
            return ExitState(
                everywhere(params.exit_layer, jnp.int32),
                everywhere(params.gamma, jnp.int32),
                nothing,
                threshold=everywhere(params.threshold, jnp.float32),
                rate=everywhere(params.target_rate, jnp.float32),
            )
        width = target.params.final_norm.scale.shape[0]
        empty = jnp.zeros((batch, layers, self.width, width), target.params.final_norm.scale.dtype)
        return ExitState(
            everywhere(1, jnp.int32),
            everywhere(1, jnp.int32),
            nothing,
            statistics=self._of_prompt(target, request, prompt),
            last=Round(empty, jnp.zeros((batch, self.width), bool)),
        )

    def propose(
        self,
        params: Controls,
        state: ExitState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, ExitState, Any]:
        """A chain of the chosen exit. Lower layers' entries of its tokens are left as scratch."""
        if self.method == "del":
            state = self._learn(params, state, target)
        longest, threshold = self._ends(state)
        if context.limit is not None:
            longest = jnp.clip(context.limit - context.length - 1, 0, longest)
        depth = jnp.max(state.exit_layer)
        drafted = draft_chain(
            state.exit_layer,
            depth,
            longest,
            threshold,
            target,
            cache,
            root,
            context,
            self.width,
            self.sampled and not context.greedy,
        )
        draft = static_draft(
            chain_tree(self.max_draft),
            drafted.tokens,
            drafted.valid,
            probs=drafted.laws,
            mode="chain" if self.sampled else "deterministic",
        )
        count = jnp.sum(drafted.valid, axis=1) - 1
        draft = dataclasses.replace(
            draft,
            resume=Resume(jnp.take(drafted.states, depth, axis=0), depth),
            layer_passes=(count * state.exit_layer).astype(jnp.float32),
        )
        if self.method == "del":
            state = dataclasses.replace(
                state, last=Round(jnp.swapaxes(drafted.states[1:], 0, 1), draft.valid)
            )
        return draft, state, drafted.cache

    def observe(
        self,
        params: Controls,
        state: ExitState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> ExitState:
        """Complete the round's states, or move the length or the threshold of a static method."""
        live, resume = n > 0, draft.resume
        count = jnp.sum(draft.valid, axis=1) - 1
        accepted = jnp.maximum(n - 1, 0)
        new = dataclasses.replace(state, rounds=state.rounds + live)
        if self.method == "del" and resume is not None:
            verified = jnp.swapaxes(outputs.hidden_states[1:], 0, 1)
            above = jnp.arange(1, verified.shape[1] + 1) > resume.layer
            states = jnp.where(above[None, :, None, None], verified, state.last.states)
            return dataclasses.replace(new, last=Round(states, state.last.valid & live[:, None]))
        if self.method == "fsm":
            moved = jnp.where(accepted >= count, state.gamma + 1, state.gamma - 1)
            gamma = jnp.where(live, jnp.clip(moved, 1, self.max_draft), state.gamma)
            return dataclasses.replace(new, gamma=gamma.astype(jnp.int32))
        if self.method == "dv":
            rate = accepted / jnp.maximum(count, 1)
            rate = params.rate_decay * state.rate + (1 - params.rate_decay) * rate
            step = jnp.where(rate <= params.target_rate, 1, -1) * params.threshold_step
            decay = params.threshold_decay
            threshold = decay * state.threshold + (1 - decay) * (state.threshold + step)
            live &= count > 0
            return dataclasses.replace(
                new,
                rate=jnp.where(live, rate, state.rate).astype(jnp.float32),
                threshold=jnp.where(live, threshold, state.threshold).astype(jnp.float32),
            )
        return new

    def _of_prompt(self, target: Target, request: Request, prompt: TargetOutputs) -> ExitStatistics:
        """Statistics of the last positions before the root."""
        layers, batch = target.cfg.num_layers, request.lengths.shape[0]
        none = jax.tree.map(lambda x: jnp.stack([x] * batch), no_statistics(layers))
        if prompt.hidden_states is None:
            return none
        at = request.lengths[:, None] - 1 - self.context + jnp.arange(self.context)[None]
        states = jax.vmap(lambda x, i: x[:, i], in_axes=(1, 0))(
            prompt.hidden_states[1:], jnp.maximum(at, 0)
        )
        return self._statistics(none, states, at >= 0, self.context, target, 1, False, 1.0)

    def _learn(self, params: Controls, state: ExitState, target: Target) -> ExitState:
        """The statistics with the last round, and the exit and length for the next one."""
        first = state.rounds == 1
        omega = jnp.where(first, 1.0, jnp.asarray(params.omega, jnp.float32))
        cut = (state.gamma > 0) | jnp.asarray(params.always_cut)
        found = self._statistics(
            state.statistics, state.last.states, state.last.valid, 0, target,
            state.exit_layer, cut, omega,
        )  # fmt: skip
        live = jnp.any(state.last.valid, axis=1)
        choose = functools.partial(
            choose_exit, num_layers=target.cfg.num_layers, gamma_max=self.max_draft
        )
        exit_layer, gamma = jax.vmap(choose)(jax.vmap(acceptance)(found))
        statistics = jax.tree.map(
            lambda new, old: jnp.where(live[:, None, None], new, old), found, state.statistics
        )
        return dataclasses.replace(
            state,
            statistics=statistics,
            exit_layer=jnp.where(live, exit_layer, state.exit_layer),
            gamma=jnp.where(live, gamma, state.gamma),
        )

    def _statistics(
        self,
        statistics: ExitStatistics,
        states: Float[Array, "b layers t width"],
        valid: Bool[Array, "b t"],
        num_context: int,
        target: Target,
        exit_layer: Any,
        cut: Any,
        omega: Any,
    ) -> ExitStatistics:
        """All rows' statistics with the tokens that ``states`` read out."""
        tokens, confidence = likeliest_tokens(target.params, target.cfg, states)
        batch = valid.shape[0]
        update = jax.vmap(update_statistics, in_axes=(0, 0, 0, 0, None, 0, 0, 0))
        rows = (jnp.broadcast_to(jnp.asarray(x), (batch,)) for x in (exit_layer, cut, omega))
        return update(statistics, tokens, confidence[:, :-1], valid, num_context, *rows)

    def _ends(self, state: ExitState) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
        """The longest draft of each row, and the confidence below which it ends."""
        always = jnp.full(state.gamma.shape, -jnp.inf, jnp.float32)
        if self.method == "dv":
            return state.gamma, state.threshold
        if self.method != "del":
            return state.gamma, always
        first = state.rounds == 0
        found = jax.vmap(functools.partial(draft_thresholds, missing=self.missing))(
            state.statistics
        )
        own = jnp.take_along_axis(found, state.exit_layer[:, None] - 1, axis=1)[:, 0]
        threshold = always if self.mode == "gamma" else jnp.where(first, always, own)
        longest = jnp.full_like(state.gamma, self.max_draft)
        if self.mode != "confidence":
            longest = state.gamma
        return jnp.where(first, 1, longest), threshold


def check_exits(cfg: decoder.Config) -> None:
    """Raise ValueError for a model that cannot be left early."""
    if cfg.num_layers < 2:
        raise ValueError(
            "a model of one layer has no exit before its end: draft with another method."
        )


def early_exit(
    cfg: decoder.Config, controls: dict[str, Any] | None = None, **settings: Any
) -> tuple[ExitDrafter, Controls]:
    """The drafter and its controls for a model.

    Args:
        controls: fields of :class:`Controls` that are not the default's.
        settings: fields of :class:`ExitDrafter`.

    Raises:
        ValueError: an exit that the model does not have, a draft longer than ``max_draft``, or a
            decay or rate outside 0 to 1.
    """
    check_exits(cfg)
    made, drafter = Controls(**(controls or {})), ExitDrafter(**settings)
    if not 1 <= made.exit_layer <= cfg.num_layers - 1:
        raise ValueError(
            f"exit {made.exit_layer} is beyond a model of {cfg.num_layers} layers: choose 1 to "
            f"{cfg.num_layers - 1}."
        )
    if drafter.method != "del" and not 0 <= made.gamma <= drafter.max_draft:
        raise ValueError(
            f"drafts of {made.gamma} tokens do not fit max_draft {drafter.max_draft}: raise that."
        )
    shares = (made.omega, made.threshold, made.target_rate, made.rate_decay, made.threshold_decay)
    if not all(0 <= x <= 1 for x in shares):
        raise ValueError(f"omega, threshold, rates and decays lie within 0 and 1, got {shares}.")
    return drafter, made


def load(argument: str, model: Any) -> tuple[ExitDrafter, Controls]:
    """DEL with its usual settings: there is nothing to load."""
    return early_exit(model.cfg)
