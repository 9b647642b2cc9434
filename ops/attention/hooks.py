"""Changes of logits that follow from the positions of query and key alone.

A hook is a function of two positions and a few numbers per head. The kernels compute it from
indices, block by block, so that no matrix of biases or decays is ever in memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("add", "multiply", "multiply_positive")


class Rule(NamedTuple):
    """The static part of a hook, which is compiled into a kernel."""

    value: Callable[..., Any]
    kind: str
    count: int


@flax.struct.dataclass
class LogitHook:
    """Adds `value(q_positions, k_positions, *numbers)` to logits, or multiplies them by it.

    `value` is a pure elementwise jnp function: of int32 positions that broadcast to queries x slots
    (in a kernel [rows, 1] and [1, slots]), and of one float32 per column of `numbers`, a scalar or
    something that broadcasts likewise. Its result is float32 and broadcasts to queries x slots.
    It is part of the compiled program: use a function of a module, not a new closure per call.
    Whatever it gives for pairs that the mask hides is dropped.

    Attributes:
      numbers: float32 [h, n], or [1, n] for all heads alike; data. Whole numbers are exact up to
        2**24.
      value: static, see above.
      kind: static, one of `KINDS`; "multiply_positive" leaves logits below zero as they are, so
        that a factor below one never raises a logit.
    """

    numbers: Any
    value: Callable[..., Any] = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False, default="add")

    @property
    def rule(self) -> Rule:
        """What of the hook is not data."""
        return Rule(self.value, self.kind, jnp.shape(self.numbers)[1])

    def validate(self, h: int) -> None:
        """Checks the hook against h query heads.

        Raises:
          ValueError: numbers of another shape, or an unknown kind.
        """
        shape = jnp.shape(self.numbers)
        if len(shape) != 2 or shape[0] not in (1, h):
            raise ValueError(
                f"LogitHook.numbers must have shape ({h}, n) or (1, n) for {h} heads; got {shape}"
            )
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown kind of logit hook {self.kind!r}; name one of {', '.join(KINDS)}"
            )


def pack_numbers(hooks: tuple[LogitHook, ...], h: int) -> Float[Array, "{h} n"]:
    """The numbers of all hooks side by side, for every head."""
    columns = [jnp.broadcast_to(x.numbers, (h, jnp.shape(x.numbers)[1])) for x in hooks]
    return jnp.concatenate(columns, axis=1).astype(jnp.float32)


def apply_rules(
    rules: tuple[Rule, ...],
    scores: Any,
    q_positions: Any,
    k_positions: Any,
    number: Callable[[int], Any],
) -> Any:
    """The scores after all hooks, in order; `number(i)` is column i of the packed numbers."""
    start = 0
    for rule in rules:
        numbers = [number(start + i) for i in range(rule.count)]
        value = rule.value(q_positions, k_positions, *numbers)
        start += rule.count
        if rule.kind == "add":
            scores = scores + value
        elif rule.kind == "multiply":
            scores = scores * value
        else:
            scores = jnp.where(scores > 0, scores * value, scores)
    return scores


def alibi(slopes: Float[Array, " h"]) -> LogitHook:
    """Adds -slope * (i - j) (Press et al. 2021, arXiv 2108.12409), one slope per head."""
    return LogitHook(slopes[:, None].astype(jnp.float32), _linear)


def window_decay(factor: float | Float[Array, ""], distance: float | Float[Array, ""]) -> LogitHook:
    """Multiplies positive logits of pairs more than `distance` apart by `factor`, either side.

    The rule of UltraViCo (arXiv 2511.20123) without its bands; `factor` is between 0 and 1.
    """
    return LogitHook(_row(factor, distance), _beyond, "multiply_positive")


def temperature(trained: float | Float[Array, ""]) -> LogitHook:
    """Multiplies logits by max(1, 0.1 ln((i + 1) / trained) + 1) ** 2, i the query's position.

    The attention temperature of YaRN (arXiv 2309.00071) for texts that grow token by token.
    """
    return LogitHook(_row(trained), _squared_temperature, "multiply")


def _row(*numbers: Any) -> Any:
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])[None]


def _linear(q_positions, k_positions, slope):
    return slope * (k_positions - q_positions).astype(jnp.float32)


def _beyond(q_positions, k_positions, factor, distance):
    apart = jnp.abs(q_positions - k_positions).astype(jnp.float32)
    return jnp.where(apart <= distance, 1.0, factor)


def _squared_temperature(q_positions, k_positions, trained):
    ratio = (q_positions + 1).astype(jnp.float32) / trained
    return jnp.square(jnp.maximum(0.1 * jnp.log(jnp.maximum(ratio, 1e-30)) + 1.0, 1.0))
