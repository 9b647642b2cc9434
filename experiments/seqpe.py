"""Language models by how they tell positions: perplexity within the trained length and far beyond.

    python -m experiments.seqpe --folder=runs/seqpe --steps=4000 --seeds=0

Trains the variants of `configs/seqpe.py` that the folder does not hold yet, one run each for every
seed, and reads held-out windows of the longest length in pieces of every length: the same tokens
each time, so that only context differs. Rotary positions are also read by interpolation and by NTK
scaling with the factor of each length; learned tables and sinusoids are squeezed into the trained
range. A command that was cut off goes on where it was. ``--extend`` adds methods to the result that
is there, with its settings.
"""

import dataclasses
import functools
import importlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from configs.defaults import Config
from experiments import record, statements
from experiments.long_context_loss import cut_windows, read_text, window_nats
from experiments.settings import from_flags
from experiments.statements import Row, Statement, value
from inference.policies.registry import make_policy
from models import decoder, seqpe
from models.load import Model
from models.params import count
from models.sharding import make_mesh
from models.tokenizer import Tokenizer
from research.context.seqpe.objective import contrastive_loss
from research.context.seqpe.policy import make_policy as make_table
from research.context.seqpe.samplers import sample_contrastive
from research.context.seqpe.task import SeqPEParams, SeqPETask
from train import run_folder
from train.config import TrainConfig, build, build_task
from train.loop import train

METHODS = {
    "seqpe": ("seqpe", ""),
    "no_contrastive": ("no_contrastive", ""),
    "no_transfer": ("no_transfer", ""),
    "no_both": ("no_both", ""),
    "rope": ("rope", "dense"),
    "rope_linear": ("rope", "linear:FACTOR"),
    "rope_ntk": ("rope", "ntk:FACTOR"),
    "learned": ("learned", "interpolated"),
    "sinusoidal": ("sinusoidal", "dense"),
    "sinusoidal_squeezed": ("sinusoidal", "interpolated"),
    "alibi": ("alibi", "dense"),
    "none": ("none", "dense"),
}
"""Name to the variant that is trained and the policy it is read by; SeqPE brings its own."""

FAR_BELOW = 0.5
"""Share of a rival's perplexity that counts as far below it."""

PIVOTS = 512
"""Positions by which the contrastive loss is measured."""


def at(row: Row, times: int, seed: int) -> float:
    """Perplexity at so many trained lengths."""
    return value(row, f"at_{times}x", seed)


def far_below(rival: str) -> Statement:
    """At 8 and 16 trained lengths, if both were measured."""
    return Statement(
        f"at 8 and 16 times the trained length SeqPE has at most half the perplexity of {rival}",
        ("seqpe", rival),
        lambda rows, seed: all(
            at(rows["seqpe"], times, seed) <= FAR_BELOW * at(rows[rival], times, seed)
            for times in (8, 16)
        ),
    )


def worse_without(loss: str, method: str) -> Statement:
    """At 16 trained lengths, when it is trained without a loss."""
    return Statement(
        f"without {loss} the perplexity at 16 times the trained length is 10% worse",
        ("seqpe", method),
        lambda rows, seed: at(rows[method], 16, seed) >= 1.1 * at(rows["seqpe"], 16, seed),
    )


