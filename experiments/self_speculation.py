"""A model that drafts for itself: by leaving sub-layers out (SWIFT), or its last layers (DEL).

    python -m experiments.self_speculation --protocol=sets --model=layerskip-5m --max_score=2
    python -m experiments.self_speculation --protocol=exits --model=layerskip-5m

Exits are also run on ``python-5m``, which was trained without layer dropout and exits: how much a
model needs that training is part of the answer. Greedy, float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from experiments import record, self_speculation_exits, self_speculation_sets, statements
from experiments.settings import define_shared_flags, from_flags
from models.load import Model, load
from train.data.prompts import Split, load_prompts

PROTOCOLS = {"sets": self_speculation_sets, "exits": self_speculation_exits}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    protocol: str
    model: str
    prompts: tuple[str, ...]
    other: tuple[str, ...]
    seeds: tuple[int, ...]
    count: int
    prompt_tokens: int
    new_tokens: int
    ratio: float
    ratios: tuple[float, ...]
    max_score: float
    checked: int


def held_out(
    settings: Settings, model: Model, source: Sequence[str], seed: int, split: Split = "test"
) -> list[list[int]]:
    """Prompts of one seed."""
    return load_prompts(
        tuple(source),
        split,
        model.tokenizer,
        settings.count,
        settings.prompt_tokens,
        seed=300 + seed,
    )


def run_seed(settings: Settings, model: Model, seed: int) -> dict[str, dict[str, Any]]:
    """The protocol's rows of one seed."""
    prompts = held_out(settings, model, settings.prompts, seed)
    if settings.protocol == "exits":
        return self_speculation_exits.measure_seed(model, prompts, len(settings.prompts), settings)
    half = len(prompts) // 2
    passages = held_out(settings, model, settings.prompts, seed, "train")[:8]
    other = held_out(settings, model, settings.other, seed) if settings.other else []
    return self_speculation_sets.measure_seed(
        model, prompts[:half], prompts[half:], passages, other, settings
    )


def run(settings: Settings) -> list[dict[str, Any]]:
    """All rows on all seeds' prompts, summarised.

    Raises:
        ValueError: a skip ratio that leaves nothing to skip.
    """
    model = load(settings.model)
    if settings.protocol == "sets":
        self_speculation_sets.check_ratio(model, (settings.ratio, *settings.ratios))
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        print(f"seed {seed}", flush=True)
        for method, row in run_seed(settings, model, seed).items():
            rows.setdefault(method, []).append(row)
    summarise = PROTOCOLS[settings.protocol].summarise
    return [summarise(method, runs) for method, runs in rows.items()]


def show(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The result as a plain table."""
    lines = [f"{'method':24}" + "".join(f"{name:>18}" for name in names)]
    for row in rows:
        cells = [f"{row[n]['mean']:18.3f}" if n in row else " " * 18 for n in names]
        lines.append(f"{row['method']:24}" + "".join(cells))
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    settings = dataclasses.replace(settings, ratios=tuple(float(x) for x in settings.ratios))
    module = PROTOCOLS[settings.protocol]
    rows = run(settings)
    print(show(rows, module.NUMBERS))
    name = record.name_of(
        f"self_speculation_{settings.protocol}", settings.model, flags.FLAGS.label
    )
    statements.conclude(name, rows, module.STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    define_shared_flags((), "Seeds of the prompts.")
    flags.DEFINE_enum("protocol", "exits", list(PROTOCOLS), "Skipped sub-layers, or exits.")
    flags.DEFINE_list("other", [], "Prompts of another domain, for the sets; empty: none.")
    flags.DEFINE_integer("count", 60, "Held-out prompts.", lower_bound=4)
    flags.DEFINE_integer("new_tokens", 128, "Tokens to generate for each.", lower_bound=48)
    flags.DEFINE_float("ratio", 0.5, "Share of the sub-layers that sets skip.")
    flags.DEFINE_list("ratios", ["0.15", "0.25", "0.35", "0.45"], "Further shares to search with.")
    flags.DEFINE_float("max_score", 0.95, "The search ends above; 2 lets it go on to the end.")
    flags.DEFINE_integer("checked", 10, "Prompts also decoded plainly at the drafter's width.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
