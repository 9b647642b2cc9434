"""Superposed Decoding against sampling, beam search and n-grams alone, graded by a model.

    python -m experiments.superposed --model=python-5m

Tables are counted on the corpus' training split, alpha and temperature chosen on its validation
split, and everything compared on pieces of its test split, which every seed draws anew. The grader
reads each text by itself: the same model, without superposition, unless another one is named.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.grading import Texts, distinct, grade
from experiments.settings import from_flags
from experiments.statements import Statement, value
from inference.engine import Engine, as_ids, make_engine
from models import decoder
from models.load import Model, load
from ops.sampling import SamplingParams
from research.speculative.superposed.baselines import beam_search, ngram_generate
from research.speculative.superposed.drafts import (
    WEIGHTS,
    Superposition,
    draft_weights,
)
from research.speculative.superposed.generate import (
    start_drafts,
    superposed_generate,
    superposed_step,
)
from research.speculative.superposed.ngrams import NGramTables, count_ngrams
from train.data.corpus import load_corpus
from train.data.prompts import corpus_pieces
from train.data.tokens import tokenize

NUCLEUS = SamplingParams.make(0.6, top_p=0.9)
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
TEMPERATURES = (0.04, 0.06, 0.1, 0.2, 0.3)
METHODS = ("greedy", "nucleus", "nucleus-k", "beam", "ngrams", "superposed", "unsmoothed")

STATEMENTS = (
    Statement(
        "the best superposed draft is at least as likely as one nucleus sample",
        ("superposed", "nucleus"),
        lambda rows, seed: (
            value(rows["superposed"], "best", seed) <= value(rows["nucleus"], "best", seed)
        ),
    ),
    Statement(
        "smoothing by n-grams makes the drafts likelier in the mean",
        ("superposed", "unsmoothed"),
        lambda rows, seed: (
            value(rows["superposed"], "mean", seed) <= value(rows["unsmoothed"], "mean", seed)
        ),
    ),
    Statement(
        "n-grams alone are at least three times as perplexing as superposed drafts",
        ("ngrams", "superposed"),
        lambda rows, seed: (
            value(rows["ngrams"], "mean", seed) >= 3 * value(rows["superposed"], "mean", seed)
        ),
    ),
    Statement(
        "k drafts take the passes of one text, a k-th of those of k samples",
        ("superposed", "greedy", "nucleus-k"),
        lambda rows, seed: (
            value(rows["superposed"], "passes", seed)
            == value(rows["greedy"], "passes", seed)
            < value(rows["nucleus-k"], "passes", seed)
        ),
    ),
    Statement(
        "the model is less linear at the last token than at the second",
        ("superposed",),
        lambda rows, seed: (
            value(rows["superposed"]["linearity"][-1], "raw", seed)
            < value(rows["superposed"]["linearity"][1], "raw", seed)
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    model: str
    grader: str
    corpus: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    count: int
    tuned_on: int
    prompt_tokens: int
    new_tokens: int
    drafts: int
    max_order: int
    timed: bool


def make_tables(model: Model, corpus: str, max_order: int) -> NGramTables:
    """Tables of the corpus' training split, on the device."""
    tokens = tokenize(load_corpus(corpus, "train"), model.tokenizer)
    tables = count_ngrams(
        np.asarray(tokens.ids, np.int64),
        tokens.offsets,
        model.cfg.vocab_size,
        max_order,
        model.tokenizer.fingerprint,
    )
    return jax.tree.map(jnp.asarray, tables)


def pieces(
    model: Model, corpus: str, split: str, count: int, length: int, seed: int
) -> list[list[int]]:
    """Pieces of a split as prompts.

    Raises:
        ValueError: the split has fewer.
    """
    texts = [document.text for document in load_corpus(corpus, split)]
    rng = np.random.default_rng(seed)
    found = list(itertools.islice(corpus_pieces(texts, model.tokenizer, length, rng), count))
    if len(found) < count:
        raise ValueError(
            f"the {split} split of {corpus} gave {len(found)} prompts of {length} tokens, {count} "
            "are asked for: ask for fewer or shorter ones."
        )
    return found


def tune(
    engine: Engine, grader: Model, tables: NGramTables, prompts: Sequence[list[int]], s: Settings
) -> tuple[Superposition, Superposition, list[dict[str, float]]]:
    """The best settings on validation prompts, with and without smoothing, and the whole grid.

    Chosen by the mean perplexity over all drafts. Without smoothing only temperature matters.
    """
    grid = []
    for alpha, heat in [
        *itertools.product(ALPHAS, TEMPERATURES),
        *((0.0, t) for t in TEMPERATURES),
    ]:
        out = superposed_generate(
            engine,
            prompts,
            s.new_tokens,
            _superposition(s, alpha, heat),
            tables if alpha else None,
        )
        found = grade(grader, prompts, out.tokens)
        grid.append({"alpha": alpha, "temperature": heat, "mean": float(np.mean(found))})

    def best(smoothed: bool) -> Superposition:
        cell = min((c for c in grid if bool(c["alpha"]) == smoothed), key=lambda c: c["mean"])
        return _superposition(s, cell["alpha"], cell["temperature"])

    return best(True), best(False), grid


