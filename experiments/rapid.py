"""RAPID against reading everything, reading what was retrieved, and averaging both.

    python -m experiments.rapid --model=records-11m

Prompts hide numbers in text and ask for one of them. The target reads the whole prompt, within its
trained length or beyond it under a policy; the drafter reads chunks of about 32 tokens that BM25,
or an encoder's vectors, choose. It is the same model, or with ``--drafter`` another, stronger one
(upward speculation). ``irrelevant`` lets it read what was retrieved for another prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.long_context_tasks import PromptEncoder
from experiments.settings import from_flags
from experiments.statements import Statement, at_least, value
from inference.cache import slot_bytes
from inference.drafter import NoDrafter
from inference.drafters.draft_model import check_tokenizer
from inference.engine import Engine, make_engine
from inference.policies.registry import make_policy
from models import bert, decoder
from models.load import Model, load
from ops.sampling import SamplingParams
from ops.transfer import Transfer, emitted_law
from research.speculative.rapid.drafter import rapid_drafter
from research.speculative.rapid.retrieval import BM25, Embedding, Retriever, retrieve
from research.speculative.superposed.generate import one_pass
from train.data.long_tasks.example import Example
from train.data.long_tasks.registry import Materials, find_task, make_examples
from train.data.long_tasks.scores import score
from train.data.long_tasks.text import made_up_source

ETAS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
METHODS = ("long", "retrieved", "average", *(f"eta-{eta:g}" for eta in ETAS))
SAMPLED = SamplingParams.make(1.0)


STATEMENTS = (
    Statement(
        "without transfer greedy answers are those of the target",
        ("eta-0", "long"),
        lambda rows, seed: value(rows["eta-0"], "same_as_long", seed) == 1,
    ),
    Statement(
        "a small eta (1, 2, 5) raises acceptance",
        ("eta-0", "eta-1", "eta-2", "eta-5"),
        lambda rows, seed: all(
            value(rows[name], "acceptance", seed) > value(rows["eta-0"], "acceptance", seed)
            for name in ("eta-1", "eta-2", "eta-5")
        ),
    ),
    Statement(
        "at eta 10 answers are at least as often right as the worse of both contexts alone",
        ("eta-10", "long", "retrieved"),
        lambda rows, seed: (
            value(rows["eta-10"], "accuracy", seed)
            >= min(value(rows[name], "accuracy", seed) for name in ("long", "retrieved"))
        ),
    ),
    Statement(
        "eta 5, 10 or 20 answers better than the target alone",
        ("long", "eta-5", "eta-10", "eta-20"),
        lambda rows, seed: (
            max(value(rows[f"eta-{eta}"], "accuracy", seed) for eta in (5, 10, 20))
            > value(rows["long"], "accuracy", seed)
        ),
    ),
    Statement(
        "with irrelevant retrieval a large eta answers worse than none",
        ("eta-20", "eta-0"),
        lambda rows, seed: (
            value(rows["eta-20"], "accuracy_irrelevant", seed)
            < value(rows["eta-0"], "accuracy_irrelevant", seed)
        ),
    ),
    Statement(
        "eta 10 answers at least as well as the retrieved context alone",
        ("eta-10", "retrieved"),
        at_least("eta-10", "retrieved", "accuracy"),
    ),
    Statement(
        "eta 10 answers at least as well as the average of both logits",
        ("eta-10", "average"),
        at_least("eta-10", "average", "accuracy"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    model: str
    drafter: str
    policy: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    count: int
    length: int
    chunk: int
    budget: int
    draft_length: int
    retriever: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One question: the prompt, what a drafter reads, and the same with irrelevant retrieval."""

    example: Example
    prompt: list[int]
    draft: list[int]
    irrelevant: list[int]
    answer: list[int]


