"""All drafters on the same prompts by category: tokens per pass, cost, seconds, and rivals.

    python -m experiments.speculative_bench --model=python-5m --drafters=none,lookup,recycling
    python -m experiments.speculative_bench --model=smollm2-135m --chat --peers \\
        --prompts=chat=FILE.jsonl:turns,math=FILE.jsonl:question,code=FILE.jsonl.gz:prompt

A category is ``NAME=SOURCE`` with a source of :mod:`train.data.prompts`, or ``NAME=raw:SOURCE`` for
lines that are to be continued rather than answered. ``tuned:NAME`` is a drafter with the length or
the part of its tree that the machine's costs ask for (:mod:`inference.tuning`), chosen on other
prompts of the categories; drafters that remember what they saw have seen those, and remember the
prompts of a category from one to the next. Every drafter
decodes every prompt; sides are timed in turn, and a row's samples are the repeats. ``--peers`` adds
prompt lookup and assisted generation of ``transformers`` on the same weights and prompts (needs the
extra ``[bench]``).
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from experiments import measure, record, statements
from experiments.bare_loop import loop_overhead
from experiments.settings import from_flags
from experiments.speculative_bench_statements import AVERAGED, STATEMENTS
from experiments.speculative_peers import Peers
from inference.drafter import NoDrafter, shares_state
from inference.drafters.lookup import LookupDrafter
from inference.drafters.registry import make_drafter
from inference.engine import Engine, bucket, generated, make_engine
from inference.tuning import WIDTHS, in_turn, pass_seconds, tuned
from models.layout import by_rows, for_decoding
from models.load import Model, load
from models.params import nbytes
from ops.sampling import SamplingParams
from train.data.prompts import load_prompts

RATIOS = (1.0, 1.25, 1.5, 2.0)
"""Costs of a pass over a draft, in passes over one token, for which a speedup is modelled."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    model: str
    drafters: tuple[str, ...]
    prompts: tuple[str, ...]
    chat: bool
    count: int
    prompt_tokens: int
    new_tokens: int
    temperatures: tuple[str, ...]
    batches: tuple[str, ...]
    repeats: int
    seeds: tuple[int, ...]
    peers: bool
    assistant: str


def categories(settings: Settings, model: Model, split: Any) -> dict[str, list[list[int]]]:
    """The prompts of every category.

    Raises:
        ValueError: an entry that is not ``NAME=SOURCE``, or see
            :func:`train.data.prompts.load_prompts`.
    """
    found = {}
    for entry in settings.prompts:
        name, equals, source = entry.partition("=")
        if not equals or not source:
            raise ValueError(f"--prompts: {entry!r} is not NAME=SOURCE.")
        chat = settings.chat and not source.startswith("raw:")
        found[name] = load_prompts(
            [source.removeprefix("raw:")], split, model.tokenizer, settings.count,
            settings.prompt_tokens, seed=settings.seeds[0], chat=chat,
        )  # fmt: skip
    return found


def make_sides(
    settings: Settings, model: Model, seconds: dict[int, float], batch: int = 1
) -> dict[str, tuple[Any, Any]]:
    """Every drafter by name, with its params; plain decoding first.

    ``seconds`` of passes are those of ``batch`` rows, for which drafters are tuned.

    Raises:
        ValueError: an unknown drafter, or ``found:`` before one that does not search.
    """
    sides: dict[str, tuple[Any, Any]] = {"none": (NoDrafter(), None)}
    tuning = any(name.startswith("tuned:") for name in settings.drafters)
    prompts = other_prompts(settings, model) if tuning else []
    for name in settings.drafters:
        kind, _, wanted = name.partition(":")
        drafter, params = make_drafter(wanted if kind in ("tuned", "found") else name, model)
        params = by_rows(params)
        if kind == "found" and not hasattr(drafter, "search"):
            raise ValueError(f"{name!r}: {wanted} does not search. Write {wanted!r}.")
        if kind == "tuned":
            print(f"choosing a size for {wanted}", flush=True)
            drafter = tuned(model, drafter, params, prompts, seconds, batch=batch)
        sides[name] = drafter, params
    return sides


