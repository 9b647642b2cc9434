"""Token Recycling alone: how its matrix learns, and what its tree and updates are worth.

    python -m experiments.recycling --model=python-5m

Prompts follow each other at batch 1, greedily, and the matrix goes from one to the next, cold at
the first. Rivals through the same loop: prompt lookup, a frozen table of corpus bigrams in the same
tree, and the method with a part taken away. Every seed draws its own prompts.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import measure, record, replay, statements
from experiments.exactness import EXACT
from experiments.settings import define_shared_flags, from_flags
from experiments.statements import Statement, at_least, value
from inference.drafter import Drafter, NoDrafter, shares_state
from inference.drafters.lookup import LookupDrafter
from inference.engine import make_engine
from models.load import Model, load
from ops.tree import chain_tree
from research.speculative.token_recycling.drafter import TokenRecycling, bigram_matrix
from train.data.corpus import load_corpus
from train.data.prompts import load_prompts

METHODS: dict[str, Drafter] = {
    "recycling": TokenRecycling(),
    "accepted": TokenRecycling(update="accepted"),
    "frozen": TokenRecycling(update="none"),
    "chain": TokenRecycling(tree=chain_tree(6)),
    "bigrams": TokenRecycling(update="none"),
    "lookup": LookupDrafter(),
}
"""``frozen`` goes on with what ``recycling`` had learnt from the first prompts, and decodes those
prompts again: only its last ones compare."""

STATEMENTS = (
    Statement(
        "after warm-up a pass gives more than 1.5 tokens",
        ("recycling",),
        lambda rows, seed: value(rows["recycling"], "last", seed) > 1.5,
    ),
    Statement(
        "the last half of the prompts goes better than the first five",
        ("recycling",),
        lambda rows, seed: (
            value(rows["recycling"], "last", seed) > value(rows["recycling"], "first", seed)
        ),
    ),
    Statement(
        "learning from all nodes is at least as good as from accepted ones",
        ("recycling", "accepted"),
        at_least("recycling", "accepted", "tokens_per_pass"),
    ),
    Statement(
        "the tree beats a chain of 6 from the same kind of matrix",
        ("recycling", "chain"),
        at_least("recycling", "chain", "tokens_per_pass"),
    ),
    Statement(
        "recycling beats a frozen table of corpus bigrams in the same tree",
        ("recycling", "bigrams"),
        at_least("recycling", "bigrams", "last"),
    ),
    Statement(
        "recycling beats prompt lookup",
        ("recycling", "lookup"),
        at_least("recycling", "lookup", "last"),
    ),
    EXACT,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    model: str
    prompts: tuple[str, ...]
    chat: bool
    bigrams: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    count: int
    prompt_tokens: int
    new_tokens: int
    frozen_after: int
    checked: int


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The texts of one method in order, what each took, and what the drafter knew at the end."""

    texts: list[list[int]]
    rounds: list[int]
    by_depth: np.ndarray  # (prompts, depth)
    states: list[Any]

    def per_pass(self, part: slice = slice(None)) -> float:
        """Tokens per target pass over some of the prompts."""
        return sum(map(len, self.texts[part])) / sum(self.rounds[part])


def decode(
    model: Model,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    memory: Any = None,
) -> Decoded:
    """One prompt after the other, handing on what the drafter learnt."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    texts, rounds, by_depth, states = [], [], [], []
    for prompt in prompts:
        out = engine.generate(
            [prompt], new_tokens, eos=model.tokenizer.end_ids, drafter_state=memory
        )
        memory = out.drafter_state
        texts.append(out.tokens[0])
        rounds.append(int(out.stats.rounds[0]))
        by_depth.append(out.stats.by_depth[0])
        states.append(memory if shares_state(drafter) else None)
    return Decoded(texts, rounds, np.asarray(by_depth), states)


def duplicates(passes: Sequence[replay.Pass]) -> float:
    """Share of drafted nodes that repeat an earlier sibling's token."""
    repeated = total = 0
    for one in passes:
        seen = set()
        for pair in zip(one.parent.tolist()[1:], one.tokens.tolist()[1:], strict=True):
            repeated += pair in seen
            total += 1
            seen.add(pair)
    return repeated / max(total, 1)


