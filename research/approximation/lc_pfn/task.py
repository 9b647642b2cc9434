"""Training LC-PFN on curves that are drawn from the prior inside the compiled step."""

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from models import lc_pfn, lc_pfn_io
from models.params import Constant, ParamSpec, init, shardings
from ops import bar_distribution as bar
from research.approximation.lc_pfn.prior import PRIOR_FAMILIES, check_families, sample_prior
from train.config import OptimizerConfig, TrainConfig
from train.task import BaseTask, Context


@struct.dataclass
class TaskParams:
    """The network, which is trained, and the borders of its bins, which are not."""

    network: lc_pfn.Params
    borders: Any  # (buckets + 1,)


@struct.dataclass
class Curves:
    """A batch: noisy values at epochs 1, 2, ... and how many of each row's are context."""

    y: Any  # (b, seq_len)
    num_context: Any  # (b,)


@dataclasses.dataclass(frozen=True)
class LCPFNTask(BaseTask):
    """Mean negative log-likelihood of the points after a random cut-off.

    Attributes:
        network: shape of the network.
        families, kind: of the prior, see :mod:`research.approximation.lc_pfn.prior`.
        cutoff: ``row`` draws the number of context points for every row, ``batch`` one for the
            whole batch as the paper does. The objective is the same, the mean over cut-offs of the
            mean over the later points; rows of their own estimate it with less variance.
        border_curves: curves of the prior whose noisy values make the borders.
        border_seed: their seed. The borders depend on nothing else, so that any run of a task has
            the same.
        epoch_steps: updates per epoch of the released code's schedule, which is constant within an
            epoch and 0 in the first; None: the config's schedule, update by update.
        eval_curves: held-out curves, the same at every evaluation.
        eval_cutoffs: numbers of context points at which they are cut.

    Raises:
        ValueError: an unknown prior or kind of cut-off, or an evaluation at no later point.
    """

    network: lc_pfn.Config
    families: tuple[str, ...] = PRIOR_FAMILIES
    kind: str = "peaked"
    cutoff: str = "row"
    border_curves: int = 10_000
    border_seed: int = 0
    epoch_steps: int | None = None
    eval_curves: int = 256
    eval_cutoffs: tuple[int, ...] = (5, 10, 20, 40, 80)

    about: ClassVar[str] = "LC-PFN, which extrapolates learning curves"

    def __post_init__(self):
        check_families(self.families, self.kind)
        if self.cutoff not in ("row", "batch"):
            raise ValueError(f"task.cutoff is {self.cutoff!r}: choose row or batch.")
        if not all(1 <= c < self.network.seq_len for c in self.eval_cutoffs):
            raise ValueError(
                f"task.eval_cutoffs {self.eval_cutoffs} must lie from 1 to "
                f"{self.network.seq_len - 1}, so that at least one later point is left."
            )

    @functools.cached_property
    def borders(self) -> np.ndarray:
        """Borders of the bins: equal shares of the prior's values."""
        with jax.ensure_compile_time_eval():  # the first use may be inside a compiled function
            values = self._heldout(0, self.border_curves)
        return bar.fit_borders(values, self.network.buckets)

    def specs(self) -> TaskParams:
        """The network and the borders."""
        borders = ParamSpec((self.network.buckets + 1,), (None,), Constant(0.0))
        return TaskParams(lc_pfn.specs(self.network), borders)

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> TaskParams:
        """Fresh weights, and borders from curves of the prior."""
        placed = shardings(self.specs(), context.mesh, context.rules)
        network = init(lc_pfn.specs(self.network), key, placed.network)
        return TaskParams(network, jax.device_put(self.borders, placed.borders))

    def partition(self, params: TaskParams) -> tuple[Any, Any]:
        """The network is trained, the borders are not."""
        return params.network, params.borders

    def combine(self, trained: Any, rest: Any) -> TaskParams:
        """The inverse of :meth:`partition`."""
        return TaskParams(trained, rest)

    def generate(self, key: jax.Array, rows: int, resident: Any) -> Curves:
        """Fresh curves and cut-offs from 1 to the last but one epoch."""
        curves_key, cutoff_key = jax.random.split(key)
        count = rows if self.cutoff == "row" else 1
        cutoffs = jax.random.randint(cutoff_key, (count,), 1, self.network.seq_len)
        return Curves(self._sample(curves_key, rows), jnp.broadcast_to(cutoffs, (rows,)))

    def loss(
        self, params: TaskParams, batch: Curves, key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean over rows of the mean negative log-likelihood of a row's later points.

        With one cut-off for all rows that is the mean over all later points of the batch. The
        borders are those of ``params`` in float32: the loop may compute in bfloat16, where
        neighbours among them would coincide.
        """
        borders = jnp.asarray(self.borders)
        each = _log_likelihood(
            params.network, self.network, borders, batch.y, batch.num_context, key
        )
        return -jnp.mean(each), {}

    def evaluate(self, params: TaskParams, context: Context) -> dict[str, float]:
        """Mean log-likelihood, in nats, of all later points of held-out curves per cut-off."""
        count = context.process_count
        curves = self._heldout(1, self.eval_curves)[context.process_index :: count]
        curves = context.put(np.asarray(curves[: self.eval_curves // count]))

        @jax.jit
        def measure(params: TaskParams, y: Array, cutoff: Array) -> Array:
            cut = jnp.full(y.shape[:1], cutoff)
            each = _log_likelihood(params.network, self.network, params.borders, y, cut)
            return jnp.mean(each)

        return {
            f"log_likelihood/{cutoff}": float(measure(params, curves, cutoff))
            for cutoff in self.eval_cutoffs
        }

    def optimizer(self, config: TrainConfig, specs: Any) -> optax.GradientTransformation:
        """The config's optimiser, or AdamW under the released code's schedule by epoch."""
        if self.epoch_steps is None:
            return super().optimizer(config, specs)
        return by_epoch(config.optimizer, config.steps, self.epoch_steps)

    def save(self, network: Any, directory: str | pathlib.Path, dtype: Any) -> None:
        """Write trained weights with the borders (see :mod:`models.lc_pfn_io`)."""
        model = lc_pfn_io.LCPFN(network, jnp.asarray(self.borders), self.network)
        lc_pfn_io.save(directory, model, dtype)

    def _heldout(self, part: int, n: int) -> Float[Array, "n t"]:
        return self._sample(jax.random.fold_in(jax.random.key(self.border_seed), part), n)

    def _sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n t"]:
        return sample_prior(key, n, self.network.seq_len, self.families, self.kind).noisy


def by_epoch(config: OptimizerConfig, steps: int, epoch_steps: int) -> optax.GradientTransformation:
    """AdamW whose rate changes once per epoch: linear from 0, then half a cosine down to 0.

    ``config.warmup_steps`` counts updates. The rate in epoch e is that of a schedule over epochs at
    e, so that the first epoch changes nothing and the last still has a rate above 0.

    Raises:
        ValueError: steps that are no whole number of epochs, or an optimiser that this is not.
    """
    if steps % epoch_steps or config.warmup_steps % epoch_steps:
        raise ValueError(
            f"{steps} steps and a warm-up of {config.warmup_steps} must be whole epochs of "
            f"{epoch_steps}: change task.epoch_steps or the numbers of steps."
        )
    if config.name != "adamw" or config.schedule != "cosine" or config.final_fraction:
        raise ValueError(
            "task.epoch_steps goes with adamw and a cosine down to 0: set optimizer.name to adamw, "
            "schedule to cosine and final_fraction to 0, or leave epoch_steps out."
        )
    epochs, warmup = steps // epoch_steps, config.warmup_steps // epoch_steps

    def rate(step: Any) -> Any:
        epoch = step // epoch_steps
        done = jnp.clip((epoch - warmup) / max(epochs - warmup, 1), 0.0, 1.0)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return config.learning_rate * jnp.where(epoch < warmup, epoch / max(warmup, 1), falling)

    return optax.adamw(
        rate, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay
    )


def _log_likelihood(
    network: lc_pfn.Params,
    cfg: lc_pfn.Config,
    borders: Float[Array, " m"],
    y: Float[Array, "b t"],
    num_context: Int[Array, " b"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, " b"]:
    """Mean log-likelihood of each row's points after its context, at epochs 1, 2, ..."""
    length = y.shape[1]
    x = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=y.dtype)[None], y.shape)
    logits = lc_pfn.forward(network, cfg, x, y, num_context, key)
    later = jnp.arange(length)[None] >= num_context[:, None]
    each = bar.log_prob(borders, logits, y)
    return jnp.sum(jnp.where(later, each, 0.0), 1) / (length - num_context)