STATEMENTS = (
    Statement(
        "within the trained length SeqPE is within 2% of rotary positions",
        ("seqpe", "rope"),
        lambda rows, seed: at(rows["seqpe"], 1, seed) <= 1.02 * at(rows["rope"], 1, seed),
    ),
    *(far_below(rival) for rival in ("learned", "sinusoidal", "rope")),
    worse_without("the transfer loss", "no_transfer"),
    worse_without("the contrastive loss", "no_contrastive"),
    worse_without("both losses", "no_both"),
    Statement(
        "the contrastive loss ends below half of ln N",
        ("seqpe",),
        lambda rows, seed: (
            value(rows["seqpe"], "contrastive", seed) < 0.5 * math.log(rows["seqpe"]["candidates"])
        ),
    ),
    Statement(
        "the nearest candidate scores highest in more than 60% of cases",
        ("seqpe",),
        lambda rows, seed: value(rows["seqpe"], "nearest", seed) > 0.6,
    ),
    Statement(
        "not expected: at 16 times the trained length SeqPE is ahead of ALiBi",
        ("seqpe", "alibi"),
        lambda rows, seed: at(rows["seqpe"], 16, seed) <= at(rows["alibi"], 16, seed),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained and how it is read; see the flags."""

    folder: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    corpus: str
    tokenizer: str
    text: str
    steps: int
    batch_size: int
    compute_dtype: str
    times: tuple[int, ...]
    windows: int
    batch_tokens: int


def config_of(settings: Settings, variant: str, seed: int) -> Config:
    """The config of one run."""
    config = importlib.import_module("configs.seqpe").get_config(variant)
    config.task.corpus, config.task.tokenizer = settings.corpus, settings.tokenizer
    config.seed, config.steps, config.batch_size = seed, settings.steps, settings.batch_size
    config.compute_dtype = settings.compute_dtype
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, settings.steps // 10)
    config.evaluate_every = 0
    config.log_every = max(1, settings.steps // 40)
    return config


def finished(config: Config, folder: pathlib.Path) -> tuple[Any, Any]:
    """The task and the trained parameters of a run, which goes on to its end if it has not come.

    Raises:
        ValueError: the folder holds a run of another config.
    """
    built, mesh = build(TrainConfig, config.to_dict()), make_mesh("", jax.devices()[:1])
    run_folder.open_folder(folder)
    run_folder.describe_run(folder, config.to_dict(), run_folder.command_line(), dict(mesh.shape))
    result = train(built, folder, mesh)
    if result.stopped:
        raise SystemExit("stopped by a signal: the same command goes on from here.")
    return build_task(built), result.state.trained


def policy_of(name: str, task: Any, params: Any, length: int) -> Any:
    """How a method reads texts of one length."""
    if isinstance(task, SeqPETask):
        return make_table(params.encoder, task.encoder, params.projection, task.injection, length)
    factor = max(1.0, length / task.sequence_length)
    # Models that can read further than they were trained to are squeezed into what they were.
    trained = dataclasses.replace(task.model, max_length=task.sequence_length)
    return make_policy(METHODS[name][1].replace("FACTOR", f"{factor:g}"), trained)


@functools.partial(jax.jit, static_argnums=0)
def _contrast(task: SeqPETask, params: seqpe.Params, key: jax.Array) -> tuple[Any, Any]:
    cfg, sampling = task.encoder, task.regulariser.sampling
    for_pivots, for_candidates = jax.random.split(key)
    pivots = jax.random.randint(for_pivots, (PIVOTS, cfg.axes), 0, cfg.axis_length)
    found = sample_contrastive(for_candidates, cfg, sampling, pivots)
    both = jnp.concatenate([pivots[:, None], found.positions], 1)
    vectors = seqpe.encode(params, cfg, both)
    return contrastive_loss(vectors[:, 0], vectors[:, 1:], found.labels)


def measure(
    settings: Settings, name: str, task: Any, params: Any, ids: Sequence[int], seed: int
) -> dict[str, Any]:
    """Perplexity at every length, and what the encoder has learned."""
    trunk, trained = task.trunk(params), task.sequence_length
    model = Model(decoder.unstack(trunk), task.model, Tokenizer.load(task.tokenizer), name)
    longest = trained * max(settings.times)
    windows = cut_windows(ids, settings.windows, longest, seed)
    row: dict[str, Any] = {"parameters": count(params)}
    for times in settings.times:
        length = trained * times
        pieces = [windows[:, i : i + length + 1] for i in range(0, longest, length)]
        batch = max(1, min(len(windows), settings.batch_tokens // length))
        policy = policy_of(name, task, params, length)
        nats = window_nats(model, policy, np.concatenate(pieces), batch)[0]
        row[f"at_{times}x"] = float(np.exp(nats.mean()))
    if isinstance(task, SeqPETask) and isinstance(params, SeqPEParams):
        loss, nearest = _contrast(task, params.encoder, jax.random.key(seed))
        row |= {"contrastive": float(loss), "nearest": float(nearest)}
        row["candidates"] = task.regulariser.sampling.candidates
    return row


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods and seeds.

    Raises:
        ValueError: an unknown method, or a folder with runs of other settings.
    """
    if unknown := sorted(set(settings.methods) - METHODS.keys()):
        raise ValueError(f"unknown method {unknown[0]!r}: choose of {', '.join(METHODS)}.")
    ids = Tokenizer.load(settings.tokenizer).encode(read_text(settings.text or settings.corpus))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.methods}
    for seed in settings.seeds:
        for name in settings.methods:
            variant = METHODS[name][0]
            print(f"{name}, seed {seed}", flush=True)
            folder = pathlib.Path(settings.folder) / f"{variant}-{seed}"
            task, params = finished(config_of(settings, variant, seed), folder)
            runs[name].append(measure(settings, name, task, params, ids, seed))
    return [summarise(name, found) for name, found in runs.items()]


def summarise(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's row: samples over seeds."""
    row: dict[str, Any] = {"method": name, "parameters": runs[0]["parameters"]}
    if "candidates" in runs[0]:
        row["candidates"] = runs[0]["candidates"]
    for key in runs[0]:
        if key not in row:
            row[key] = record.sample([one[key] for one in runs])
    return row


def joined(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Rows of a result and those that extend it, which stand for their methods."""
    by = {row["method"]: row for row in (*before, *rows)}
    return list(by.values())


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    columns = [key for key in rows[0] if key.startswith("at_")]
    lines = [f"{'method':20}" + "".join(f"{key[3:]:>10}" for key in columns)]
    for row in rows:
        cells = "".join(f"{row[key]['mean']:10.2f}" for key in columns)
        lines.append(f"{row['method']:20}{cells}")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    settings = dataclasses.replace(settings, times=tuple(int(n) for n in settings.times))
    name, earlier = record.name_of("seqpe", None, flags.FLAGS.label), None
    try:
        if flags.FLAGS.extend:
            earlier = record.load(name)
            record.check_extends(earlier, settings, ("methods", "folder"))
        rows = run(settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    if earlier is not None:
        rows = joined(earlier["rows"], rows)
        settings = dataclasses.replace(settings, methods=tuple(row["method"] for row in rows))
    known = {1, 8, 16} <= set(settings.times)
    asked = STATEMENTS if known else ()
    print(show(rows))
    statements.conclude(name, rows, asked, settings, earlier=earlier)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("folder", "runs/seqpe", "Where the runs are, or will be.")
    flags.DEFINE_list("methods", list(METHODS), "What to compare.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of training and of windows.")
    flags.DEFINE_string("corpus", "python_stdlib", "What to train on, by name or text:PATH.")
    flags.DEFINE_string("tokenizer", "assets/python-5m", "Its tokenizer.")
    flags.DEFINE_string("text", "", "Held-out text: a file; default: the corpus' test split.")
    flags.DEFINE_integer("steps", 4000, "Updates of every run.", lower_bound=10)
    flags.DEFINE_integer("batch_size", 32, "Rows of 128 tokens per update.", lower_bound=1)
    flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "While training.")
    flags.DEFINE_list("times", ["1", "2", "4", "8", "16"], "Lengths, in trained lengths.")
    flags.DEFINE_integer("windows", 16, "Windows of the longest length.", lower_bound=1)
    flags.DEFINE_integer("batch_tokens", 2048, "Tokens of a pass.", lower_bound=1)
    flags.DEFINE_string("label", "", "Ending of the result's name.")
    flags.DEFINE_bool("extend", False, "Add --methods to the result that is there.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