def other_prompts(settings: Settings, model: Model) -> list[list[int]]:
    """Up to four prompts of every category that are not asked, about twelve in all."""
    found = categories(settings, model, "train").values()
    each = max(1, min(4, 12 // len(found)))
    return [prompt for given in found for prompt in given[:each]]


def experience(
    settings: Settings, model: Model, engines: dict[str, Engine], capacity: int
) -> dict[str, Any]:
    """What every drafter that remembers has learnt from other prompts, decoded greedily."""
    greedy, eos = SamplingParams.make(), model.tokenizer.end_ids
    remembering = {name: e for name, e in engines.items() if shares_state(e.drafter)}
    prompts = other_prompts(settings, model) if remembering else []
    memories: dict[str, Any] = {}
    for name, engine in remembering.items():
        for prompt in prompts:
            _, state = measure.prefilled(
                engine, [prompt], settings.new_tokens, greedy, eos, capacity, memories.get(name)
            )()
            memories[name] = state.drafter
    return memories


def after_search(engines: dict[str, Engine]) -> dict[str, Engine]:
    """The engines; those of ``found:NAME`` draft with what was found and look no further."""

    def ended(engine: Engine) -> Engine:
        drafter: Any = engine.drafter
        return dataclasses.replace(engine, drafter=dataclasses.replace(drafter, search=False))

    return {n: ended(e) if n.startswith("found:") else e for n, e in engines.items()}


def slots(settings: Settings, engines: dict[str, Engine]) -> int:
    """Slots per row for every prompt and engine, or each length of a prompt would be compiled."""
    widest = max(engine.drafter.width for engine in engines.values())
    return bucket(bucket(settings.prompt_tokens) + settings.new_tokens + widest)


def decode_category(
    settings: Settings,
    model: Model,
    engines: dict[str, Engine],
    prompts: Sequence[Sequence[int]],
    temperature: float,
    peers: Peers | None,
    memories: dict[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, list[list[int]]]]:
    """Tokens per second of every side at batch 1, in turn, the counters of ours, and their texts.

    What a prompt teaches is there for the next one, but not for its own repeats.
    """
    sampling, eos = SamplingParams.make(temperature), model.tokenizer.end_ids
    names = [*engines, *(peers.sides if peers is not None and temperature == 0 else ())]
    capacity, memory = slots(settings, engines), dict(memories)
    seconds = {name: np.zeros(settings.repeats) for name in names}
    emitted = dict.fromkeys(names, 0)
    states: dict[str, list[Any]] = {name: [] for name in engines}
    texts: dict[str, list[list[int]]] = {name: [] for name in engines}
    for prompt in prompts:
        ways: dict[str, Callable[[], tuple[float, Any]]] = {
            name: measure.prefilled(
                engine, [prompt], settings.new_tokens, sampling, eos, capacity, memory.get(name)
            )
            for name, engine in engines.items()
        }
        for name in names[len(engines) :]:
            assert peers is not None
            ways[name] = functools.partial(peers.decode, name, prompt, settings.new_tokens)
        for repeat, name, (taken, made) in in_turn(ways, settings.repeats):
            if repeat:
                seconds[name][repeat - 1] += taken
            elif name in engines:
                emitted[name] += int(made.stats.emitted[0])
                states[name].append((made.stats, state_bytes(made)))
                texts[name].append(generated(made, [prompt])[0])
                if name in memory:
                    memory[name] = made.drafter
            else:
                emitted[name] += made
    rows: dict[str, dict[str, Any]] = {}
    rates = {name: emitted[name] / seconds[name] for name in names}
    for name in names:
        rows[name] = {
            "tokens_per_second": record.sample(rates[name].tolist()),
            "speedup": record.sample((rates[name] / rates["none"]).tolist()),
        }
        if name in engines:
            stats, sizes = zip(*states[name], strict=True)
            rows[name] |= counters(stats, model.cfg.num_layers) | {"state_bytes": sizes[0]}
    return rows, texts


def counters(stats: Sequence[Any], layers: int) -> dict[str, Any]:
    """Tokens per pass, passes over all layers per token, acceptance by position, over prompts."""
    stats = [jax.tree.map(np.asarray, one) for one in stats]
    rounds, emitted = (sum(int(getattr(s, n)[0]) for s in stats) for n in ("rounds", "emitted"))
    return {
        "tokens_per_pass": emitted / rounds,
        "layer_passes": sum(float(s.layer_passes[0]) for s in stats) / emitted / layers,
        "drafted_per_emitted": sum(int(s.drafted[0]) for s in stats) / emitted,
        "by_depth": (np.sum([s.by_depth[0] for s in stats], axis=0) / rounds).tolist(),
    }


def state_bytes(state: Any) -> int:
    """Bytes that a drafter remembers for one row."""
    return nbytes(state.drafter)


def make_engines(model: Model, sides: dict[str, tuple[Any, Any]]) -> dict[str, Engine]:
    """An engine for every drafter."""
    return {
        name: make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
        for name, (drafter, params) in sides.items()
    }


def batched(
    settings: Settings, model: Model, prompts: Sequence[Any], memories: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of greedy tokens per second against the batch, prefill not counted.

    Drafters are tuned for each batch, and begin with ``memories``.
    """
    greedy, eos = SamplingParams.make(), model.tokenizer.end_ids
    rows = []
    for batch in map(int, settings.batches):
        given = [prompts[i % len(prompts)] for i in range(batch)]
        seconds = pass_seconds(model, batch=batch)
        sides = make_sides(settings, model, seconds, batch)
        engines = after_search(make_engines(model, sides))
        ways = {
            name: measure.prefilled(
                engine, given, settings.new_tokens, greedy, eos, memory=memories.get(name)
            )
            for name, engine in engines.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for repeat, name, (taken, state) in in_turn(ways, settings.repeats):
            rates[name] += [int(np.sum(state.stats.emitted)) / taken] if repeat else []
        rows += [
            {
                "kind": "batch", "drafter": name, "batch": batch,
                "tokens_per_second": record.sample(rates[name]),
                "speedup": record.sample(
                    [a / b for a, b in zip(rates[name], rates["none"], strict=True)]
                ),
            }
            for name in engines
        ]  # fmt: skip
    return rows


def run(settings: Settings) -> list[dict[str, Any]]:
    """Rows of costs, of every side, category and temperature, of batches, and a mean per side.

    Raises:
        ValueError, FileNotFoundError: an unknown drafter or model, too few prompts, no greedy
            decoding, or ``transformers`` asked for and not installed.
    """
    if 0 not in map(float, settings.temperatures):
        raise ValueError("--temperatures: summaries are of greedy decoding, add 0.")
    model = load(settings.model)
    prompts = categories(settings, model, "test")
    peers = Peers(model, settings.assistant) if settings.peers else None
    model = for_decoding(model)
    seconds = pass_seconds(model, WIDTHS)
    rows: list[dict[str, Any]] = [
        {"kind": "cost", "width": w, "seconds": seconds[w], "ratio": seconds[w] / seconds[1]}
        for w in WIDTHS
    ]
    overhead = loop_overhead(model, settings.new_tokens, max(12, settings.repeats))
    rows.append({"kind": "overhead", "share": record.sample(overhead)})
    sides = make_sides(settings, model, seconds)
    engines = make_engines(model, sides)
    given = [prompt for each in prompts.values() for prompt in each]
    costs = {name: measure.draft_costs(model, *side, given[0]) for name, side in sides.items()}
    memories = experience(settings, model, engines, slots(settings, engines))
    engines = after_search(engines)
    greedy: dict[str, list[list[int]]] = {name: [] for name in engines}
    for category, given in prompts.items():
        for temperature in map(float, settings.temperatures):
            print(f"{category}, temperature {temperature:g}", flush=True)
            load_before = os.getloadavg()
            found, texts = decode_category(
                settings, model, engines, given, temperature, peers, memories
            )
            if temperature == 0:
                greedy = {name: [*greedy[name], *texts[name]] for name in engines}
            for name, row in found.items():
                rows.append(
                    {"kind": "side", "drafter": name, "category": category,
                     "temperature": temperature, "load_average": list(load_before)} | row
                )  # fmt: skip
                print(f"  {name:24} {row['tokens_per_second']['mean']:7.1f} tokens/s", flush=True)
    rows += batched(settings, model, next(iter(prompts.values())), memories)
    print("checking the texts", flush=True)
    return [*rows, *summaries(model, sides, costs, given, greedy, rows)]


def summaries(
    model: Model,
    sides: dict[str, tuple[Any, Any]],
    costs: dict[str, tuple[float, float]],
    given: Sequence[Sequence[int]],
    texts: dict[str, list[list[int]]],
    rows: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """A row per side of ours: exactness, cost of a draft, memory, speedups modelled and mean.

    Args:
        costs: see :func:`experiments.measure.draft_costs`.
        texts: what each side generated after each of the prompts ``given``, greedily.
        rows: those of every side, category and temperature.
    """
    out = []
    checked: dict[str, measure.Exactness] = {}  # most sides write the same
    overhead = next(row for row in rows if row["kind"] == "overhead")
    for name, (drafter, params) in sides.items():
        written = str(texts[name])
        if written not in checked:
            unknown = [None] * len(given)
            checked[written] = measure.exactness(model, given, texts[name], unknown)
        mine = [r for r in rows if r["kind"] == "side" and r["drafter"] == name]
        greedy = {r["category"]: r for r in mine if r["temperature"] == 0}
        cost = own_layers(list(greedy.values()))
        if not cost:
            drafted = [r["drafted_per_emitted"] * r["tokens_per_pass"] for r in greedy.values()]
            fixed, each = costs[name]
            cost = fixed + each * float(np.mean(drafted))
        per_pass = float(np.mean([r["tokens_per_pass"] for r in greedy.values()]))
        averaged = AVERAGED if set(AVERAGED) <= greedy.keys() else tuple(greedy)
        named = [greedy[c] for c in averaged]
        samples = zip(*(r["speedup"]["samples"] for r in named), strict=True)
        best = max(greedy.values(), key=lambda r: r["speedup"]["mean"])
        out.append(
            {
                "kind": "summary",
                "method": name,
                "width": drafter.width,
                "lengths": drafter.lengths if isinstance(drafter, LookupDrafter) else None,
                "tokens_per_pass": per_pass,
                "draft_cost": cost,
                "param_bytes": sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params)),
                "state_bytes": max(r["state_bytes"] for r in mine),
                "exactness": dataclasses.asdict(checked[written]),
                "modelled": {f"{c:g}": per_pass / (c + cost) for c in RATIOS},
                "overhead": float(np.median(overhead["share"]["samples"])),
                "mean_of": averaged,
                "mean_speedup": record.sample([float(np.mean(x)) for x in samples]),
                "best_category": best["category"],
                "best_speedup": best["speedup"],
            }
        )
    return out


def own_layers(rows: Sequence[dict[str, Any]]) -> float:
    """What a draft takes if the model drafts for itself: the layers it ran, as passes over all.

    Reading tokens out is not counted. 0 for other drafters.
    """
    shares = [row["layer_passes"] * row["tokens_per_pass"] - 1 for row in rows]
    return max(0.0, round(float(np.mean(shares)), 6))


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    try:
        rows = run(settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    found = [row for row in rows if row["kind"] == "summary"]
    for row in found:
        print(
            f"{row['method']:24} {row['tokens_per_pass']:.2f} tokens per pass  mean "
            f"{row['mean_speedup']['mean']:.2f}x  best {row['best_speedup']['mean']:.2f}x "
            f"({row['best_category']})"
        )
    answers = statements.answer(found, STATEMENTS, settings.repeats)
    print(statements.show(answers))
    name = record.name_of("speculative_bench", settings.model, flags.FLAGS.label)
    folder = pathlib.Path(flags.FLAGS.out) if flags.FLAGS.out else None
    path = record.save(
        name, rows, config=settings, seeds=settings.seeds, statements=answers, folder=folder,
        timing={"memory_bandwidth_gb_s": record.memory_bandwidth()},
    )  # fmt: skip
    print("saved", path)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "python-5m", "The model.")
    flags.DEFINE_list(
        "drafters", ["lookup", "tuned:lookup", "tuned:recycling"], "NAME or tuned:NAME."
    )
    flags.DEFINE_list("prompts", ["code=python_stdlib"], "NAME=SOURCE or NAME=raw:SOURCE.")
    flags.DEFINE_bool("chat", False, "JSON lines are a user's turns in the chat template.")
    flags.DEFINE_integer("count", 6, "Prompts of a category.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 192, "Tokens of a prompt, at most.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 128, "Tokens to generate.", lower_bound=1)
    flags.DEFINE_list("temperatures", ["0", "1"], "Sampling temperatures; 0 is greedy.")
    flags.DEFINE_list("batches", ["1", "4"], "Batches of prompts, greedily.")
    flags.DEFINE_integer("repeats", 3, "Timed repeats after the first.", lower_bound=1)
    flags.DEFINE_list("seeds", ["0"], "The first chooses prompts.")
    flags.DEFINE_bool("peers", False, "Also transformers' prompt lookup and assisted generation.")
    flags.DEFINE_string(
        "assistant", "", "A model with the same tokenizer, for assisted generation."
    )
    flags.DEFINE_string("label", "", "Ending of the result's name.")
    flags.DEFINE_string("out", "", "Folder of the result; default: the committed ones.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