def _superposition(s: Settings, alpha: float, temperature: float) -> Superposition:
    weights = WEIGHTS[: s.max_order - 1]
    return Superposition.make(s.drafts, alpha=alpha, temperature=temperature, weights=weights)


def linearity(
    engine: Engine,
    tables: NGramTables,
    prompts: Sequence[list[int]],
    settings: Superposition,
    new_tokens: int,
) -> list[dict[str, float]]:
    """How linear the model is, step by step: cosine of LM(mix) and the mix of LM(each draft).

    ``raw`` compares logits as they are, ``centred`` after subtracting their mean over the
    vocabulary, which no law depends on.
    """
    drafts, cache, extent = start_drafts(engine, prompts, new_tokens, settings.drafts)
    limit, p = drafts.length + new_tokens, len(prompts)

    @jax.jit
    def step(params: Any, cache: Any, drafts: Any, tables: Any, first: Any) -> Any:
        last = jnp.repeat(drafts.length - 1, settings.drafts)
        rows = drafts.tokens[:, :, : max(map(len, prompts)) + new_tokens]
        texts = jnp.maximum(rows, 0).reshape(-1, rows.shape[2])
        hidden = decoder.forward(params, engine.cfg, texts).hidden
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        each = decoder.unembed(params, engine.cfg, hidden).reshape(p, settings.drafts, -1)
        mixed = jnp.sum(draft_weights(drafts.scores)[..., None] * each, axis=1)
        cache, new, logits = superposed_step(
            params, engine.cfg, engine.policy_in_force, cache, drafts, settings, tables,
            as_ids(()), first, limit, extent,
        )  # fmt: skip
        cosines = jnp.stack([_cosine(logits, mixed), _cosine(_centred(logits), _centred(mixed))])
        return cache, new, jnp.mean(cosines, axis=1)

    curve = []
    for i in range(new_tokens):
        cache, drafts, cosines = step(engine.params, cache, drafts, tables, i == 0)
        curve.append({"raw": float(cosines[0]), "centred": float(cosines[1])})
    return curve


def _centred(x: Any) -> Any:
    return x - jnp.mean(x, axis=-1, keepdims=True)


def _cosine(a: Any, b: Any) -> Any:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / norms


def makers(
    engine: Engine,
    tables: NGramTables,
    smoothed: Superposition,
    unsmoothed: Superposition,
    s: Settings,
) -> dict[str, Callable[[Sequence[list[int]], int], tuple[Texts, int]]]:
    """By method: texts for prompts and a seed, and the rows that passes of the model had."""

    def sampled(prompts: Any, seed: int, copies: int, sampling: SamplingParams) -> Any:
        every = [prompt for prompt in prompts for _ in range(copies)]
        seeds = np.arange(len(every)) + 10_000 * seed
        out = engine.generate(every, s.new_tokens, sampling=sampling, seeds=seeds.tolist())
        grouped = [out.tokens[i : i + copies] for i in range(0, len(every), copies)]
        return grouped, int(np.sum(out.stats.rounds)) // len(prompts)

    def drafted(out: Any) -> Any:
        return out.tokens, out.passes * out.rows_per_prompt

    def mixed(prompts: Any, settings: Superposition, tables: Any) -> Any:
        return drafted(superposed_generate(engine, prompts, s.new_tokens, settings, tables))

    weights = WEIGHTS[: s.max_order - 1]
    return {
        "greedy": lambda x, _: sampled(x, 0, 1, SamplingParams.make()),
        "nucleus": lambda x, seed: sampled(x, seed, 1, NUCLEUS),
        "nucleus-k": lambda x, seed: sampled(x, seed, s.drafts, NUCLEUS),
        "beam": lambda x, _: drafted(beam_search(engine, x, s.new_tokens, s.drafts)),
        "ngrams": lambda x, _: ([[t] for t in ngram_generate(tables, x, s.new_tokens, weights)], 0),
        "superposed": lambda x, _: mixed(x, smoothed, tables),
        "unsmoothed": lambda x, _: mixed(x, unsmoothed, None),
    }


