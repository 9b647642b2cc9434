"""DEL's protocol: the exit and draft length it chooses, against every fixed pair of them.

What counts is tokens per layer, ``emitted / (L rounds + layers run in drafting)``, times L: 1 for
plain decoding. Readouts of all layers are not in it and are told beside it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import measure, record
from experiments.exactness import EXACT
from experiments.statements import Row, Statement, at_least, value
from inference.drafter import Drafter, NoDrafter
from inference.engine import make_engine
from models.load import Model
from research.speculative.del_exit.drafter import early_exit

GAMMAS = (1, 2, 3, 4, 6, 8)
NUMBERS = (
    "layer_speedup",
    "tokens_per_pass",
    "acceptance",
    "exit",
    "readouts",
    "average_static",
    "domain_static",
)
"""The last two stand beside the best fixed setting: the mean over all of them, and the mean over
domains of the best for each."""


def _best_static(rows: dict[str, Row], seed: int, factor: float) -> bool:
    best = value(rows["best static"], "layer_speedup", seed)
    return value(rows["del"], "layer_speedup", seed) >= factor * best


STATEMENTS = (
    Statement(
        "DEL reaches 97% of the best fixed setting of all, without any tuning",
        ("del", "best static"),
        lambda rows, seed: _best_static(rows, seed, 0.97),
    ),
    Statement(
        "DEL is at least as good as the best fixed setting of all",
        ("del", "best static"),
        lambda rows, seed: _best_static(rows, seed, 1.0),
    ),
    Statement(
        "DEL beats the average fixed setting",
        ("del", "best static"),
        lambda rows, seed: (
            value(rows["del"], "layer_speedup", seed)
            >= value(rows["best static"], "average_static", seed)
        ),
    ),
    Statement(
        "ending drafts by confidence is at least as good as by the chosen length",
        ("del", "del gamma"),
        at_least("del", "del gamma", "layer_speedup"),
    ),
    Statement(
        "DEL runs fewer layers per token than plain decoding by a factor above 1.15",
        ("del",),
        lambda rows, seed: value(rows["del"], "layer_speedup", seed) > 1.15,
    ),
    Statement(
        "DEL is not far behind plain decoding (0.97)",
        ("del",),
        lambda rows, seed: value(rows["del"], "layer_speedup", seed) >= 0.97,
    ),
    Statement(
        "DEL with drafts no longer than it chose is not far behind plain decoding (0.97)",
        ("del min",),
        lambda rows, seed: value(rows["del min"], "layer_speedup", seed) >= 0.97,
    ),
    EXACT,
)


def drafters(model: Model, best: tuple[int, int]) -> dict[str, tuple[Drafter, Any]]:
    """DEL in its modes, and the two rivals that start from the best fixed setting."""
    cfg, start = model.cfg, {"exit_layer": best[0], "gamma": best[1]}
    return {
        "plain": (NoDrafter(), None),
        "del": early_exit(cfg),
        "del gamma": early_exit(cfg, mode="gamma"),
        "del min": early_exit(cfg, mode="min"),
        "del half": early_exit(cfg, missing="half"),
        "fsm": early_exit(cfg, start, method="fsm"),
        "dv": early_exit(cfg, start | {"gamma": 12}, method="dv"),
    }


def decoded(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> dict[str, Any]:
    """Texts and, per prompt, tokens, rounds and layers run in turn."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    out = engine.generate(prompts, new_tokens, eos=model.tokenizer.end_ids)
    stats, layers = out.stats, model.cfg.num_layers
    drafting = stats.layer_passes - layers * stats.rounds
    return {
        "texts": out.tokens,
        "emitted": stats.emitted,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "passes": stats.layer_passes,
        "drafting": drafting,
    }


def speedup(model: Model, found: dict[str, Any], rows: slice = slice(None)) -> float:
    """Tokens per layer times the number of layers, over some of the prompts."""
    emitted, passes = found["emitted"][rows], found["passes"][rows]
    return float(np.sum(emitted) * model.cfg.num_layers / np.sum(passes))


def summary(model: Model, found: dict[str, Any], parts: int, reads: bool) -> dict[str, Any]:
    """The numbers of one method, over all prompts and for each of ``parts`` domains in turn."""
    rounds, drafted = float(np.sum(found["rounds"])), float(np.sum(found["drafted"]))
    return {
        "layer_speedup": speedup(model, found),
        "by_domain": [speedup(model, found, slice(i, None, parts)) for i in range(parts)],
        "tokens_per_pass": float(np.sum(found["emitted"])) / rounds,
        "acceptance": float(np.sum(found["accepted"])) / max(drafted, 1),
        "exit": float(np.sum(found["drafting"])) / max(drafted, 1),
        # Rows of the head that are read in a round beside what drafting and verification read.
        "readouts": model.cfg.num_layers * (drafted / rounds + 1) if reads else 0.0,
    }


def grid(
    model: Model, prompts: Sequence[Sequence[int]], new_tokens: int
) -> dict[tuple[int, int], dict[str, Any]]:
    """Every fixed exit and draft length; all of them are one program."""
    found = {}
    for exit_layer in range(1, model.cfg.num_layers):
        for gamma in GAMMAS:
            drafter, params = early_exit(
                model.cfg,
                {"exit_layer": exit_layer, "gamma": gamma},
                method="fixed",
                max_draft=max(GAMMAS),
            )
            found[exit_layer, gamma] = decoded(model, drafter, params, prompts, new_tokens)
    return found


def measure_seed(
    model: Model, prompts: Sequence[Sequence[int]], parts: int, settings: Any
) -> dict[str, dict[str, Any]]:
    """All rows of one seed; prompt i is of domain ``i % parts``."""
    new = settings.new_tokens
    fixed = grid(model, prompts, new)
    table = {key: summary(model, found, parts, False) for key, found in fixed.items()}
    best = max(table, key=lambda key: table[key]["layer_speedup"])
    speedups = [row["layer_speedup"] for row in table.values()]
    oracle = [max(row["by_domain"][i] for row in table.values()) for i in range(parts)]
    checked = prompts[: settings.checked]

    def exact(drafter: Drafter, texts: Sequence[list[int]]) -> dict[str, Any]:
        plain = decoded(model, NoDrafter(drafter.width), None, checked, new)["texts"]
        same = [*plain, *[None] * (len(prompts) - len(checked))]
        return dataclasses.asdict(measure.exactness(model, prompts, texts, same))

    beside = {
        "setting": list(best),
        "average_static": float(np.mean(speedups)),
        "domain_static": float(np.mean(oracle)),
        "grid": [[*key, row["layer_speedup"]] for key, row in table.items()],
        "exactness": exact(NoDrafter(max(GAMMAS) + 1), fixed[best]["texts"]),
    }
    rows = {"best static": table[best] | beside}
    for name, (drafter, params) in drafters(model, best).items():
        found = decoded(model, drafter, params, prompts, new)
        reads = name.startswith("del")
        rows[name] = summary(model, found, parts, reads) | {
            "exactness": exact(drafter, found["texts"])
        }
    return rows


def summarise(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of all seeds."""
    row: dict[str, Any] = {"method": method}
    for name in NUMBERS:
        if name in runs[0]:
            row[name] = record.sample([r[name] for r in runs])
    row["by_domain"] = [record.sample(x) for x in zip(*(r["by_domain"] for r in runs), strict=True)]
    for name in ("setting", "grid"):
        if name in runs[0]:
            row[name] = [r[name] for r in runs]
    row["exactness"] = [r["exactness"] for r in runs]
    return row
