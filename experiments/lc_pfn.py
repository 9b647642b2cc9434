"""LC-PFN against its posterior, simple baselines, and real curves.

    python -m experiments.curve_runs --out=runs/curves.npz
    python -m experiments.lc_pfn --model=DIR --curves=runs/curves.npz

Every seed trains the protocol's small network (64 channels, 48,000 curves) and keeps it as it was
after some of its updates, in ``--folder``, from where a second run goes on; every seed also draws
its own held-out curves, contexts and orders of runs. ``--model`` is a trained network of any size
to stand beside them (empty: none). ``--curves`` are recorded curves, see
:mod:`experiments.curve_files`; the last network, or ``--model``, extrapolates them.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from configs import lc_pfn as config_module
from experiments import lc_pfn_prior as on_prior
from experiments import lc_pfn_real as on_real
from experiments import record, statements
from experiments.curve_files import CurveSet, load_curves
from experiments.lc_pfn_statements import SHIPPED, STATEMENTS, stage_name
from experiments.settings import from_flags
from models import lc_pfn_io
from models.lc_pfn_io import LCPFN
from models.sharding import make_mesh
from research.approximation.lc_pfn.baselines import BASELINES
from research.approximation.lc_pfn.prior import sample_prior
from train import loop
from train.config import TrainConfig, build
from train.trained import read_trained

PROTOCOL = {"width": 64, "layers": 3, "heads": 4, "ffn": 128, "buckets": 200}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; see the flags."""

    model: str
    folder: str
    seeds: tuple[int, ...]
    stages: tuple[int, ...]
    batch: int
    cutoffs: tuple[int, ...]
    test_curves: int
    train_curves: int
    contexts: int
    importance_draws: int
    mcmc_curves: int
    mcmc_steps: int
    curves: tuple[str, ...]
    tasks: int
    runs: int
    orders: int
    confidence: float


def train_stages(settings: Settings, seed: int) -> dict[str, LCPFN]:
    """The protocol's network of one seed after each stage; trained only as far as it is not yet."""
    config = config_module.get_config()
    config.seed = seed
    config.task.network.update(PROTOCOL)
    config.steps, config.batch_size = max(settings.stages), settings.batch
    config.steps_per_call = int(np.gcd.reduce([10, *settings.stages]))
    config.optimizer.warmup_steps = config.steps // 10
    config.log_every = config.checkpoint_every = int(np.gcd.reduce(settings.stages))
    config.keep_checkpoints = config.steps // config.checkpoint_every
    config.evaluate_every = 0
    folder = pathlib.Path(settings.folder) / f"seed{seed}"
    loop.train(build(TrainConfig, config.to_dict()), folder, make_mesh("", jax.devices()[:1]))
    networks = {}
    for step in settings.stages:
        trained = read_trained(folder, step)
        borders = jnp.asarray(trained.task.borders)
        networks[stage_name(step)] = LCPFN(trained.params, borders, trained.task.network)
    return networks


def run_seed(settings: Settings, seed: int, sets: Sequence[CurveSet]) -> dict[str, dict[str, Any]]:
    """Numbers of every method on one seed's curves."""
    networks = train_stages(settings, seed)
    if settings.model:
        networks[SHIPPED] = lc_pfn_io.load(settings.model)
    test, train = (
        np.asarray(sample_prior(jax.random.key(1000 * (i + 1) + seed), n).noisy, np.float64)
        for i, n in enumerate((settings.test_curves, settings.train_curves))
    )
    posterior = on_prior.reference(3000 + seed, settings.contexts, settings.importance_draws)
    rows: dict[str, dict[str, Any]] = {}
    for name, network in networks.items():
        print(f"{name}, seed {seed}", flush=True)
        rows[name] = on_prior.measure_network(network, test, settings.cutoffs)
        rows[name] |= on_prior.gap(network, *posterior)
    for name in BASELINES:
        rows[name] = on_prior.measure_baseline(name, train, test, settings.cutoffs)
    best = list(networks.values())[-1]
    print(f"mcmc, seed {seed}", flush=True)
    few = slice(settings.mcmc_curves)
    context, truth, sharp = posterior[0][few], posterior[1][few], posterior[2].of(few)
    rows["mcmc"] = on_prior.chains(best, context, truth, sharp, settings.mcmc_steps)
    rows["mcmc"]["speed_ratio"] = rows["mcmc"]["seconds"] / rows["mcmc"]["network_seconds"]
    rows["sampler"] = {"curves_per_minute": on_prior.sampler_rate()}
    if sets:
        print(f"recorded curves, seed {seed}", flush=True)
        rows |= run_recorded(settings, seed, best, sets, train)
    return rows