def make_cases(s: Settings, model: Model, task: str, seed: int) -> list[Case]:
    """``s.count`` questions of a task whose prompt and answer have ``s.length`` tokens together."""
    encoder, data = PromptEncoder(model.tokenizer), Materials(made_up_source(0))
    tokens = s.length - find_task(task).new_tokens
    places = np.linspace(0, 1, s.count).tolist()
    examples = make_examples(task, encoder, tokens, places, seed, data)
    retriever = make_retriever(s.retriever)
    found = [_retrieved(s, model, retriever, example) for example in examples]
    cases = []
    for i, example in enumerate(examples):
        question = example.prompt.rsplit("\n", 2)[1:]
        prompt = encoder.encode(example.prompt)
        drafts = [
            encoder.encode("\n".join([context, *question]))
            for context in (found[i], found[(i + 1) % len(found)])
        ]
        answer = model.tokenizer.encode(f" {example.answer}")
        cases.append(Case(example, prompt, drafts[0], drafts[1], answer))
    return cases


@functools.cache
def make_retriever(name: str) -> Retriever:
    """BM25, or cosines of the sentence encoder in a folder; the best chunks whatever they score."""
    return BM25() if name == "bm25" else Embedding(bert.load(name), threshold=-1.0)


def _retrieved(s: Settings, model: Model, retriever: Retriever, example: Example) -> str:
    context, question, lead = example.prompt.rsplit("\n", 2)

    def count(text: str) -> int:
        return len(model.tokenizer.encode(text))

    return retrieve(context, f"{question} {lead}", retriever, count, s.chunk, s.budget)


def answers(
    engine: Engine, cases: Sequence[Case], drafts: Any, sampling: Any, seed: int
) -> tuple[list[list[int]], Any]:
    """New tokens for all cases of one task in one batch, and the loop's counters."""
    task = find_task(cases[0].example.task)
    out = engine.generate(
        [case.prompt for case in cases],
        task.new_tokens,
        sampling=sampling,
        seeds=[1000 * seed + i for i in range(len(cases))],
        draft_prompts=drafts,
    )
    return out.tokens, out.stats


def accuracy(model: Model, cases: Sequence[Case], texts: Sequence[list[int]]) -> float:
    """Mean score of the texts by their tasks' own metrics."""
    scores = [
        score(case.example, model.tokenizer.decode(text, skip_special_tokens=True))
        for case, text in zip(cases, texts, strict=True)
    ]
    return float(np.mean(scores))


