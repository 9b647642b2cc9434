"""Full-batch training steps per second of DeepONet, against DeepXDE with PyTorch in one run.

    python -m experiments.bench_deeponet

The antiderivative at the authors' defaults: 10,000 triples of 100 sensor values, branch and trunk
of 40 by 2, Adam. Ours is the compiled step of ``python -m train``, once as it is and once reading
all sensor values, without the basis that input functions share (:func:`models.pod.input_basis`).
Theirs is ``Model.train`` with its logging and testing switched off. All take their turns one after
the other, so that a machine that changes its pace changes all. Products are in full float32, as
theirs are, on a GPU too; both libraries use one if they see it. DeepXDE is in the ``bench`` extra.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from configs import deeponet as config_file
from experiments import record
from models.deeponet import DeepONetConfig
from models.sharding import make_mesh
from research.approximation.deeponet.data import Aligned
from research.approximation.deeponet.problems import make_problem
from research.approximation.deeponet.task import DeepONetTask
from train.config import TrainConfig, build
from train.state import create_state
from train.step import make_step
from train.task import Context


class AllSensors(DeepONetTask):
    """Every function by its sensor values."""

    input_basis = None  # pyright: ignore[reportAssignmentType]


class Ours:
    """The config's compiled step, 100 updates per call."""

    def __init__(self, triples: Aligned, task: type[DeepONetTask] = DeepONetTask):
        values = config_file.get_config()
        config = build(TrainConfig, values.to_dict() | {"batch_size": len(triples.u)})
        context = Context(config, make_mesh("", jax.devices()[:1]))
        named = task(given=(triples, triples), model=model_of(values))
        params = named.init(jax.random.key(0), None, context)
        trained, self.rest = named.partition(params)
        optimizer = named.optimizer(config, named.partition(named.specs())[0])
        self.state = create_state(trained, optimizer, False)
        self.resident = named.resident(context)
        self.inputs = self.resident["u"].shape[1]
        self.device = jax.devices()[0].device_kind
        self.per_call = config.steps_per_call
        step = jax.jit(make_step(named, config, optimizer, context), donate_argnums=0)
        start = time.perf_counter()
        with jax.default_matmul_precision("float32"):
            self.step = step.lower(self.state, self.rest, None, self.resident).compile()
        self.compile_seconds = time.perf_counter() - start
        self.loss = float("nan")

    def run(self, steps: int) -> None:
        """So many updates, in whole calls."""
        for _ in range(steps // self.per_call):
            self.state, metrics = self.step(self.state, self.rest, None, self.resident)
        self.loss = float(metrics["loss"][-1])


def model_of(values: Any) -> DeepONetConfig:
    """The config's network."""
    return build(DeepONetConfig, values.to_dict()["task"]["model"])


class Theirs:
    """DeepXDE's network, data and training with the PyTorch backend."""

    def __init__(self, triples: Aligned, widths: Sequence[Sequence[int]]):
        os.environ["DDE_BACKEND"] = "pytorch"
        try:
            import deepxde  # pyright: ignore[reportMissingImports]
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SystemExit(
                "the comparison needs DeepXDE and torch: pip install -e '.[bench]'."
            ) from error
        self.versions = {"deepxde": deepxde.__version__, "torch": torch.__version__}
        data = deepxde.data.Triple(
            X_train=(triples.u, triples.y), y_train=triples.s[:, None],
            X_test=(triples.u[:10], triples.y[:10]), y_test=triples.s[:10, None],
        )  # fmt: skip
        net = deepxde.nn.DeepONet(list(widths[0]), list(widths[1]), "relu", "Glorot normal")
        self.model = deepxde.Model(data, net)
        self.model.compile("adam", lr=1e-3, verbose=0)
        place = next(net.parameters()).device
        self.device = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
        self.inputs = triples.u.shape[1]
        self.loss = float("nan")

    def run(self, steps: int) -> None:
        """So many updates; tested once, at the end."""
        history, _ = self.model.train(iterations=steps, display_every=10**9, verbose=0)
        self.loss = float(np.sum(history.loss_train[-1]))


def measure(
    sides: Sequence[tuple[str, Callable[[int], None]]], steps: int, repeats: int
) -> dict[str, list[float]]:
    """Steps per second of each side, in turns, after a call that is not counted."""
    for _, run in sides:
        run(steps)
    rates: dict[str, list[float]] = {name: [] for name, _ in sides}
    for _ in range(repeats):
        for name, run in sides:
            start = time.perf_counter()
            run(steps)
            rates[name].append(steps / (time.perf_counter() - start))
    return rates


def draw_triples(n: int) -> Aligned:
    """A random time of each of ``n`` functions, as the config draws them."""
    problem = make_problem(config_file.get_config().task.problem.to_dict())
    return problem.batched(np.random.default_rng(0), n, 1).aligned()


def main(_: Sequence[str]) -> None:
    """Measure all sides and write ``experiments/results/bench_deeponet.json``."""
    triples = draw_triples(flags.FLAGS.triples)
    model = model_of(config_file.get_config())
    theirs = Theirs(triples, (model.branch, model.trunk))
    sides = {
        "longreach": Ours(triples),
        "all-sensors": Ours(triples, AllSensors),
        "deepxde": theirs,
    }
    before = os.getloadavg()[0]
    runs = [(name, side.run) for name, side in sides.items()]
    rates = measure(runs, flags.FLAGS.steps, flags.FLAGS.repeats)
    rows = [
        {
            "side": name,
            "device": side.device,
            "inputs": side.inputs,
            "steps_per_second": record.sample(rates[name]),
            "ours_over_this": max(rates["longreach"]) / max(rates[name]),
            "final_loss": side.loss,
        }
        for name, side in sides.items()
    ]
    for row in rows:
        rate = row["steps_per_second"]
        print(
            f"{row['side']:11} {rate['max']:8.1f} steps/s (mean {rate['mean']:.1f}), "
            f"{row['inputs']} inputs a row, on {row['device']}, "
            f"longreach over this {row['ours_over_this']:.2f}"
        )
    timing = {
        "bandwidth_gb_s": record.memory_bandwidth(),
        "load_average_before": before,
        "compile_seconds": sides["longreach"].compile_seconds,
    }
    config = {"triples": len(triples.u), "steps": flags.FLAGS.steps, **theirs.versions}
    if flags.FLAGS.write:
        record.save(flags.FLAGS.result, rows, config=config, seeds=[0], timing=timing)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_integer("triples", 10_000, "Rows of the full batch.", lower_bound=1)
    flags.DEFINE_integer("steps", 500, "Updates of each turn, a multiple of 100.", lower_bound=100)
    flags.DEFINE_integer("repeats", 5, "Turns of each side.", lower_bound=1)
    flags.DEFINE_bool("write", True, "Write the result file.")
    flags.DEFINE_string("result", "bench_deeponet", "Name of the result file.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
