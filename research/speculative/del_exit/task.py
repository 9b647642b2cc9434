"""Training a language model that can be left early: LayerSkip's recipe on the ordinary task."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.decoder import LayerChoice
from models.layers import normalize
from models.params import cast
from research.speculative.del_exit.objective import (
    active_exits,
    draw_layers,
    dropout_rates,
    growth,
)
from train.data.pipeline import evaluation_batches
from train.losses import token_cross_entropy
from train.step import DTYPES
from train.task import Context
from train.tasks.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class LayerSkipTask(LanguageModel):
    """A language model with layer dropout and a loss at its exits.

    All exits share the final norm and the head.

    Attributes:
        dropout: how likely the last layer is skipped, for each row of a batch by itself.
        growing_steps: over so many updates dropout grows from nothing, as in pre-training; 0: it
            is whole from the start, as in fine-tuning.
        exit_scale: how much early exits count; 0 leaves the last layer's loss alone.
        rotation: every so many-th exit has its turn at an update.

    Raises:
        ValueError: a dropout outside [0, 1), a negative scale or count, or a rotation below 1.
    """

    dropout: float = 0.1
    growing_steps: int = 0
    exit_scale: float = 0.2
    rotation: int = 2

    def __post_init__(self):
        if not (0 <= self.dropout < 1 and self.exit_scale >= 0 and self.growing_steps >= 0):
            raise ValueError(
                f"layer dropout {self.dropout}, exit_scale {self.exit_scale} and growing_steps "
                f"{self.growing_steps}: give a dropout in [0, 1) and nothing negative."
            )
        if self.rotation < 1:
            raise ValueError(f"rotation must be 1 (every exit each time) or more: {self.rotation}.")

    def beside(self, context: Context) -> Callable[[int], dict[str, np.ndarray]]:
        """The number of the batch, which dropout and the turn of the exits depend on."""
        rows = context.config.batch_size // context.process_count
        return lambda number: {"number": np.full((rows,), number, np.int32)}

    def loss(
        self, params: Any, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Weighted mean nats per target token of the exits whose turn it is, and the last one's."""
        number, rows = batch["number"][0], batch["tokens"].shape[0]
        rates = jnp.asarray(dropout_rates(self.model.num_layers, self.dropout), jnp.float32)
        if self.growing_steps:
            rates = rates * growth(number, self.growing_steps)
        layers = LayerChoice(rows=draw_layers(key, rates, rows))
        states = self.run(params, batch, layers=layers, all_hidden=True).hidden_states
        exits, weights = active_exits(self.model.num_layers, self.rotation, self.exit_scale, number)
        count = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
        nats = [self._nats_at(params, batch, states[exit + 1]) / count for exit in exits]
        total = sum(weight * nat for weight, nat in zip(weights, nats, strict=True))
        return jnp.asarray(total), {"weight": jnp.sum(batch["mask"]), "last": nats[-1]}

    def evaluate(self, params: Any, context: Context, policy: Any = None) -> dict[str, float]:
        """The task's own numbers, and ``nats_per_token/exit1`` and so on, after every layer."""
        found = super().evaluate(params, context, policy)
        add = _exits_step(self, DTYPES[context.config.compute_dtype])
        sums, count = np.zeros(self.model.num_layers), 0.0
        reading = self._reading(context, self.evaluation_split, self.evaluation_rows)
        for batch in evaluation_batches(reading):
            nats, targets = add(params, context.put(batch), policy)
            sums, count = sums + np.asarray(nats), count + float(targets)
        exits = {f"nats_per_token/exit{i}": float(x) for i, x in enumerate(sums / count, 1)}
        return found | exits

    def exit_nats(
        self, params: Any, batch: dict[str, Array], policy: Any = None
    ) -> Float[Array, " layers"]:
        """Sum of nats over a batch's targets after every layer; nothing is dropped."""
        states = self.run(params, batch, policy=policy, all_hidden=True).hidden_states
        return jnp.stack([self._nats_at(params, batch, state) for state in states[1:]])

    def _nats_at(self, params: Any, batch: dict[str, Array], state: Array) -> Float[Array, ""]:
        hidden = normalize(state, self.trunk(params).final_norm, self.model.norm_eps)
        return token_cross_entropy(hidden, self.head(params), batch["targets"], batch["mask"])


@functools.cache
def _exits_step(task: LayerSkipTask, dtype: Any) -> Any:
    """The compiled sums of one batch; kept, so that every evaluation of a run shares it."""

    def sums(params: Any, batch: dict[str, Array], policy: Any) -> tuple[Array, Array]:
        cut = cast(params, dtype, task.full_precision)
        return task.exit_nats(cut, batch, policy), jnp.sum(batch["mask"])

    return jax.jit(sums)