def measure_method(
    settings: Settings,
    model: Model,
    method: str,
    params: Any,
    prompts: Sequence[Sequence[int]],
    learnt: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """What one method does on one seed's prompts, and the states after each of them."""
    drafter = METHODS[method]
    memory = learnt if method == "frozen" else None
    out = decode(model, drafter, params, prompts, settings.new_tokens, memory)
    shown = min(5, len(prompts))
    before = out.states[-shown - 1] if shares_state(drafter) and len(prompts) > shown else memory
    passes = [
        replay.passes_of(model, drafter, params, list(prompt), settings.new_tokens, state)
        for prompt, state in zip(prompts[-shown:], [before, *out.states[-shown:-1]], strict=True)
    ]
    plain = decode(
        model,
        NoDrafter(drafter.width),
        None,
        prompts[: settings.checked],
        settings.new_tokens,
    )
    same_width = [*plain.texts, *[None] * (len(prompts) - len(plain.texts))]
    return {
        "tokens_per_pass": out.per_pass(),
        "first": out.per_pass(slice(0, 5)),
        "last": out.per_pass(slice(len(prompts) // 2, None)),
        "by_prompt": [out.per_pass(slice(i, i + 1)) for i in range(len(prompts))],
        "by_depth": (out.by_depth.sum(0) / sum(out.rounds)).tolist(),
        "duplicates": duplicates(list(itertools.chain.from_iterable(passes))),
        "exactness": dataclasses.asdict(measure.exactness(model, prompts, out.texts, same_width)),
    }, out.states


def corpus_bigrams(model: Model, corpus: str) -> Any:
    """The frozen table: each token's most frequent successors in the corpus' training split."""

    def tokens() -> Iterator[int]:
        for document in load_corpus(corpus, "train"):
            yield from model.tokenizer.encode(document.text)

    return jnp.asarray(bigram_matrix(np.fromiter(tokens(), np.int32), model.cfg.vocab_size))


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods on all seeds' prompts, summarised."""
    model = load(settings.model)
    table = corpus_bigrams(model, settings.bigrams) if "bigrams" in settings.methods else None
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        prompts = load_prompts(
            settings.prompts,
            "test",
            model.tokenizer,
            settings.count,
            settings.prompt_tokens,
            seed=200 + seed,
            chat=settings.chat,
        )
        learnt = None
        for method in settings.methods:
            print(f"{method}, seed {seed}", flush=True)
            params = table if method == "bigrams" else None
            row, states = measure_method(settings, model, method, params, prompts, learnt)
            rows.setdefault(method, []).append(row)
            if method == "recycling":
                learnt = states[min(settings.frozen_after, len(states)) - 1]
    return [_summarise(method, runs) for method, runs in rows.items()]


def _summarise(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method}
    for name in ("tokens_per_pass", "first", "last", "duplicates"):
        row[name] = record.sample([r[name] for r in runs])
    for name in ("by_prompt", "by_depth"):
        row[name] = [record.sample(x) for x in zip(*(r[name] for r in runs), strict=True)]
    # A pass over the draft costs as much as one over a token, up to a tenth more.
    row["modelled_speedup"] = [
        record.sample([r["last"] / cost for r in runs]) for cost in (1.1, 1.0)
    ]
    row["exactness"] = [r["exactness"] for r in runs]
    return row


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    lines = [
        f"{'method':12} {'tokens/pass':>11} {'first 5':>8} {'last half':>9} {'duplicates':>10}"
    ]
    for r in rows:
        lines.append(
            f"{r['method']:12} {r['tokens_per_pass']['mean']:11.2f} {r['first']['mean']:8.2f} "
            f"{r['last']['mean']:9.2f} {r['duplicates']['mean']:10.2f}"
        )
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    if "frozen" in settings.methods and settings.methods[0] != "recycling":
        raise app.UsageError("--methods: frozen goes on from recycling, put that first.")
    rows = run(settings)
    print(show(rows))
    name = record.name_of("recycling", settings.model, flags.FLAGS.label)
    statements.conclude(name, rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    define_shared_flags(list(METHODS), "Seeds of the prompts.")
    flags.DEFINE_string("bigrams", "python_stdlib", "Corpus of the frozen table.")
    flags.DEFINE_integer("count", 50, "Held-out prompts.", lower_bound=2)
    flags.DEFINE_integer("new_tokens", 128, "Tokens to generate for each.")
    flags.DEFINE_integer("frozen_after", 5, "Prompts that `frozen` learns from.", lower_bound=1)
    flags.DEFINE_integer("checked", 10, "Prompts also decoded plainly at the drafter's width.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
