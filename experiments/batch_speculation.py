"""Batched speculation: equivalence, target passes, grouping, bytes moved and throughput.

    python -m experiments.batch_speculation --model=python-5m --draft_model=python-1m

Prompts of mixed lengths with answers of mixed lengths, greedy, through static batches (a batch
waits for its slowest row), a pool that is filled again as rows end, EXSPEC's grouping by length,
and static batches in the paper's padded form, whose cache is realigned after every round; the
ragged cache copies nothing. What must hold is answered by :mod:`experiments.batch_statements`.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.batch_statements import BATCHED
from experiments.settings import from_flags
from inference.batching import Batching, Job
from inference.drafters.draft_model import draft_model
from inference.engine import Engine, bucket, make_engine
from inference.scheduler import SameLength, Scheduler
from models import decoder
from models.load import Model, load
from research.speculative.batch_spec.equivalence import (
    Outcome,
    Reference,
    check_permutation,
    check_poison,
    compare,
    reference,
)
from research.speculative.batch_spec.padded import FAULTS, Fault, PaddedDecoder
from train.data.prompts import load_prompts

KINDS = ("plain", "realigned", "static", "pool", "exspec")
"""Plain decoding in static batches; speculation in padded ones and in ragged ones; speculation in a
pool, and by EXSPEC."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; see the flags."""

    model: str
    draft_model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    count: int
    shortest: int
    longest: int
    new_tokens: int
    k: int
    batches: tuple[int, ...]
    window: int
    compared: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts, how many tokens each gets, and the models that decode them."""

    prompts: list[list[int]]
    new: list[int]
    plain: Engine
    speculative: Engine
    padded: PaddedDecoder
    eos: tuple[int, ...]

    @property
    def capacity(self) -> int:
        """Slots that hold any of the texts with a draft."""
        longest = max(len(p) + n for p, n in zip(self.prompts, self.new, strict=True))
        return bucket(longest + self.speculative.drafter.width)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Texts in the order of the prompts, and what it took."""

    texts: list[list[int]]
    forwards: int
    seconds: float
    grouping_rate: float = 0.0
    slots_read: int = 0
    copied: int = 0  # bytes
    realigning: float = 0.0  # seconds


