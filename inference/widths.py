"""Passes of several widths in one program: a draft is scored by the narrowest that holds it.

A pass over one token costs less than one over eight, and drafters often have nothing to propose.
The widths are static; which one is taken is data.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from inference.drafter import Draft, TargetOutputs


def check_widths(widths: Sequence[int], most: int) -> tuple[int, ...]:
    """The widths below ``most``, rising, and ``most`` itself, which always has to fit.

    Raises:
        ValueError: a width below 1.
    """
    if any(width < 1 for width in widths):
        raise ValueError(f"widths {tuple(widths)}: a pass has at least one token.")
    return (*sorted({width for width in widths if width < most}), most)


def needed(draft: Draft, done: Array) -> Int[Array, ""]:
    """The nodes up to the last valid one, of the row that has most; finished rows need none."""
    number = 1 + jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)
    most = jnp.max(jnp.where(draft.valid, number[None], 1), axis=1)
    return jnp.max(jnp.where(done, 1, most))


def narrow(draft: Draft, width: int) -> Draft:
    """The first ``width`` nodes, which must be all the valid ones."""
    if width == draft.tokens.shape[1]:
        return draft
    depth = width - 1
    if not draft.is_chain:
        # Left to the number of nodes where that bounds it: such a draft must not pass for a chain.
        depth = None if draft.max_depth is None or draft.max_depth >= depth else draft.max_depth
    resume = draft.resume
    if resume is not None:
        resume = dataclasses.replace(resume, hidden=resume.hidden[:, :width])
    return dataclasses.replace(
        draft,
        resume=resume,
        tokens=draft.tokens[:, :width],
        parent=draft.parent[:, :width],
        depth=draft.depth[:, :width],
        mask=draft.mask[:, :width, :width],
        valid=draft.valid[:, :width],
        probs=None if draft.probs is None else draft.probs[:, :width],
        max_depth=depth,
    )


def widen(outputs: TargetOutputs, width: int) -> TargetOutputs:
    """Outputs of a narrow pass with zeros for the nodes that it left out."""

    def pad(x: Any, axis: int) -> Any:
        if x is None:
            return None
        after = [(0, 0)] * x.ndim
        after[axis] = (0, width - x.shape[axis])
        return jnp.pad(x, after)

    return TargetOutputs(
        tokens=pad(outputs.tokens, 1),
        pre_norm=pad(outputs.pre_norm, 1),
        hidden=pad(outputs.hidden, 1),
        hidden_states=pad(outputs.hidden_states, 2),
        logits=pad(outputs.logits, 1),
    )


def run_one(index: Int[Array, ""], branches: Sequence[Callable[[Any], Any]], carry: Any) -> Any:
    """``branches[index](carry)``, each branch a loop of at most one turn.

    A conditional copies what its branches return, such as a cache; the carry of a loop stays where
    it is.
    """
    if len(branches) == 1:
        return branches[0](carry)
    left = jnp.ones((), bool)
    for number, branch in enumerate(branches):

        def chosen(state: tuple[Any, Array], number: int = number) -> Array:
            return state[1] & (index == number)

        def once(state: tuple[Any, Array], branch: Any = branch) -> tuple[Any, Array]:
            return branch(state[0]), jnp.zeros((), bool)

        carry, left = jax.lax.while_loop(chosen, once, (carry, left))
    return carry
