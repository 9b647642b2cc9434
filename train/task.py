"""What can be trained: the ``Task`` protocol, and the defaults that most tasks keep."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import params as model_params
from models.sharding import ShardingRules
from train.config import TrainConfig
from train.optimizer import MAIN, make_optimizer


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a run takes place: its config, its devices, and this process among several."""

    config: TrainConfig
    mesh: Mesh
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    @property
    def process_index(self) -> int:
        """This process's number: it reads that share of each batch."""
        return jax.process_index()

    @property
    def process_count(self) -> int:
        """How many processes take part."""
        return jax.process_count()

    def batch_sharding(self, rows: int, leading: int = 0) -> NamedSharding:
        """Rows over the mesh's data and fsdp axes, after ``leading`` axes that are not split."""
        spec = self.rules.partition_spec(("batch",), (rows,), self.mesh)
        return NamedSharding(self.mesh, PartitionSpec(*([None] * leading), *spec))

    def put(self, batch: Any, leading: int = 0) -> Any:
        """This process's rows of a batch (host arrays) as arrays over all devices.

        With ``leading`` 1 the arrays are several batches stacked along a new first axis.
        """

        def place(x: np.ndarray) -> jax.Array:
            rows = x.shape[leading] * self.process_count
            shape = (*x.shape[:leading], rows, *x.shape[leading + 1 :])
            return jax.make_array_from_process_local_data(
                self.batch_sharding(rows, leading), x, shape
            )

        return jax.tree.map(place, batch)

    def place(self, params: Any, specs: Any) -> Any:
        """A copy of params in their shardings, so that the loop may donate what was loaded."""
        copied = jax.tree.map(jnp.array, params)
        return jax.device_put(copied, model_params.shardings(specs, self.mesh, self.rules))


@runtime_checkable
class Task(Protocol):
    """Something to train. Implementations are frozen dataclasses whose fields come from the config.

    Derive from :class:`BaseTask`, which has defaults for all but ``specs`` and ``loss`` (and one
    of ``data`` and ``generate``).
    """

    def specs(self) -> Any:
        """The ``ParamSpec`` tree of all parameters, frozen ones included."""
        ...

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> Any:
        """Parameters before the first update, in the shardings of the context.

        ``data`` is what :meth:`data` returned, for parameters that depend on it.
        """
        ...

    def data(self, context: Context) -> grain.IterDataset | None:
        """Batches of this process's rows, without end; None if :meth:`generate` makes them."""
        ...

    def resident(self, context: Context) -> Any:
        """Arrays that stay on the devices for the whole run, for :meth:`generate`; None for none.

        A data set that fits there is best kept there: full-batch training, or rows chosen by
        random numbers, then move nothing from the host.
        """
        ...

    def generate(self, key: jax.Array, rows: int, resident: Any) -> Any:
        """A batch made on the device, inside the compiled step, from what :meth:`resident` gave."""
        ...

    def loss(self, params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Mean loss of a batch, and scalar metrics.

        A metric named ``weight`` says how much the batch counts when several make one update (the
        number of tokens the mean is over); without it all count alike. A batch of weight 0 must
        still give a finite loss.
        """
        ...

    def evaluate(self, params: Any, context: Context) -> dict[str, float]:
        """Numbers on held-out data; runs on every process."""
        ...

    def partition(self, params: Any) -> tuple[Any, Any]:
        """(trained, rest) of a tree of the structure of :meth:`specs`.

        Only the first meets the gradient, the optimiser, the average and the checkpoint. The rest
        comes from :meth:`init` each time and is recorded by hash.
        """
        ...

    def combine(self, trained: Any, rest: Any) -> Any:
        """The inverse of :meth:`partition`."""
        ...

    def group(self, name: str) -> str:
        """The optimiser group of the trained parameter of this name (``params.path_name``)."""
        ...

    def full_precision(self, name: str) -> bool:
        """Whether the parameter of this name stays as it is under ``config.compute_dtype``.

        Names are those of the trained parameters, or of the rest, each as its own tree.
        """
        ...

    def optimizer(self, config: TrainConfig, specs: Any) -> optax.GradientTransformation:
        """The rule that turns clipped gradients of the trained parameters into updates."""
        ...


class BaseTask:
    """Defaults of :class:`Task`: everything is trained, by one group, from ``specs``' values."""

    def specs(self) -> Any:
        """See :class:`Task`."""
        raise TypeError(f"{type(self).__name__} must define specs().")

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> Any:
        """Fresh values of :meth:`specs`, born sharded."""
        specs = self.specs()
        shardings = model_params.shardings(specs, context.mesh, context.rules)
        return model_params.init(specs, key, shardings)

    def data(self, context: Context) -> grain.IterDataset | None:
        """None: batches come from :meth:`generate`."""
        return None

    def resident(self, context: Context) -> Any:
        """Nothing."""
        return None

    def generate(self, key: jax.Array, rows: int, resident: Any) -> Any:
        """An error: the task has neither data nor a generator."""
        raise TypeError(f"{type(self).__name__} must define data() or generate().")

    def evaluate(self, params: Any, context: Context) -> dict[str, float]:
        """Nothing."""
        return {}

    def partition(self, params: Any) -> tuple[Any, Any]:
        """Everything is trained."""
        return params, None

    def combine(self, trained: Any, rest: Any) -> Any:
        """The trained part is everything."""
        return trained

    def group(self, name: str) -> str:
        """One group for all."""
        return MAIN

    def full_precision(self, name: str) -> bool:
        """None does."""
        return False

    def optimizer(self, config: TrainConfig, specs: Any) -> optax.GradientTransformation:
        """The config's optimiser, per group."""
        return make_optimizer(config, specs, self.group)
