"""The main comparison: drafters trained and measured on one frozen model, losslessly.

    python -m experiments.speculative --model=python-5m --folder=runs/speculative

Small-scale protocol of Clover: heads trained with equal data and updates (Clover-2, its ablations,
Clover-1 as reconstructed, Medusa, a one-layer EAGLE-like drafter), beside what needs no training
(prompt lookup, Token Recycling) and a small draft model. Measured: tokens per target pass at
temperatures 0 and 1, accuracy per head, draft cost, modelled and measured speedup, and exactness.
Every seed trains its own heads and draws its own prompts. What must hold is answered beside
(:mod:`experiments.speculative_statements`). A run that was cut off goes on where it was: hidden
states, heads and finished rows are kept in the folder.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from configs.defaults import Config
from experiments import measure, record, statements
from experiments.exactness import is_exact
from experiments.settings import define_shared_flags, from_flags, open_study
from experiments.speculative_statements import SPECULATIVE
from inference.drafter import Drafter, NoDrafter
from inference.drafters.eagle import EagleDrafter
from inference.drafters.eagle_tree import EagleTreeDrafter
from inference.drafters.medusa import MedusaDrafter
from inference.drafters.registry import make_drafter
from models.load import Model, load
from models.sharding import make_mesh
from ops.tree import EAGLE_25, chain_tree, tree_from_paths
from train import run_folder
from train.config import TrainConfig, build, build_task
from train.data.collect import collect, show_progress
from train.data.hidden import weights_hash
from train.data.prompts import load_prompts
from train.loop import train

TRAINED = {
    "medusa": ("medusa", {}),
    "medusa-63": ("medusa", {}),
    "clover": ("clover", {}),
    "clover-no-regression": ("clover", {"regressive": False}),
    "clover-no-augment": ("clover", {"num_layers": 0}),
    "clover-no-distill": ("clover", {"distill": False}),
    "clover1": ("clover1", {}),
    "eagle-like": ("eagle", {}),
    "eagle-features": ("eagle", {"reads": "features"}),
    "eagle-tokens": ("eagle", {"reads": "tokens"}),
    "eagle-chain": ("eagle", {}),
    "eagle-2": ("eagle", {}),
}
"""Method name to the name of its config and the changes of its heads.

All drafters use the same static tree of 25 nodes, as far as their heads reach, except
``medusa-63``, which has Medusa's own, ``eagle-chain`` with that tree's first branch alone, and
``eagle-2`` with as many nodes where it is sure of itself.
"""
SHARED = {"medusa-63": "medusa", "eagle-chain": "eagle-like", "eagle-2": "eagle-like"}
"""Methods that take the heads of another."""

UNTRAINED = ("none", "lookup", "recycling", "draft")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and how much of everything; see the flags."""

    model: str
    folder: str
    prompts: tuple[str, ...]
    chat: bool
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    texts: int
    prompt_tokens: int
    text_tokens: int
    steps: int
    batch_size: int
    heldout: int
    new_tokens: int
    draft_model: str
    draft_vocab: int | None
    variant: str
    speed_prompts: int


def collect_hidden(settings: Settings, model: Model) -> pathlib.Path:
    """The folder of hidden states over texts that the model wrote itself; made once."""
    folder = pathlib.Path(settings.folder) / "hidden"
    if not (folder / "manifest.json").exists():
        prompts = load_prompts(
            settings.prompts,
            "train",
            model.tokenizer,
            settings.texts // 2,
            settings.prompt_tokens,
            seed=0,
            chat=settings.chat,
        )
        collect(
            model, prompts, str(folder), settings.text_tokens, batch=32, on_progress=show_progress()
        )
    return folder


def heldout_prompts(settings: Settings, model: Model, seed: int) -> list[list[int]]:
    """The prompts that a seed's drafters are measured on."""
    return load_prompts(
        settings.prompts,
        "test",
        model.tokenizer,
        settings.heldout,
        settings.prompt_tokens,
        seed=100 + seed,
        chat=settings.chat,
    )


def head_config(method: str, variant: str) -> Config:
    """A method's config with the changes of its ablation.

    Raises:
        ValueError: there is no config of that variant.
    """
    name, changes = TRAINED[method]
    name = f"{name}_{variant}" if variant else name
    if importlib.util.find_spec(f"configs.{name}") is None:
        raise ValueError(f"there is no configs/{name}.py: leave out {method} or --variant.")
    config = importlib.import_module(f"configs.{name}").get_config()
    config.task.heads.update(changes)
    return config


