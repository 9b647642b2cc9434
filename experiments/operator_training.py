"""Training many small operator networks quickly: the whole run of every seed in one program.

The tasks are those of ``python -m train`` (their batches, losses and metrics), the optimiser is
Adam at a constant or cosine rate; only the loop around them differs, because here a step takes
less time than the general loop's bookkeeping.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import defaults
from experiments import record
from models.sharding import make_mesh
from research.approximation.deeponet.data import Cartesian
from research.approximation.deeponet.objective import error_metrics
from research.approximation.deeponet.task import DataTask
from train.config import TrainConfig, build
from train.task import Context

CHUNK = 500
"""Updates per call: a run can be watched, and its compiled program is the same for any length."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, on how many functions at a time (0: all), at which rate."""

    steps: int
    batch: int = 0
    learning_rate: float = 1e-3
    cosine: bool = False  # to a hundredth at the end; else constant


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network of one seed."""

    task: DataTask
    params: Any
    train_mse: float
    seconds: float  # without compilation

    def errors(self) -> dict[str, float]:
        """On the task's test functions."""
        return self.task.errors(self.params, self.task.sets[1])


def context(batch: int = 1) -> Context:
    """One device, and the default settings."""
    values = defaults.training()
    values.task.name = "-"
    values.batch_size = batch
    return Context(build(TrainConfig, values.to_dict()), make_mesh("", jax.devices()[:1]))


def train(tasks: Sequence[DataTask], schedule: Schedule) -> list[Trained]:
    """Train one network per task. Tasks differ in their seeds only, and share one program.

    Raises:
        FloatingPointError: the loss of a run is not finite at its end.
    """
    run: Any = None
    trained = []
    for task in tasks:
        where = context()
        resident = task.resident(where)
        rows = schedule.batch or resident["u"].shape[0]
        params = task.init(jax.random.key(task.data_seed), None, where)
        parts = task.partition(params)
        optimizer = _optimizer(schedule)
        state = (parts[0], optimizer.init(parts[0]))
        key = jax.random.key(1000 + task.data_seed)
        if run is None:
            run = _program(task, optimizer, rows, schedule.steps).lower(
                state, parts[1], resident, key, jnp.zeros((), jnp.int32)
            ).compile()  # fmt: skip
        start = time.perf_counter()
        for first in range(0, schedule.steps, CHUNK):
            state, mse = run(state, parts[1], resident, key, jnp.asarray(first, jnp.int32))
        final = float(mse)
        seconds = time.perf_counter() - start
        if not jnp.isfinite(final):
            raise FloatingPointError(f"training ended with a loss of {final}: lower the rate.")
        trained.append(Trained(task, task.combine(state[0], parts[1]), final, seconds))
    return trained


def _optimizer(schedule: Schedule) -> optax.GradientTransformation:
    if schedule.cosine:
        return optax.adam(optax.cosine_decay_schedule(schedule.learning_rate, schedule.steps, 0.01))
    return optax.adam(schedule.learning_rate)


def _program(task: DataTask, optimizer: optax.GradientTransformation, rows: int, steps: int) -> Any:
    """``CHUNK`` updates from number ``first`` on; those beyond ``steps`` do nothing."""

    def call(state: Any, rest: Any, resident: Any, root: Any, first: Any) -> Any:
        def update(i: Any, carry: Any) -> Any:
            (params, moments), _ = carry
            key = jax.random.fold_in(root, i)
            batch = task.generate(key, rows, resident)

            def loss(p: Any) -> Any:
                return task.loss(task.combine(p, rest), batch, key)

            (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), metrics["mse"]

        last = jnp.minimum(first + CHUNK, steps)
        return jax.lax.fori_loop(first, last, update, (state, jnp.zeros(())))

    return jax.jit(call, donate_argnums=0)


Run = dict[str, float]


def runs_of(trained: Sequence[Trained]) -> list[Run]:
    """Errors of training and test, and seconds, of every seed."""
    return [{"train_mse": run.train_mse, "seconds": run.seconds, **run.errors()} for run in trained]


def solved(predict: Callable[[Any], Any], fitted: Cartesian, test: Cartesian) -> Run:
    """Errors of a map from sensor values to the whole grid."""
    flat = lambda s: s.reshape(len(s), -1)
    train_mse = float(np.mean(np.square(predict(fitted.u) - flat(fitted.s))))
    return {"train_mse": train_mse, **errors_of(predict(test.u), flat(test.s))}


def errors_of(predicted: np.ndarray, s: np.ndarray) -> Run:
    """Error metrics of values without padding."""
    return error_metrics(predicted, s, np.ones(s.shape, bool))


def summarise(name: str, runs: Sequence[Run], **more: Any) -> dict[str, Any]:
    """One row of a table, printed: what every seed reached."""
    row = {"method": name, **more}
    row |= record.samples(runs)
    print(show([row]), flush=True)
    return row


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    lines = []
    for r in rows:
        seconds = f"{r['seconds']['mean']:6.1f} s" if "seconds" in r else ""
        order = f"  order {r['order']['mean']:.2f}" if "order" in r else ""
        lines.append(
            f"{r['method']:22} train {r['train_mse']['mean']:9.2e}  test {r['mse']['mean']:9.2e}  "
            f"relative {r['relative_l2']['mean']:8.4f} {seconds}{order}"
        )
    return "\n".join(lines)