def average(
    engine: Engine, short_engine: Engine, cases: Sequence[Case], new: int
) -> list[list[int]]:
    """Greedy texts by the mean of the target's logits after the prompt and the drafter's."""
    greedy = SamplingParams.make()
    long, _ = engine.start([case.prompt for case in cases], new, greedy)
    short, _ = short_engine.start([case.draft for case in cases], new, greedy)
    models = (engine, short_engine)

    @jax.jit
    def run(params: Any, caches: Any, first: Any, limits: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            caches, token = carry

            def one(engine: Engine, params: Any, cache: Any, limit: Any) -> Any:
                def inputs(positions: Any) -> Any:
                    return decoder.embed(params, engine.cfg, token[:, None], positions)[:, 0]

                return one_pass(
                    params, engine.cfg, engine.policy_in_force, cache, inputs, limit, cache.capacity
                )

            each = [one(*given) for given in zip(models, params, caches, limits, strict=True)]
            best = jnp.argmax(each[0][1] + each[1][1], axis=-1).astype(jnp.int32)
            return (tuple(cache for cache, _ in each), best), best

        return jax.lax.scan(step, (caches, first), None, length=new)[1].T

    first = jnp.asarray([case.prompt[-1] for case in cases], jnp.int32)
    limits = (long.limit, short.limit)
    params = (engine.params, short_engine.params)
    return np.asarray(run(params, (long.cache, short.cache), first, limits)).tolist()


@functools.partial(jax.jit, static_argnames="cfg")
def _laws(params: Any, cfg: decoder.Config, policy: Any, tokens: Any) -> Any:
    hidden = decoder.forward(params, cfg, tokens, policy=policy).hidden
    return jax.nn.softmax(decoder.unembed(params, cfg, hidden), axis=-1)


def reference_laws(
    model: Model, policy: Any, prompts: Sequence[list[int]], cases: Sequence[Case]
) -> list[np.ndarray]:
    """For each case the (answer tokens, vocabulary) laws after its prompt and true answer."""
    size = max(len(prompt) + len(case.answer) for prompt, case in zip(prompts, cases, strict=True))
    laws = []
    for prompt, case in zip(prompts, cases, strict=True):
        tokens = np.zeros((1, size), np.int32)
        whole = [*prompt, *case.answer]
        tokens[0, : len(whole)] = whole
        found = np.asarray(_laws(model.params, model.cfg, policy, jnp.asarray(tokens)))[0]
        laws.append(found[len(prompt) - 1 : len(whole) - 1])
    return laws


def likelihood(laws: Sequence[np.ndarray], cases: Sequence[Case]) -> float:
    """Mean log-probability of a true answer's token."""
    logs = [
        np.log(np.maximum(law[np.arange(len(case.answer)), case.answer], 1e-30))
        for law, case in zip(laws, cases, strict=True)
    ]
    return float(np.mean(np.concatenate(logs)))


def kv_bytes(cfg: decoder.Config, stats: Any, cases: Sequence[Case], drafting: int = 0) -> float:
    """Bytes of keys and values read per emitted token, taking each context's length as it began.

    ``drafting`` are those that a draft reads for every token of its prompt.
    """
    slot = slot_bytes(cfg)
    read = sum(
        rounds * (slot * len(case.prompt) + drafting * len(case.draft))
        for rounds, case in zip(stats.rounds.tolist(), cases, strict=True)
    )
    return read / int(stats.emitted.sum())


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of one task, and what the target and the drafter make of them alone."""

    cases: list[Case]
    texts: list[list[int]]  # of the target
    rounds: Any  # the target's counters
    target: list[np.ndarray]  # laws along the true answers
    draft: list[np.ndarray]


def ask(s: Settings, model: Model, helper: Model, policy: Any, task: str, seed: int) -> Asked:
    """Questions of a task, the target's own greedy answers, and both laws of the true ones."""
    cases = make_cases(s, model, task, seed)
    # As wide as the drafts, so that equal texts are equal bit for bit.
    width = NoDrafter(s.draft_length + 1)
    engine = make_engine(
        model.params, model.cfg, drafter=width, policy=policy, context_limit=s.length
    )
    texts, stats = answers(engine, cases, None, SamplingParams.make(), seed)
    return Asked(
        cases,
        texts,
        stats,
        reference_laws(model, policy, [case.prompt for case in cases], cases),
        reference_laws(helper, None, [case.draft for case in cases], cases),
    )


def measure_method(
    s: Settings, model: Model, helper: Model, policy: Any, method: str, asked: Asked, seed: int
) -> dict[str, float]:
    """One method on the questions of one task; ``helper`` drafts."""
    cases, new = asked.cases, find_task(asked.cases[0].example.task).new_tokens
    base = make_engine(model.params, model.cfg, policy=policy, context_limit=s.length)
    if method == "average":
        alone = make_engine(helper.params, helper.cfg)
        return {"accuracy": accuracy(model, cases, average(base, alone, cases, new))}
    if method == "long":
        return _alone(model, cases, asked.texts, asked.rounds, asked.target)
    if method == "retrieved":
        short = [dataclasses.replace(case, prompt=case.draft) for case in cases]
        engine = make_engine(helper.params, helper.cfg)
        texts, stats = answers(engine, short, None, SamplingParams.make(), seed)
        return _alone(helper, short, texts, stats, asked.draft)
    return _speculative(s, model, helper, base, float(method.removeprefix("eta-")), asked, seed)


def _alone(
    model: Model, cases: list[Case], texts: list[list[int]], stats: Any, laws: list[np.ndarray]
) -> dict[str, float]:
    return {
        "accuracy": accuracy(model, cases, texts),
        "likelihood": likelihood(laws, cases),
        "passes": float(stats.rounds.sum() / stats.emitted.sum()),
        "kv_bytes": kv_bytes(model.cfg, stats, cases),
    }


def _speculative(
    s: Settings, model: Model, helper: Model, base: Engine, eta: float, asked: Asked, seed: int
) -> dict[str, float]:
    cases, transfer, greedy = asked.cases, Transfer.make(eta), SamplingParams.make()
    drafter, params = rapid_drafter(model.cfg, helper.params, helper.cfg, s.draft_length, transfer)
    engine = dataclasses.replace(base, drafter=drafter, drafter_params=params)
    drafts = [case.draft for case in cases]
    texts, _ = answers(engine, cases, drafts, greedy, seed)
    misled, _ = answers(engine, cases, [case.irrelevant for case in cases], greedy, seed)
    _, stats = answers(engine, cases, drafts, SAMPLED, seed)
    emitted = [
        np.asarray(emitted_law(jnp.asarray(p), jnp.asarray(q), transfer))
        for p, q in zip(asked.target, asked.draft, strict=True)
    ]
    return {
        "accuracy": accuracy(model, cases, texts),
        "accuracy_irrelevant": accuracy(model, cases, misled),
        "same_as_long": float(np.mean([a == b for a, b in zip(texts, asked.texts, strict=True)])),
        "likelihood": likelihood(emitted, cases),
        "acceptance": float(stats.accepted.sum() / stats.drafted.sum()),
        "passes": float(stats.rounds.sum() / stats.emitted.sum()),
        "kv_bytes": kv_bytes(model.cfg, stats, cases, s.draft_length * slot_bytes(helper.cfg)),
    }


def run(s: Settings) -> list[dict[str, Any]]:
    """All methods, each number the mean over the tasks, seed by seed."""
    model = load(s.model)
    helper = load(s.drafter) if s.drafter else model
    check_tokenizer(helper, model)
    policy = make_policy(s.policy, model.cfg) if s.policy else None
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in s.seeds:
        by_task: dict[str, list[dict[str, float]]] = {}
        for task in s.tasks:
            asked = ask(s, model, helper, policy, task, seed)
            for method in s.methods:
                print(f"{task}, {method}, seed {seed}", flush=True)
                row = measure_method(s, model, helper, policy, method, asked, seed)
                by_task.setdefault(method, []).append(row)
        for method, found in by_task.items():
            means = {name: float(np.mean([r[name] for r in found])) for name in found[0]}
            rows.setdefault(method, []).append(means)
    return [{"method": method} | record.samples(found) for method, found in rows.items()]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    names = ("accuracy", "accuracy_irrelevant", "likelihood", "acceptance", "passes", "kv_bytes")
    lines = [" ".join([f"{'method':10}", *(f"{name[:12]:>12}" for name in names)])]
    for r in rows:
        cells = [f"{r[n]['mean']:12.3f}" if n in r else " " * 12 for n in names]
        lines.append(" ".join([f"{r['method']:10}", *cells]))
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    rows = run(settings)
    print(show(rows))
    how = "" if settings.retriever == "bm25" else "vectors"
    by = record.name_of("by", settings.drafter) if settings.drafter else ""
    name = record.name_of("rapid", settings.model, str(settings.length), how, by)
    statements.conclude(name, rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "records-11m", "The target.")
    flags.DEFINE_string("drafter", "", "The model that drafts; default: the target itself.")
    flags.DEFINE_string("policy", "", "The target's attention policy, for lengths beyond its own.")
    flags.DEFINE_list("tasks", ["lines-short", "needle", "multi-key"], "Tasks with a question.")
    flags.DEFINE_list("methods", list(METHODS), "What to compare.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the questions and draws.")
    flags.DEFINE_integer("count", 24, "Questions per task and seed.", lower_bound=2)
    flags.DEFINE_integer("length", 256, "Tokens of a prompt and its answer.")
    flags.DEFINE_integer("chunk", 32, "Most tokens of a chunk.")
    flags.DEFINE_integer("budget", 96, "Most tokens of a retrieved context.")
    flags.DEFINE_integer("draft_length", 10, "Tokens of a draft.")
    flags.DEFINE_string("retriever", "bm25", "bm25, or the folder of a BERT sentence encoder.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
