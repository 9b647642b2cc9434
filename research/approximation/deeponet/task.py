"""Training tasks: a DeepONet, or a fully connected network, on operator data kept on the device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from models import deeponet, fnn, pod
from models.deeponet import DeepONetConfig, Fixed
from models.fnn import FNNConfig
from models.params import Constant, ParamSpec
from research.approximation.deeponet.data import (
    Aligned,
    Cartesian,
    OperatorData,
    choose,
    draw_rows,
    take,
)
from research.approximation.deeponet.load import FileData
from research.approximation.deeponet.objective import Batch, error_metrics, predict, squared_error
from research.approximation.deeponet.problems import NAMED_INPUTS, OdeProblem, make_problem
from train.config import build
from train.task import BaseTask, Context

EVALUATED = 2_000_000
"""Values that are predicted at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataTask(BaseTask):
    """Data, batches and evaluation, for any network that maps functions and queries to values.

    ``config.batch_size`` counts functions (rows, if each has one query); that of all training
    functions is full-batch training, and the data then never move.

    Attributes:
        problem: ``{"name": one of problems.PROBLEMS, field: ...}``, or ``{"name": "file", ...}``
            with the fields of :class:`load.FileData`.
        functions: for training.
        test_functions: new ones, for evaluation.
        queries: random queries of each training function; 0: all of the grid, shared.
        test_queries: likewise for evaluation.
        batch_queries: queries of a batch, if they are shared; 0: all.
        normalise: take the outputs' mean and scale from the training data into the network.
        data_seed: of functions and queries.
        given: (training, test) data from Python, in place of a problem.
    """

    problem: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    functions: int = 0
    test_functions: int = 0
    queries: int = 1
    test_queries: int = 1
    batch_queries: int = 0
    normalise: bool = False
    data_seed: int = 0
    given: Any = None

    @functools.cached_property
    def sets(self) -> tuple[OperatorData, OperatorData]:
        """(training, test) data."""
        if self.given is not None:
            return self.given
        fields = dict(self.problem)
        if fields.get("name") == "file":
            del fields["name"]
            files = build(FileData, fields, "problem")
            found = files.load(self.functions, self.test_functions, self.data_seed)
            draws = [np.random.default_rng([self.data_seed, part]) for part in (0, 1)]
            wanted = (self.queries, self.test_queries)
            picked = [
                x.pick(r, q) if q else x for x, r, q in zip(found, draws, wanted, strict=True)
            ]
            return picked[0], picked[1]
        train, test = (
            self._draw(part, count, queries)
            for part, (count, queries) in enumerate(
                ((self.functions, self.queries), (self.test_functions, self.test_queries))
            )
        )
        return train, test

    def _draw(self, part: int, count: int, queries: int) -> OperatorData:
        problem = make_problem(self.problem)
        rng = np.random.default_rng([self.data_seed, part])
        if not queries:
            return problem.cartesian(rng, count)
        found = problem.batched(rng, count, queries)
        return found.aligned() if queries == 1 else found

    def predict(self, params: Any, form: str, batch: Batch) -> Array:
        """The network's outputs for a batch."""
        raise TypeError(f"{type(self).__name__} must define predict().")

    def arrays(self, train: OperatorData) -> Batch:
        """The training data as they lie on the device."""
        return arrays_of(train)

    def predict_resident(self, params: Any, form: str, batch: Batch) -> Array:
        """The network's outputs for a batch out of :meth:`arrays`."""
        return self.predict(params, form, batch)

    def fixed(self) -> Fixed | None:
        """What the network takes from the training data; None: the specs' values."""
        raise TypeError(f"{type(self).__name__} must define fixed().")

    def init(self, key: jax.Array, data: Any, context: Context) -> Any:
        """Fresh weights; what is fixed comes from the training data."""
        params = super().init(key, data, context)
        fixed = self.fixed()
        if fixed is None:
            return params
        placed = jax.device_put(fixed, jax.tree.map(lambda x: x.sharding, params.fixed))
        return dataclasses.replace(params, fixed=placed)

    def partition(self, params: Any) -> tuple[Any, Any]:
        """What comes from data is not trained."""
        return dataclasses.replace(params, fixed=None), params.fixed

    def combine(self, trained: Any, rest: Any) -> Any:
        """See :class:`train.task.Task`."""
        return dataclasses.replace(trained, fixed=rest)

    def scale(self, params: Any) -> Float[Array, " c"]:
        """Units of the loss."""
        return params.fixed.scale

    def resident(self, context: Context) -> Batch:
        """The training data, functions over the mesh's data axes.

        Raises:
            ValueError: a batch size larger than the data.
        """
        train = self.sets[0]
        n = len(train.u)
        if context.config.batch_size > n:
            raise ValueError(
                f"config.batch_size {context.config.batch_size} exceeds the {n} training "
                "functions: lower it, or make more data."
            )
        if self.batch_queries and not isinstance(train, Cartesian):
            raise ValueError("batch_queries needs shared queries: give queries=0, or leave it 0.")
        rows = context.batch_sharding(n)
        whole = NamedSharding(context.mesh, PartitionSpec())
        shared = ("y",) if isinstance(train, Cartesian) else ()
        return {
            name: jax.device_put(value, whole if name in shared else rows)
            for name, value in self.arrays(train).items()
        }

    def generate(self, key: jax.Array, rows: int, resident: Batch) -> Batch:
        """All of the data, or random functions (and shared queries) of it."""
        if isinstance(self.sets[0], Cartesian):
            return cartesian_batch(key, rows, self.batch_queries, resident)
        chosen = draw_rows(key, resident["u"].shape[0], rows)
        return {name: choose(value, chosen) for name, value in resident.items()}

    def loss(
        self, params: Any, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error in units of the scale, and ``mse`` in those of the data."""
        predicted = self.predict_resident(params, form_of(self.sets[0]), batch)
        scale = self.scale(params)
        loss, weight = squared_error(predicted, batch, scale)
        return loss, {"weight": weight, "mse": squared_error(predicted, batch, 0 * scale + 1)[0]}

    def evaluate(self, params: Any, context: Context) -> dict[str, float]:
        """Errors on test functions; for a differential equation also on four named inputs."""
        found = self.errors(params, self.sets[1])
        drawn = self.given is None and self.problem.get("name") != "file"
        problem = make_problem(self.problem) if drawn else None
        if isinstance(problem, OdeProblem):
            named = problem.named()
            for i, name in enumerate(NAMED_INPUTS):
                one = self.errors(params, take(named, slice(i, i + 1)))
                found[f"relative_l2/{name}"] = one["relative_l2"]
        return found

    def errors(self, params: Any, test: OperatorData) -> dict[str, float]:
        """See :func:`objective.error_metrics`."""
        outputs = self.outputs(params, test)
        mask = getattr(test, "mask", np.ones(test.s.shape[: outputs.ndim], bool))
        return error_metrics(outputs, test.s, mask)

    def outputs(self, params: Any, test: OperatorData) -> np.ndarray:
        """Predictions, a part of the functions at a time."""
        form = form_of(test)
        run = jax.jit(lambda p, batch: self.predict(p, form, batch))
        step = max(1, EVALUATED // max(1, int(np.prod(test.s.shape[1:]))))
        return np.concatenate(
            [
                np.asarray(run(params, arrays_of(take(test, slice(i, i + step)))))
                for i in range(0, len(test.u), step)
            ]
        )


def arrays_of(data: OperatorData) -> Batch:
    """The arrays of a data set by name."""
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}


def form_of(data: OperatorData) -> str:
    """Which form of the network fits the data."""
    if isinstance(data, Aligned):
        return "aligned"
    return "cartesian" if isinstance(data, Cartesian) else "batched"


def cartesian_batch(key: jax.Array, functions: int, queries: int, resident: Batch) -> Batch:
    """Random functions at random shared queries, made on the device; 0 queries: all.

    ``rows`` are the numbers of the queries on the grid, absent if all are taken.
    """
    total = resident["y"].shape[0]
    chosen = draw_rows(jax.random.fold_in(key, 0), resident["u"].shape[0], functions)
    points = draw_rows(jax.random.fold_in(key, 1), total, queries or total)
    batch = {
        "u": choose(resident["u"], chosen),
        "y": choose(resident["y"], points),
        "s": choose(choose(resident["s"], chosen), points, axis=1),
    }
    return batch if points is None else batch | {"rows": points}


def mean_and_scale(train: OperatorData, outputs: int) -> Fixed:
    """Mean and standard deviation of every output over the training data."""
    mask = getattr(train, "mask", np.ones(train.s.shape[:1], bool))
    values = np.asarray(train.s, np.float64)[mask].reshape(-1, outputs)
    scale = np.maximum(values.std(0), np.finfo(np.float32).tiny)
    return Fixed(jnp.asarray(values.mean(0), jnp.float32), jnp.asarray(scale, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepONetTask(DataTask):
    """A DeepONet of any form. A POD basis, mean and scale come from the training solutions."""

    model: DeepONetConfig

    def specs(self) -> deeponet.Params:
        """See :class:`train.task.Task`."""
        return deeponet.specs(self.model)

    def fixed(self) -> Fixed | None:
        """POD basis, mean and scale of the training data, or None for the specs' values.

        Raises:
            ValueError: a POD basis from data without a shared grid.
        """
        train = self.sets[0]
        if self.model.kind == "pod":
            if not isinstance(train, Cartesian):
                raise ValueError("a POD basis needs solutions on one grid: give queries=0.")
            return pod.fixed_from_solutions(self.model, train.s)
        return mean_and_scale(train, self.model.outputs) if self.normalise else None

    @functools.cached_property
    def input_basis(self) -> np.ndarray | None:
        """What all input functions of the training data are sums of; see :mod:`models.pod`."""
        return pod.input_basis(self.sets[0].u)

    def arrays(self, train: OperatorData) -> Batch:
        """The training data; functions by their coefficients, if a basis is small enough."""
        found = arrays_of(train)
        if self.input_basis is None:
            return found
        coefficients = train.u.astype(np.float64) @ self.input_basis.T
        return found | {"u": coefficients.astype(np.float32)}

    def predict(self, params: deeponet.Params, form: str, batch: Batch) -> Array:
        """See :class:`DataTask`."""
        return predict(params, self.model, form, batch)

    def predict_resident(self, params: deeponet.Params, form: str, batch: Batch) -> Array:
        """See :class:`DataTask`."""
        if self.input_basis is None:
            return self.predict(params, form, batch)
        return predict(*pod.on_coefficients(params, self.model, self.input_basis), form, batch)


@struct.dataclass
class FNNParams:
    """A network and the outputs' mean and scale."""

    net: Any
    fixed: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class FNNTask(DataTask):
    """The baseline: a fully connected network reads sensor values and query together."""

    model: FNNConfig

    def specs(self) -> FNNParams:
        """See :class:`train.task.Task`."""
        c = (self.model.widths[-1],)
        fixed = Fixed(ParamSpec(c, (None,), Constant(0.0)), ParamSpec(c, (None,), Constant(1.0)))
        return FNNParams(fnn.specs(self.model), fixed)

    def fixed(self) -> Fixed | None:
        """Mean and scale of the training data, or None for the specs' values."""
        return mean_and_scale(self.sets[0], self.model.widths[-1]) if self.normalise else None

    def predict(self, params: FNNParams, form: str, batch: Batch) -> Array:
        """See :class:`DataTask`."""
        u, y = batch["u"], batch["y"]
        if form == "cartesian":
            y = jnp.broadcast_to(y[None], (u.shape[0], *y.shape))
        if form != "aligned":
            u = jnp.broadcast_to(u[:, None], (*y.shape[:2], u.shape[-1]))
        out = fnn.forward(params.net, self.model, jnp.concatenate([u, y], axis=-1))
        lead = (1,) * (out.ndim - 1) + (-1,)
        s = params.fixed.mean.reshape(lead) + params.fixed.scale.reshape(lead) * out
        return s[..., 0] if self.model.widths[-1] == 1 else s