def run(s: Settings) -> list[dict[str, Any]]:
    """All methods on all seeds' prompts, summarised."""
    model = load(s.model)
    grader = load(s.grader) if s.grader else model
    if grader.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise ValueError(f"{s.grader} has another tokenizer than {s.model}: name another grader.")
    engine = make_engine(model.params, model.cfg)
    begin = time.perf_counter()
    tables = make_tables(model, s.corpus, s.max_order)
    print(
        f"{tables.nbytes / 1e6:.0f} MB of tables in {time.perf_counter() - begin:.0f} s", flush=True
    )
    validation = pieces(model, s.corpus, "validation", s.tuned_on, s.prompt_tokens, 100)
    smoothed, unsmoothed, grid = tune(engine, grader, tables, validation, s)
    rows: dict[str, list[dict[str, Any]]] = {}
    by_method = makers(engine, tables, smoothed, unsmoothed, s)
    for seed in s.seeds:
        prompts = pieces(model, s.corpus, "test", s.count, s.prompt_tokens, 200 + seed)
        for method in s.methods:
            print(f"{method}, seed {seed}", flush=True)
            texts, passes = by_method[method](prompts, seed)
            row = _measured(grader, prompts, texts) | {"passes": passes}
            if s.timed:  # the first call compiled
                begin = time.perf_counter()
                by_method[method](prompts, seed)
                row["seconds"] = time.perf_counter() - begin
            if method == "superposed":
                row["linearity"] = linearity(engine, tables, prompts, smoothed, s.new_tokens)
            rows.setdefault(method, []).append(row)
    chosen = {"superposed": (smoothed, grid, tables.nbytes), "unsmoothed": (unsmoothed, grid, 0)}
    return [_summarise(method, runs, chosen.get(method)) for method, runs in rows.items()]


def _measured(grader: Model, prompts: Sequence[list[int]], texts: Texts) -> dict[str, Any]:
    found = np.sort(grade(grader, prompts, texts), axis=1)
    return {
        "best": float(np.mean(found[:, 0])),
        "mean": float(np.mean(found)),
        "ranked": np.mean(found, axis=0).tolist(),
        "distinct1": distinct(texts, 1),
        "distinct2": distinct(texts, 2),
    }


def _summarise(method: str, runs: list[dict[str, Any]], chosen: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "lossless": chosen is None}
    for name in ("best", "mean", "distinct1", "distinct2", "passes", "seconds"):
        if name in runs[0]:
            row[name] = record.sample([r[name] for r in runs])
    row["ranked"] = [record.sample(x) for x in zip(*(r["ranked"] for r in runs), strict=True)]
    if "linearity" in runs[0]:
        row["linearity"] = [
            {name: record.sample([one[name] for one in step]) for name in ("raw", "centred")}
            for step in zip(*(r["linearity"] for r in runs), strict=True)
        ]
    if chosen is not None:
        settings, grid, nbytes = chosen
        # As they stand in the grid: float32 holds 0.2 as 0.2000000029.
        row["alpha"] = round(float(settings.alpha), 6)
        row["temperature"] = round(float(settings.temperature), 6)
        row["grid"], row["table_bytes"] = grid, nbytes
    return row


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    lines = [
        f"{'method':12} {'best':>8} {'mean':>8} {'dist-1':>7} {'dist-2':>7} {'passes':>7} {'s':>7}"
    ]
    for r in rows:
        cells = [f"{r['method']:12}"]
        for name, width in (("best", 8), ("mean", 8), ("distinct1", 7), ("distinct2", 7)):
            cells.append(f"{r[name]['mean']:{width}.2f}")
        seconds = f"{r['seconds']['mean']:7.2f}" if "seconds" in r else " " * 7
        cells += [f"{r['passes']['mean']:7.0f}", seconds]
        lines.append(" ".join(cells))
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    rows = run(settings)
    print(show(rows))
    name = record.name_of("superposed", settings.model)
    statements.conclude(name, rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "python-5m", "The model that drafts.")
    flags.DEFINE_string("grader", "", "A model with its tokenizer; empty: the model itself.")
    flags.DEFINE_string("corpus", "python_stdlib", "python_stdlib, python_packages or text:PATH.")
    flags.DEFINE_list("methods", list(METHODS), "What to compare.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the prompts.")
    flags.DEFINE_integer("count", 500, "Held-out prompts per seed.", lower_bound=1)
    flags.DEFINE_integer("tuned_on", 200, "Validation prompts.", lower_bound=1)
    flags.DEFINE_integer("prompt_tokens", 15, "Tokens of every prompt.")
    flags.DEFINE_integer("new_tokens", 10, "Tokens of every draft.")
    flags.DEFINE_integer("drafts", 3, "Drafts of every prompt.")
    flags.DEFINE_integer("max_order", 6, "Longest n-grams.", lower_bound=2, upper_bound=6)
    flags.DEFINE_bool("timed", False, "Also measure seconds: only while nothing else runs.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