def train_heads(settings: Settings, method: str, seed: int, hidden: pathlib.Path) -> dict[str, Any]:
    """Train one method's heads with one seed and save them; returns the evaluation."""
    out = _heads_folder(settings, method, seed)
    done = out / "evaluation.json"
    if done.exists():
        return json.loads(done.read_text())
    config = head_config(method, settings.variant)
    config.seed = seed
    config.steps = settings.steps
    config.batch_size = settings.batch_size
    config.task.target = settings.model
    config.task.hidden = str(hidden)
    config.task.draft_vocab = settings.draft_vocab
    config.optimizer.warmup_steps = max(1, settings.steps // 10)
    config.log_every = max(1, settings.steps // 20)
    config.evaluate_every = 0
    config.checkpoint_every = max(1, settings.steps // 4)
    built = build(TrainConfig, config.to_dict())
    mesh = make_mesh({}, jax.devices()[:1])
    run_folder.open_folder(out / "run")
    run_folder.describe_run(
        out / "run", config.to_dict(), run_folder.command_line(), dict(mesh.shape)
    )
    result = train(built, out / "run", mesh)
    if result.stopped:
        raise SystemExit("stopped by a signal: the same command goes on from here.")
    task = build_task(built)
    task.save(result.state.trained, out / "heads", jnp.float32)
    run_folder.write_json(done, result.evaluation)
    return result.evaluation


def drafter_name(settings: Settings, method: str, seed: int) -> str:
    """The registry's name for a method's drafter."""
    if method == "draft":
        return f"draft:{settings.draft_model}"
    if method in UNTRAINED:
        return method
    kind = TRAINED[method][0].rstrip("1")
    return f"{kind}:{_heads_folder(settings, method, seed) / 'heads'}"


def _heads_folder(settings: Settings, method: str, seed: int) -> pathlib.Path:
    return pathlib.Path(settings.folder) / f"{SHARED.get(method, method)}-{seed}"


def reshaped(method: str, drafter: Drafter) -> Drafter:
    """The drafter with the tree that the method asks for, in place of the registry's."""
    if method == "medusa" and isinstance(drafter, MedusaDrafter):
        paths = (p for p in EAGLE_25.paths if len(p) <= drafter.cfg.num_heads)
        return dataclasses.replace(drafter, tree=tree_from_paths(paths))
    if method == "eagle-chain" and isinstance(drafter, EagleDrafter):
        return dataclasses.replace(drafter, tree=chain_tree(EAGLE_25.max_depth))
    if method == "eagle-2" and isinstance(drafter, EagleDrafter):
        total, depth = EAGLE_25.size - 1, EAGLE_25.max_depth
        return EagleTreeDrafter(drafter.cfg, total=total, depth=depth - 1)
    return drafter


def plain_texts(
    settings: Settings, model: Model, prompts: Sequence[Sequence[int]], seed: int
) -> Callable[[int], list[list[int]]]:
    """A function from a width to what plain decoding of the prompts gives there, made once each."""

    @functools.cache
    def texts(width: int) -> list[list[int]]:
        drafter, new = NoDrafter(width), settings.new_tokens
        return measure.generate(model, drafter, None, prompts, new, 0.0, seed).tokens

    return texts


def measure_method(
    settings: Settings,
    model: Model,
    method: str,
    seed: int,
    evaluation: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    plain: Callable[[int], Sequence[Sequence[int]]],
) -> dict[str, Any]:
    """Everything measured about one method with one seed.

    ``plain`` is that of :func:`plain_texts`.
    """
    drafter, params = make_drafter(drafter_name(settings, method, seed), model)
    drafter = reshaped(method, drafter)
    row: dict[str, Any] = {
        "evaluation": evaluation,
        "shared_head": isinstance(drafter, MedusaDrafter) and drafter.cfg.shared_head,
        "load_average": list(os.getloadavg()),
    }
    for temperature in (0.0, 1.0):
        at = f"@{temperature:g}"
        out = measure.generate(
            model, drafter, params, prompts, settings.new_tokens, temperature, seed
        )
        stats = out.stats
        row["tokens_per_pass" + at] = out.tokens_per_pass
        row["drafted_per_emitted" + at] = float(stats.drafted.sum() / max(1, stats.emitted.sum()))
        row["by_depth" + at] = (stats.by_depth.sum(0) / stats.rounds.sum()).tolist()
        row["tokens_per_second" + at] = measure.speed(
            model,
            drafter,
            params,
            prompts[: settings.speed_prompts],
            settings.new_tokens,
            temperature,
        )
        if temperature == 0:
            row["exactness"] = dataclasses.asdict(
                measure.exactness(model, prompts, out.tokens, plain(drafter.width))
            )
    row["draft_cost"] = measure.draft_cost(model, drafter, params, prompts[0])
    return row


def open_folder(settings: Settings, model: Model) -> pathlib.Path:
    """The folder of heads and rows.

    Raises:
        ValueError: it was begun with other settings or another model.
    """
    return open_study(settings, {"weights": weights_hash(model.params)})


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods and seeds; finished ones are read from the folder.

    Raises:
        ValueError: see :func:`open_folder` and :func:`head_config`.
    """
    trained = [method for method in settings.methods if method in TRAINED]
    for method in trained:
        head_config(method, settings.variant)  # what is missing is said before the long work
    logging.set_verbosity(logging.WARNING)  # the data and checkpoint libraries tell every step
    model = load(settings.model)
    folder = open_folder(settings, model)
    hidden = collect_hidden(settings, model) if trained else None
    rows: dict[str, dict[int, Any]] = {}
    for seed in settings.seeds:
        kept = {method: folder / f"{method}-{seed}.json" for method in settings.methods}
        missing = [method for method, path in kept.items() if not path.exists()]
        prompts = heldout_prompts(settings, model, seed) if missing else []
        plain = plain_texts(settings, model, prompts, seed)
        for method in missing:
            print(f"{method}, seed {seed}", flush=True)
            evaluation = (
                train_heads(settings, method, seed, hidden)
                if hidden is not None and method in trained
                else {}
            )
            result = measure_method(settings, model, method, seed, evaluation, prompts, plain)
            run_folder.write_json(kept[method], result)
        for method, path in kept.items():
            rows.setdefault(method, {})[seed] = json.loads(path.read_text())
    return [summarise(method, by_seed, rows.get("none")) for method, by_seed in rows.items()]


def summarise(
    method: str, by_seed: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]] | None
) -> dict[str, Any]:
    """One row of the result: samples over seeds, and what follows from them."""
    runs = list(by_seed.values())
    row: dict[str, Any] = {
        "method": method,
        "shared_head": runs[0]["shared_head"],
        "load_average": [r["load_average"] for r in runs],
    }
    row["draft_cost"] = record.sample([r["draft_cost"] for r in runs])
    for at in ("@0", "@1"):
        for name in ("tokens_per_pass", "drafted_per_emitted", "tokens_per_second"):
            row[name + at] = record.sample([r[name + at] for r in runs])
        row["modelled_speedup" + at] = record.sample(
            [r["tokens_per_pass" + at] / (1 + r["draft_cost"]) for r in runs]
        )
        if plain is not None:
            name = "tokens_per_second" + at
            row["measured_speedup" + at] = record.sample(
                [r[name] / plain[seed][name] for seed, r in by_seed.items()]
            )
        depths = zip(*(r["by_depth" + at] for r in runs), strict=True)
        row["by_depth" + at] = [record.sample(x) for x in depths]
    row["accuracy"] = {
        key: record.sample([r["evaluation"][key] for r in runs]) for key in runs[0]["evaluation"]
    }
    row["exactness"] = [r["exactness"] for r in runs]
    return row


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    lines = [
        f"{'':22} {'tokens per pass':^15} {'draft':>6} {'modelled':^15} {'measured':^15}\n"
        f"{'method':22} {'T = 0':>7} {'T = 1':>7} {'cost':>6} {'T = 0':>7} {'T = 1':>7} "
        f"{'T = 0':>7} {'T = 1':>7}  exact"
    ]
    for r in rows:

        def pair(name: str, unit: str, r: Any = r) -> str:
            values = [r[f"{name}@{t}"]["mean"] if f"{name}@{t}" in r else None for t in "01"]
            return " ".join(f"{'':7}" if v is None else f"{v:6.2f}{unit}" for v in values)

        lines.append(
            f"{r['method']:22} {pair('tokens_per_pass', ' ')} {r['draft_cost']['mean']:6.3f} "
            f"{pair('modelled_speedup', 'x')} {pair('measured_speedup', 'x')}  "
            f"{'yes' if is_exact(r) else 'NO'}"
        )
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    settings = from_flags(Settings)
    try:
        rows = run(settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(show(rows))
    timing = {"memory_bandwidth_gb_s": record.memory_bandwidth()}
    name = record.name_of("speculative", settings.model, flags.FLAGS.label)
    statements.conclude(name, rows, SPECULATIVE, settings, timing)


def define_flags() -> None:
    """The command's flags."""
    define_shared_flags([*UNTRAINED, *TRAINED], "Seeds of heads and prompts.")
    flags.DEFINE_string("folder", "runs/speculative", "Where heads and finished rows are kept.")
    flags.DEFINE_integer("texts", 3072, "Texts that the model writes for training.")
    flags.DEFINE_integer("text_tokens", 192, "Tokens that the model adds to each.")
    flags.DEFINE_integer("steps", 1000, "Updates of the heads.")
    flags.DEFINE_integer("batch_size", 4, "Rows of 256 positions per update.")
    flags.DEFINE_integer("heldout", 16, "Held-out prompts per seed.")
    flags.DEFINE_integer("new_tokens", 200, "Tokens to generate for each.")
    flags.DEFINE_string("draft_model", "python-1m", "The small draft model.")
    flags.DEFINE_integer("draft_vocab", 1024, "Draft only so many of the most frequent tokens.")
    flags.DEFINE_string(
        "variant", "", "Ending of the heads' configs: smollm2 takes configs/clover_smollm2.py."
    )
    flags.DEFINE_integer("speed_prompts", 3, "Prompts that are timed at batch 1.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