def make_work(settings: Settings, model: Model, draft: Model, seed: int) -> Work:
    """Prompts of ``shortest`` to ``longest`` tokens and answers of a quarter to all of the most."""
    rng = np.random.default_rng([seed, settings.count])
    whole = load_prompts(
        settings.prompts, "test", model.tokenizer, settings.count, settings.longest, 300 + seed
    )
    sizes = rng.integers(settings.shortest, settings.longest + 1, settings.count)
    new = rng.integers(settings.new_tokens // 4, settings.new_tokens + 1, settings.count)
    drafter, params = draft_model(model.cfg, draft.params, draft.cfg, settings.k, sampled=False)
    plain = make_engine(model.params, model.cfg)
    eos = tuple(model.tokenizer.end_ids)
    if len(eos) > 1:
        raise ValueError(f"the padded form knows one end token, and the model has {len(eos)}.")
    padded = PaddedDecoder(
        plain.params, model.cfg, decoder.unstack(draft.params), draft.cfg, settings.k,
        eos=eos[0] if eos else None,
    )  # fmt: skip
    return Work(
        [p[:n] for p, n in zip(whole, sizes.tolist(), strict=True)],
        new.tolist(),
        plain,
        dataclasses.replace(plain, drafter=drafter, drafter_params=params),
        padded,
        eos,
    )


def decode_static(engine: Engine, work: Work, batch: int) -> Decoded:
    """Batches in the order of the prompts; finished rows stand still until the last one ends.

    A batch of requests is given to a pool of as many rows, one batch after the other.
    """
    texts, forwards, slots, begin = [], 0, 0, time.perf_counter()
    for start in range(0, len(work.prompts), batch):
        here = slice(start, start + batch)
        # One call ends only when all rows have: no row is filled again in between.
        pool = Batching(engine, batch, work.capacity, eos=work.eos, rounds_per_call=10**6)
        texts += [r.tokens for r in pool.generate(_jobs(work, here))]
        forwards += pool.counters.forwards
        slots += pool.counters.slots_read
    return Decoded(texts, forwards, time.perf_counter() - begin, slots_read=slots)


def decode_realigned(work: Work, batch: int) -> Decoded:
    """Static batches in the padded form; as many slots in each, so that few programs are compiled.

    A round in which all rows of a batch grow alike moves no padding and copies nothing.
    """
    slots = bucket(max(map(len, work.prompts)) + max(work.new) + work.padded.k + 1)
    texts, rounds, copied, begin = [], [], 0, time.perf_counter()
    for start in range(0, len(work.prompts), batch):
        here = slice(start, start + batch)
        prompts = work.prompts[here]
        new, took = work.padded.generate(prompts, work.new[here], slots)
        texts, rounds = [*texts, *new], [*rounds, *took]
        copied += sum(
            work.padded.bytes_per_realignment(len(prompts), r.length[1]) for r in took if r.moved
        )
    seconds = time.perf_counter() - begin
    return Decoded(
        texts, len(rounds), seconds, slots_read=slots * len(rounds), copied=copied,
        realigning=sum(r.realigning for r in rounds),
    )  # fmt: skip


def decode_pool(work: Work, batch: int, scheduler: Scheduler | None, rows: int) -> Decoded:
    """All requests at once to a pool, which takes them as rows fall free."""
    begin = time.perf_counter()
    rounds = 4 if scheduler is None else 1
    pool = Batching(
        work.speculative, rows, work.capacity, scheduler, eos=work.eos, rounds_per_call=rounds
    )
    texts = [r.tokens for r in pool.generate(_jobs(work, slice(None)))]
    counters = pool.counters
    return Decoded(
        texts,
        counters.forwards,
        time.perf_counter() - begin,
        counters.grouping_rate,
        counters.slots_read,
    )


def _jobs(work: Work, part: slice) -> list[Job]:
    pairs = zip(work.prompts[part], work.new[part], strict=True)
    return [Job(prompt, new) for prompt, new in pairs]


def decode(settings: Settings, work: Work, kind: str, batch: int) -> Decoded:
    """One way to decode everything; see :data:`KINDS`."""
    if kind == "plain":
        return decode_static(work.plain, work, batch)
    if kind == "realigned":
        return decode_realigned(work, batch)
    if kind == "static":
        return decode_static(work.speculative, work, batch)
    if kind == "pool":
        return decode_pool(work, batch, None, batch)
    window = max(settings.window, batch)
    return decode_pool(work, batch, SameLength(batch, window), window)


def cut(want: Reference, new: Sequence[int]) -> Reference:
    """The reference of shorter answers."""
    pairs = list(zip(want.texts, want.margins, new, strict=True))
    return Reference([t[:n] for t, _, n in pairs], [m[:n] for _, m, n in pairs])


def narrow(work: Work) -> Work:
    """The same requests cut to nearly one length, the shortest first."""
    shortest = min(len(p) for p in work.prompts)
    return dataclasses.replace(work, prompts=sorted((p[:shortest] for p in work.prompts), key=len))


def check_faults(
    settings: Settings, work: Work, want: Reference
) -> Iterator[tuple[Fault | None, Outcome]]:
    """What every mistake of the padded form does to the first prompts."""
    rows = slice(0, settings.compared)
    new = min(work.new[rows])
    right = cut(Reference(want.texts[rows], want.margins[rows]), [new] * settings.compared)
    for fault in (None, *FAULTS):
        one = dataclasses.replace(work.padded, eos=None, fault=fault)
        texts, _ = one.generate(work.prompts[rows], new)
        yield fault, compare(right, texts)


def measure_seed(
    settings: Settings, model: Model, draft: Model, seed: int
) -> dict[str, dict[str, Any]]:
    """Everything of one seed, by method. Each way runs once before it is timed: that compiles."""
    work = make_work(settings, model, draft, seed)
    whole = reference(work.plain, work.prompts, settings.new_tokens, work.eos)
    want = cut(whole, work.new)
    rows: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        for batch in settings.batches:
            if kind == "exspec" and batch == 1:
                continue
            print(f"{kind}, batch {batch}, seed {seed}", flush=True)
            decode(settings, work, kind, batch)
            rows[f"{kind}-{batch}"] = _decoded(decode(settings, work, kind, batch), want)
    big = max(settings.batches)

    def pooled(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        jobs = [Job(prompt, settings.new_tokens) for prompt in prompts]
        pool = Batching(work.speculative, big, work.capacity, eos=work.eos)
        return [r.tokens for r in pool.generate(jobs)]

    part = slice(0, settings.compared)
    first = Reference(whole.texts[part], whole.margins[part])
    rows["permuted"] = _outcome(check_permutation(pooled, work.prompts, whole, seed))
    rows["poisoned"] = _outcome(
        check_poison(work.speculative, work.prompts[part], first, settings.new_tokens, work.eos)
    )
    for fault, outcome in check_faults(settings, work, want):
        rows[f"padded-{fault}" if fault else "padded"] = _outcome(outcome)
    group = max(2, min(4, big))
    rows["random"] = {"grouping_rate": decode(settings, work, "exspec", group).grouping_rate}
    alike = decode(settings, narrow(work), "exspec", group)
    rows["narrow"] = {"grouping_rate": alike.grouping_rate}
    return rows


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {"outcome": dataclasses.asdict(outcome)}


def _decoded(out: Decoded, want: Reference) -> dict[str, Any]:
    tokens = sum(map(len, out.texts))
    return _outcome(compare(want, out.texts)) | {
        "passes_per_token": out.forwards / tokens,
        "tokens_per_second": tokens / out.seconds,
        "slots_read_per_pass": out.slots_read / out.forwards,
        "grouping_rate": out.grouping_rate,
        "copied_per_token": out.copied / tokens,
        "realigning_share": out.realigning / out.seconds,
        "load_average": list(os.getloadavg()),
    }


def summarise(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the result: samples over seeds, outcomes added up."""
    row: dict[str, Any] = {"method": method}
    for name in runs[0]:
        if name == "outcome":
            row[name] = {k: sum(r[name][k] for r in runs) for k in runs[0][name]}
        elif name == "load_average":
            row[name] = [r[name] for r in runs]
        else:
            row[name] = record.sample([r[name] for r in runs])
    return row


def run(settings: Settings) -> list[dict[str, Any]]:
    """All ways to decode, all batch sizes, all seeds."""
    model, draft = load(settings.model), load(settings.draft_model)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        for method, row in measure_seed(settings, model, draft, seed).items():
            by_method.setdefault(method, []).append(row)
    return [summarise(method, runs) for method, runs in by_method.items()]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    lines = [f"{'method':18} {'passes/token':>12} {'tokens/s':>9} {'grouped':>8}  exact/tie/wrong"]
    for r in rows:
        numbers = "".join(
            f" {r[name]['mean']:{width}}" if name in r else " " * (int(width.split(".")[0]) + 1)
            for name, width in (
                ("passes_per_token", "12.3f"), ("tokens_per_second", "9.1f"),
                ("grouping_rate", "8.2f"),
            )
        )  # fmt: skip
        counts = "/".join(str(n) for n in r["outcome"].values()) if "outcome" in r else ""
        lines.append(f"{r['method']:18}{numbers}  {counts}")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    given = from_flags(Settings)
    settings = dataclasses.replace(given, batches=tuple(int(b) for b in given.batches))
    rows = run(settings)
    print(show(rows))
    timing = {"memory_bandwidth_gb_s": record.memory_bandwidth()}
    name = record.name_of("batch_speculation", settings.model)
    statements.conclude(name, rows, BATCHED, settings, timing)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "python-5m", "The target.")
    flags.DEFINE_string("draft_model", "python-1m", "The draft model.")
    flags.DEFINE_list("prompts", ["python_stdlib"], "python_stdlib, text:PATH, in turn.")
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds of prompts, their lengths and those of answers.")
    flags.DEFINE_integer("count", 48, "Requests per seed.")
    flags.DEFINE_integer("shortest", 8, "Tokens of the shortest prompts.")
    flags.DEFINE_integer("longest", 96, "Tokens of the longest prompts.")
    flags.DEFINE_integer("new_tokens", 64, "Most tokens of an answer; the least are a quarter.")
    flags.DEFINE_integer("k", 5, "Drafted tokens per round.")
    flags.DEFINE_list("batches", ["1", "2", "4", "8", "16"], "Rows that are decoded together.")
    flags.DEFINE_integer("window", 48, "Rows that EXSPEC chooses from.")
    flags.DEFINE_integer("compared", 8, "Prompts for the padded form and for poisoned slots.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