def run_recorded(
    settings: Settings, seed: int, network: LCPFN, sets: Sequence[CurveSet], train: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Likelihoods and stopping on recorded curves, a row per predictor and per rule."""
    chosen = on_real.choose(sets, settings.tasks, settings.runs, seed)
    rows: dict[str, dict[str, Any]] = {}
    found = on_real.likelihood(network, chosen, train, settings.cutoffs)
    for name, values in found.items():
        rows[f"recorded {name}"] = {
            f"log_likelihood@{cutoff}": v
            for cutoff, v in zip(settings.cutoffs, values, strict=True)
            if v is not None
        }
    saved = on_real.stopping(network, chosen, settings.orders, settings.confidence, seed)
    return rows | {f"stop {name}": numbers for name, numbers in saved.items()}


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row per method, with a sample per seed of every number."""
    sets = [one for path in settings.curves for one in load_curves(path)]
    per_seed = [run_seed(settings, seed, sets) for seed in settings.seeds]
    rows: list[dict[str, Any]] = []
    for method in per_seed[0]:
        row: dict[str, Any] = {"method": method}
        for name, values in on_prior.collect([r[method] for r in per_seed]).items():
            nested = isinstance(values[0], list)
            row[name] = [record.sample(v) for v in values] if nested else record.sample(values)
        rows.append(row)
    return [*rows, show_fans(settings, sets)]


def show_fans(settings: Settings, sets: Sequence[CurveSet]) -> dict[str, Any]:
    """Examples for the figures: curves of the prior, and recorded ones if there are any."""
    if settings.model:
        network = lc_pfn_io.load(settings.model)
    else:
        network = list(train_stages(settings, settings.seeds[0]).values())[-1]
    curves = np.asarray(sample_prior(jax.random.key(4000), 3).noisy, np.float64)
    recorded = [one.curves[len(one.curves) // 2] for one in sets[:3]]
    return {
        "method": "fans",
        "prior": on_prior.fans(network, curves, (10, 40)),
        "recorded": [
            fan for one in recorded for fan in on_prior.fans(network, one[None], (10, 40))
        ],
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as plain text, a line per number."""
    lines = []
    for row in rows:
        for name, sample in row.items():
            if isinstance(sample, dict) and "mean" in sample:
                lines.append(f"{row['method']:20} {name:20} {sample['mean']:.4g}")
            elif isinstance(sample, list) and isinstance(sample[0], dict) and "mean" in sample[0]:
                means = " ".join(f"{s['mean']:.4g}" for s in sample)
                lines.append(f"{row['method']:20} {name:20} {means}")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    for name in ("stages", "cutoffs"):
        numbers = tuple(int(x) for x in getattr(settings, name))
        settings = dataclasses.replace(settings, **{name: numbers})
    rows = run(settings)
    print(show(rows))
    timing = {"memory_bandwidth_gb_s": record.memory_bandwidth()}
    name = record.name_of("lc_pfn", None, flags.FLAGS.label)
    statements.conclude(name, rows, STATEMENTS, settings, timing)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "", "Folder of a trained LC-PFN; empty: the small ones alone.")
    flags.DEFINE_string("folder", "runs/lc_pfn_protocol", "Where the small networks train.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of trainings, curves, contexts and orders.")
    flags.DEFINE_list("stages", ["100", "500", "1500"], "Updates after which one is measured.")
    flags.DEFINE_integer("batch", 32, "Curves per update.")
    flags.DEFINE_list("cutoffs", ["5", "10", "20", "40", "80"], "Numbers of points seen.")
    flags.DEFINE_integer("test_curves", 256, "Held-out curves of the prior.")
    flags.DEFINE_integer("train_curves", 10_000, "Curves that the baselines are fitted to.")
    flags.DEFINE_integer("contexts", 60, "Contexts for importance sampling.")
    flags.DEFINE_integer("importance_draws", 2_000_000, "Draws, shared by the contexts.")
    flags.DEFINE_integer("mcmc_curves", 5, "Contexts for the ensemble.")
    flags.DEFINE_integer("mcmc_steps", 500, "Steps of its 50 walkers.")
    flags.DEFINE_list("curves", [], "Files of recorded curves (.npz).")
    flags.DEFINE_integer("tasks", 12, "Tasks of recorded curves, drawn by the seed.")
    flags.DEFINE_integer("runs", 30, "Runs of each.")
    flags.DEFINE_integer("orders", 100, "Random orders of the runs of a task.")
    flags.DEFINE_float("confidence", 0.95, "A run stops if that surely nothing better comes.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
