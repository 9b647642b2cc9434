"""SpecDec++: what it verifies and discards per token, against other ways to end a draft.

    python -m experiments.specdec_pp --model=python-5m --draft_model=python-1m

The target writes texts, the draft model is labelled on them once, and every seed trains its own
heads on them and samples from its own held-out prompts at temperature 1. All rules draft through
one loop with one draft model. A run that was cut off goes on where it was: data, heads and finished
rows are kept in the folder. What must hold: :mod:`experiments.specdec_pp_statements`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from configs import specdec_pp as config_file
from experiments import measure, record, statements
from experiments.settings import define_shared_flags, from_flags, open_study
from experiments.specdec_pp_statements import SPECDEC
from inference.drafter import Drafter, NoDrafter
from inference.drafters.adaptive import (
    AdaptiveDraftModel,
    AdaptiveParams,
    Confidence,
    Entropy,
    Fixed,
    Heuristic,
    Limits,
    Rule,
)
from inference.drafters.draft_model import check_tokenizer
from inference.engine import make_engine
from models import acceptance_head, decoder
from models.acceptance_head import AcceptanceConfig
from models.drafter_io import load_weights
from models.load import Model, load
from models.sharding import make_mesh
from research.speculative.specdec_pp.dataset import MIX, write_acceptance
from research.speculative.specdec_pp.drafter import LONGEST, SHORTEST, RejectionRisk
from research.speculative.specdec_pp.oracle import OracleDraftModel
from train import run_folder
from train.config import TrainConfig, build, build_task
from train.data.collect import show_progress
from train.data.hidden import generate_texts, weights_hash
from train.data.prompts import load_prompts
from train.loop import train

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
HEADS: dict[str, tuple[float, dict[str, Any]]] = {
    "specdec": (MIX, {}),
    "target-text": (1.0, {}),
    "tied": (MIX, {"tie_blocks": True}),
    "weight-1": (MIX, {"rejection_weight": 1.0}),
}
"""Name of a head to the mixture of its data and the changes of its config."""

RATIOS = (4, 8, 16)
"""Cost of a target pass in passes of the draft model."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and how much of everything; see the flags."""

    model: str
    draft_model: str
    folder: str
    prompts: tuple[str, ...]
    chat: bool
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    texts: int
    prompt_tokens: int
    text_tokens: int
    steps: int
    learning_rate: float
    heldout: int
    new_tokens: int


def rules() -> dict[str, tuple[Rule | str, Limits, int | None]]:
    """Every rule without a head: the rule, its limits, and the length of a text's first draft."""
    free = Limits.make(longest=LONGEST)
    found: dict[str, Any] = {
        f"fixed-{k}": (Fixed(), Limits.make(longest=k), None) for k in range(1, 17)
    }
    for tau in (0.2, 0.4, 0.6, 0.8, 0.9):
        found[f"confidence-{tau}"] = (Confidence(), Limits.make(1 - tau, longest=LONGEST), None)
    for nats in (0.5, 1.0, 2.0, 3.0):
        found[f"entropy-{nats}"] = (Entropy(), Limits.make(nats, longest=LONGEST), None)
    return found | {"heuristic": (Heuristic(), free, 5), "oracle": ("oracle", free, None)}


METHODS = (*rules(), *(f"{head}-{h}" for head in HEADS for h in THRESHOLDS))


def collect_examples(settings: Settings, model: Model, draft: Model) -> dict[float, pathlib.Path]:
    """The folders of labelled states by mixture, over one set of texts; made once."""
    folder = pathlib.Path(settings.folder)
    places = {mix: folder / f"examples-{mix}" for mix in {mix for mix, _ in HEADS.values()}}
    if any(not (place / "manifest.json").exists() for place in places.values()):
        prompts = load_prompts(
            settings.prompts,
            "train",
            model.tokenizer,
            settings.texts,
            settings.prompt_tokens,
            seed=0,
            chat=settings.chat,
        )
        texts = generate_texts(
            make_engine(model.params, model.cfg), prompts, settings.text_tokens, (1.0,), 32,
            model.tokenizer.end_ids, show_progress(),
        )  # fmt: skip
        for mix, place in places.items():
            if not (place / "manifest.json").exists():
                write_acceptance(place, model, draft, texts, mix, batch=32)
    return places


