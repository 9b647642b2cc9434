"""What every task with SeqPE adds to its own loss: settings, pivots, and the encoder's pass."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from models import seqpe
from research.context.seqpe.objective import Pass, Weights, encoder_pass
from research.context.seqpe.samplers import Sampling
from train.data.epochs import Epochs
from train.task import Context

ENCODER = ".encoder"  # its name in the parameters of a task
GROUP = "encoder"  # and in the config: it is clipped by itself


@dataclasses.dataclass(frozen=True)
class Regulariser:
    """Contrastive and transfer loss for the encoder.

    Attributes:
        sampling, weights: how much is drawn, and how much it counts.
        pivots: B, pivots and distilled windows of a step; every position is one once per epoch.
        shift_rows: different windows of a shifted step; the rows of the batch take them in turn.
    """

    sampling: Sampling = Sampling()
    weights: Weights = Weights()
    pivots: int = 16
    shift_rows: int = 16

    def __post_init__(self):
        if self.pivots < 1 or self.shift_rows < 1:
            raise ValueError(
                f"pivots is {self.pivots} and shift_rows {self.shift_rows}: give 1 or more."
            )

    def check(self, encoder: seqpe.Config, window: tuple[int, ...]) -> None:
        """Raise ValueError unless all draws exist and heads divide the vectors."""
        self.sampling.check(encoder, window)
        if self.weights.per_head and encoder.out % encoder.heads:
            raise ValueError(
                f"{encoder.heads} heads do not divide vectors of width {encoder.out}: set "
                "weights.per_head to False, or change one."
            )

    def beside(
        self, encoder: seqpe.Config, context: Context
    ) -> Callable[[int], dict[str, np.ndarray]]:
        """This process's pivots of batch number ``i``.

        Raises:
            ValueError: processes or microbatches do not divide the pivots.
        """
        parts = context.process_count * context.config.microbatches
        if self.pivots % parts:
            raise ValueError(
                f"pivots {self.pivots} cannot be split into {parts} parts (processes times "
                "microbatches): make it a multiple."
            )
        order = Epochs(encoder.axis_length**encoder.axes, context.config.seed)
        own = self.pivots // context.process_count
        shape = (encoder.axis_length,) * encoder.axes

        def pivots(number: int) -> dict[str, np.ndarray]:
            first = number * self.pivots + context.process_index * own
            ranks = order.run(first, own)
            return {"pivots": np.stack(np.unravel_index(ranks, shape), -1).astype(np.int32)}

        return pivots

    def run(
        self,
        params: seqpe.Params,
        encoder: seqpe.Config,
        window: tuple[int, ...],
        pivots: Array,
        batch: int,
        key: Key[Array, ""],
    ) -> Pass:
        """The encoder's pass of a step with ``batch`` rows, whose vectors have one table for each.

        Raises:
            ValueError: the shifted windows do not divide the rows.
        """
        rows = min(self.shift_rows, batch)
        if batch % rows:
            raise ValueError(
                f"{batch} rows cannot share {rows} shifted windows: make shift_rows a divisor."
            )
        out = encoder_pass(params, encoder, self.sampling, self.weights, window, pivots, rows, key)
        repeated = jnp.tile(out.window, (batch // rows, 1, 1))
        return dataclasses.replace(out, window=repeated)