def train_head(settings: Settings, name: str, seed: int, examples: pathlib.Path) -> dict[str, Any]:
    """Train one head with one seed and save it; returns its evaluation."""
    out = _head_folder(settings, name, seed)
    done = out / "evaluation.json"
    if done.exists():
        return json.loads(done.read_text())
    config = config_file.get_config()
    config.seed, config.steps = seed, settings.steps
    config.task.draft, config.task.examples = settings.draft_model, str(examples)
    config.task.head.update(HEADS[name][1])
    config.optimizer.learning_rate = settings.learning_rate
    config.optimizer.warmup_steps = max(1, round(0.03 * settings.steps))
    config.log_every = max(1, settings.steps // 10)
    config.evaluate_every = 0
    config.checkpoint_every = max(1, settings.steps // 2)
    built = build(TrainConfig, config.to_dict())
    mesh = make_mesh({}, jax.devices()[:1])
    run_folder.open_folder(out / "run")
    run_folder.describe_run(
        out / "run", config.to_dict(), run_folder.command_line(), dict(mesh.shape)
    )
    result = train(built, out / "run", mesh)
    if result.stopped:
        raise SystemExit("stopped by a signal: the same command goes on from here.")
    build_task(built).save(result.state.trained, out / "head", jnp.float32)
    run_folder.write_json(done, result.evaluation)
    return result.evaluation


def _head_folder(settings: Settings, name: str, seed: int) -> pathlib.Path:
    return pathlib.Path(settings.folder) / f"{name}-{seed}"


def make_method(
    settings: Settings, draft: Model, method: str, seed: int
) -> tuple[Drafter, AdaptiveParams]:
    """The drafter of a method; rules and thresholds share programs."""
    params = decoder.unstack(draft.params)
    plain = rules()
    if method in plain:
        rule, limits, first = plain[method]
        if isinstance(rule, str):
            return OracleDraftModel(draft.cfg, LONGEST), AdaptiveParams(params, limits)
        drafter = AdaptiveDraftModel(draft.cfg, LONGEST, rule=rule, first_length=first)
        return drafter, AdaptiveParams(params, limits)
    name, _, threshold = method.rpartition("-")
    head = AcceptanceConfig(**HEADS[name][1])
    weights = load_weights(
        _head_folder(settings, name, seed) / "head", acceptance_head.specs(head, draft.cfg)
    )
    limits = Limits.make(float(threshold), SHORTEST, LONGEST)
    drafter = AdaptiveDraftModel(draft.cfg, LONGEST, rule=RejectionRisk(head))
    return drafter, AdaptiveParams(params, limits, weights)


def measure_method(
    settings: Settings, model: Model, draft: Model, method: str, seed: int,
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:  # fmt: skip
    """Rates and modelled costs of one method on one seed's prompts at temperature 1."""
    drafter, params = make_method(settings, draft, method, seed)
    stats = measure.generate(model, drafter, params, prompts, settings.new_tokens, 1.0, seed).stats
    rounds, drafted, accepted = (
        int(np.sum(x)) for x in (stats.rounds, stats.drafted, stats.accepted)
    )
    tokens = accepted + rounds  # before the last round of each text is cut
    row: dict[str, Any] = {
        "verified": rounds / tokens,
        "discarded": (drafted - accepted) / tokens,
        "tokens_per_pass": tokens / rounds,
        "drafted_per_pass": drafted / rounds,
    }
    for ratio in RATIOS:
        # In passes of the draft model: one for each drafted token, ``ratio`` for each round.
        row[f"cost@{ratio}"] = (drafted + ratio * rounds) / tokens
    return row


def check_greedy(
    settings: Settings, model: Model, draft: Model, seed: int, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Whether greedy text with the head equals plain decoding."""
    drafter, params = make_method(settings, draft, "specdec-0.5", seed)
    new = settings.new_tokens
    out = measure.generate(model, drafter, params, prompts, new, 0.0, seed).tokens
    width = NoDrafter(drafter.width)
    plain = measure.generate(model, width, None, prompts, new, 0.0, seed).tokens
    return dataclasses.asdict(measure.exactness(model, prompts, out, plain))


def open_folder(settings: Settings, model: Model, draft: Model) -> pathlib.Path:
    """The folder of data, heads and rows.

    Raises:
        ValueError: it was begun with other settings or other models.
    """
    weights = {"weights": weights_hash(model.params), "draft_weights": weights_hash(draft.params)}
    return open_study(settings, weights)


def measure_seed(
    settings: Settings, model: Model, draft: Model, seed: int, examples: dict[float, pathlib.Path]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of one seed; finished ones are read from the folder."""
    folder = pathlib.Path(settings.folder)
    prompts = load_prompts(
        settings.prompts,
        "test",
        model.tokenizer,
        settings.heldout,
        settings.prompt_tokens,
        seed=400 + seed,
        chat=settings.chat,
    )
    heads = [h for h in HEADS if any(m.rpartition("-")[0] == h for m in settings.methods)]
    for name in heads:
        print(f"head {name}, seed {seed}", flush=True)
        yield f"head-{name}", train_head(settings, name, seed, examples[HEADS[name][0]])
    for method in settings.methods:
        kept = folder / f"{method}-{seed}.json"
        if not kept.exists():
            print(f"{method}, seed {seed}", flush=True)
            run_folder.write_json(
                kept, measure_method(settings, model, draft, method, seed, prompts)
            )
        yield method, json.loads(kept.read_text())
    if "specdec" in heads:
        yield "greedy", {"exactness": check_greedy(settings, model, draft, seed, prompts)}


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods and seeds.

    Raises:
        ValueError: an unknown method, models with different tokenizers, see :func:`open_folder`.
    """
    if unknown := sorted(set(settings.methods) - set(METHODS)):
        raise ValueError(f"unknown method {unknown[0]!r}: choose among {', '.join(METHODS)}.")
    logging.set_verbosity(logging.WARNING)
    model, draft = load(settings.model), load(settings.draft_model)
    check_tokenizer(draft, model)
    open_folder(settings, model, draft)
    trained = any(method not in rules() for method in settings.methods)
    examples = collect_examples(settings, model, draft) if trained else {}
    by_method: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        for method, row in measure_seed(settings, model, draft, seed, examples):
            by_method.setdefault(method, []).append(row)
    return [summarise(method, rows) for method, rows in by_method.items()]


def summarise(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the result: samples over seeds."""
    row: dict[str, Any] = {"method": method}
    for name in runs[0]:
        values = [r[name] for r in runs]
        row[name] = values if name == "exactness" else record.sample(values)
    return row


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as two plain tables."""
    columns = ("verified", "discarded", "tokens_per_pass", *(f"cost@{r}" for r in RATIOS))
    lines = [f"{'method':16} " + " ".join(f"{c:>15}" for c in columns)]
    lines += [
        f"{r['method']:16} " + " ".join(f"{r[c]['mean']:15.3f}" for c in columns)
        for r in rows
        if "verified" in r
    ]
    for r in rows:
        if "auc" in r:
            numbers = ", ".join(f"{k} {v['mean']:.3f}" for k, v in r.items() if k != "method")
            lines.append(f"{r['method']}: {numbers}")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    settings = from_flags(Settings)
    try:
        rows = run(settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(show(rows))
    name = record.name_of("specdec_pp", settings.model)
    statements.conclude(name, rows, SPECDEC, settings)


def define_flags() -> None:
    """The command's flags."""
    define_shared_flags(METHODS, "Seeds of heads and prompts.")
    flags.DEFINE_string("draft_model", "python-1m", "The frozen draft model.")
    flags.DEFINE_string("folder", "runs/specdec_pp_study", "Where data, heads and rows are kept.")
    flags.DEFINE_integer("texts", 2048, "Texts that the target writes for training.")
    flags.DEFINE_integer("text_tokens", 192, "Tokens that the target adds to each.")
    flags.DEFINE_integer("steps", 183, "Updates of a head.")
    flags.DEFINE_float("learning_rate", 1e-3, "Of the heads.")
    flags.DEFINE_integer("heldout", 32, "Held-out prompts per seed.")
    flags.DEFINE_integer("new_tokens", 128, "Tokens to generate for each.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
