"""LongSpec's draft layer by absolute position, on long prompts, in bytes; its attention in time.

    python -m experiments.longspec --model=python-5m --policy=yarn:4 --drafts=full=DIR,no-offset=DIR

Nothing is trained here: every draft is a folder that `python -m train.export` wrote, of
`configs/longspec.py` or an ablation of it. Long windows of held-out text tell how often a draft's
best token is the target's at every position and step; long held-out prompts are continued greedily
with a chain and a tree. ``--others`` names policies that the first draft was not trained under.
What must hold: :mod:`experiments.longspec_statements`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.long_context_loss import cut_windows, read_text
from experiments.longspec_statements import METHODS, STATEMENTS
from experiments.settings import from_flags
from inference.drafter import Drafter, NoDrafter, Request, Target, TargetOutputs
from inference.drafters.registry import make_drafter
from inference.engine import Engine, make_engine
from inference.policies.registry import make_policy
from models import decoder
from models.attention import Step
from models.load import Model, load
from models.params import nbytes
from ops.attention import AttentionMask, attention, hybrid_tree_attention
from ops.sampling import SamplingParams
from ops.tree import tree_from_parents
from research.speculative.longspec.drafter import BEAM, CHAIN, LongSpecDrafter
from research.speculative.longspec.evaluation import STEPS, outcomes
from train.data.prompts import load_prompts


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    model: str
    policy: str
    others: tuple[str, ...]
    drafts: tuple[str, ...]
    rivals: tuple[str, ...]
    corpus: str
    seeds: tuple[int, ...]
    edges: tuple[int, ...]
    windows: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    shape: tuple[int, ...]
    slots: tuple[int, ...]
    repeats: int

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.edges[-1], self.prompt_tokens + self.new_tokens)


def load_drafts(s: Settings, model: Model) -> dict[str, tuple[LongSpecDrafter, Any]]:
    """The drafts by method, each with the tree asked for.

    Raises:
        ValueError: a draft that is not METHOD=DIR, or of an unknown method.
        FileNotFoundError: no folder there.
    """
    found = {}
    for text in s.drafts:
        method, _, folder = text.partition("=")
        if method not in METHODS or not folder:
            raise ValueError(f"{text!r} is no draft: write METHOD=DIR, of {', '.join(METHODS)}.")
        drafter, params = make_drafter(f"longspec:{folder}", model)
        assert isinstance(drafter, LongSpecDrafter)
        found[method] = dataclasses.replace(drafter, shape=s.shape), params
    return found


def by_position(
    s: Settings, model: Model, policy: Any, drafter: LongSpecDrafter, params: Any, text: Any
) -> Callable[[int], dict[str, float]]:
    """``measure(seed)``: top-1 agreement and nats for every step, by where in the text it is.

    ``@256`` means positions up to 256 from the edge below it on; the window's own length is left
    out at the beginning.
    """

    @jax.jit
    def run(params: Any, target: Any, tokens: Any) -> Any:
        step = Step(jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)[None])
        return outcomes(
            params, drafter.cfg, target, model.cfg, policy, tokens[:, :-1], tokens[:, 1:], step
        )

    def measure(seed: int) -> dict[str, float]:
        windows = cut_windows(text, s.windows, s.edges[-1], seed)
        every = [run(params, model.params, jnp.asarray(w[None])) for w in windows]
        hits, nats, own = (
            np.mean([np.asarray(getattr(x, name))[..., 0, :] for x in every], axis=0)
            for name in ("hits", "nats", "target_nats")
        )
        row, below = {}, min(drafter.cfg.window, s.edges[0] // 2)
        for edge in s.edges:
            here = slice(below, edge)
            row[f"target_nats@{edge}"] = float(own[here].mean())
            for i in range(STEPS):
                row[f"top1@{edge}/step{i + 1}"] = float(hits[i, here].mean())
                row[f"nats@{edge}/step{i + 1}"] = float(nats[i, here].mean())
            below = edge
        return row

    return measure


def engine_of(s: Settings, model: Model, policy: Any, drafter: Drafter, params: Any) -> Engine:
    """An engine that reads texts beyond the model's context; passes have the drafter's width."""
    return make_engine(
        model.params, model.cfg, drafter=drafter, drafter_params=params, policy=policy, widths=(),
        context_limit=s.longest,
    )  # fmt: skip


def decoded(
    engine: Engine, prompts: Sequence[list[int]], new_tokens: int, plain: Sequence[list[int]]
) -> dict[str, float]:
    """Tokens per pass over the prompts, and how many texts are not those of plain decoding."""
    got = engine.generate(prompts, new_tokens)
    differing = sum(a != b for a, b in zip(got.tokens, plain, strict=True))
    return {"tokens_per_pass": got.tokens_per_pass, "mismatches": float(differing)}


def draft_bytes(model: Model, drafter: Drafter, params: Any, slots: int) -> int:
    """Bytes that the drafter keeps of its own for a text of so many slots."""
    text = jnp.zeros((1, 16), jnp.int32)
    one = jnp.ones((1,), jnp.int32)
    request = Request(text, one, one, SamplingParams.make())

    def start(params: Any, target: Any) -> Any:
        seen = Target(target, model.cfg, decoder.default_policy(model.cfg))
        return drafter.init(params, seen, request, TargetOutputs(text), slots)

    made = jax.eval_shape(start, params, model.params)
    return nbytes(made)


def tree_attention(s: Settings, model: Model, slots: int) -> Callable[[int], dict[str, float]]:
    """``measure(seed)``: milliseconds of one layer's tree pass, dense and in two parts."""
    cfg, n = model.cfg, 1 + sum(s.shape)
    # A beam in which all nodes of a level hang below the best of the level above.
    starts = np.concatenate([[0, 1], 1 + np.cumsum(s.shape)])
    parent = np.concatenate([[-1], np.repeat(starts[: len(s.shape)], s.shape)]).astype(np.int32)
    tree = tree_from_parents(jnp.asarray(parent[None])).mask
    length = jnp.asarray([slots], jnp.int32)
    places = jnp.arange(slots + n, dtype=jnp.int32)[None]
    at = length[:, None] + jnp.sum(tree, axis=2, dtype=jnp.int32) - 1
    both = AttentionMask(
        q_positions=at, k_positions=places, lengths=length + n, tree=tree, tree_start=length,
        causal=True,
    )  # fmt: skip

    @jax.jit
    def dense(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return attention(q, k, v, mask=mask)

    @jax.jit
    def hybrid(q: Any, prefix: Any, new: Any, mask: Any) -> Any:
        lengths = AttentionMask(lengths=mask.tree_start)
        return hybrid_tree_attention(q, prefix[0], prefix[1], lengths, new[0], new[1], mask.tree)

    def measure(seed: int) -> dict[str, float]:
        rng = np.random.default_rng(seed)
        shapes = [(1, n, cfg.num_heads), *2 * [(1, slots + n, cfg.num_kv_heads)]]
        q, k, v = (
            jnp.asarray(rng.normal(size=(*shape, cfg.head_dim)), jnp.float32) for shape in shapes
        )
        parts = [[x[:, here] for x in (k, v)] for here in (slice(slots), slice(slots, None))]
        calls = {"dense": (dense, (q, k, v, both)), "hybrid": (hybrid, (q, *parts, both))}
        outs = [call(*given) for call, given in calls.values()]
        row = {"error": float(jnp.abs(outs[0] - outs[1]).max())}
        for name, (call, given) in calls.items():
            seconds = []
            for _ in range(s.repeats):
                begin = time.perf_counter()
                jax.block_until_ready(call(*given))
                seconds.append(time.perf_counter() - begin)
            row[f"{name}_ms"] = 1e3 * float(np.median(seconds))
        return row

    return measure


def run(s: Settings) -> list[dict[str, Any]]:
    """All drafts and rivals on all seeds.

    Raises:
        ValueError: see :func:`load_drafts`, other policies without a draft, an unknown policy, or
            a corpus that is too small.
    """
    model = load(s.model)
    policies = {name: make_policy(name, model.cfg) for name in (s.policy, *s.others)}
    drafts = load_drafts(s, model)
    if s.others and not drafts:
        raise ValueError("--others is for the first of --drafts: name one, as METHOD=DIR.")
    text = model.tokenizer.encode(read_text(s.corpus))
    prompts = {
        seed: load_prompts(
            (s.corpus,), "test", model.tokenizer, s.prompts, s.prompt_tokens, seed=500 + seed
        )
        for seed in s.seeds
    }

    @functools.cache
    def plain(policy: str, width: int, seed: int) -> list[list[int]]:
        engine = engine_of(s, model, policies[policy], NoDrafter(width), None)
        return engine.generate(prompts[seed], s.new_tokens).tokens

    def with_drafter(policy: str, drafter: Drafter, params: Any, seed: int) -> dict[str, float]:
        engine = engine_of(s, model, policies[policy], drafter, params)
        return decoded(engine, prompts[seed], s.new_tokens, plain(policy, drafter.width, seed))

    asked = [(s.policy, method, draft) for method, draft in drafts.items()]
    asked += [(other, *next(iter(drafts.items()))) for other in s.others]
    rows = []
    for policy, method, (drafter, params) in asked:
        print(method, "under", policy, flush=True)
        measure = by_position(s, model, policies[policy], drafter, params, text)
        chain = dataclasses.replace(drafter, shape=CHAIN)
        each = []
        for seed in s.seeds:
            row = measure(seed)
            for name, one in (("chain", chain), ("tree", drafter)):
                found = with_drafter(policy, one, params, seed)
                row |= {f"{key}/{name}": value for key, value in found.items()}
            each.append(row)
        kept = {f"bytes@{n}": draft_bytes(model, drafter, params, n) for n in s.slots}
        known = {"policy": policy, "edges": list(s.edges), "bytes": kept}
        name = method if policy == s.policy else f"{method} under {policy}"
        rows.append(_summarise(name, each) | known)
    for name in s.rivals:
        print(name, flush=True)
        rival, params = make_drafter(name, model)
        each = [with_drafter(s.policy, rival, params, seed) for seed in s.seeds]
        rows.append(_summarise(name.partition(":")[0], each))
    for slots in s.slots:
        timed = tree_attention(s, model, slots)
        rows.append(_summarise(f"attention-{slots}", [timed(seed) for seed in s.seeds]))
    return rows


def _summarise(method: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    return {"method": method} | record.samples(runs)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as plain lines."""
    lines = []
    for row in rows:
        edges, numbers = row.get("edges"), []
        if edges:
            for step in range(1, STEPS + 1):
                values = [row[f"top1@{edge}/step{step}"]["mean"] for edge in edges]
                numbers.append(f"step {step} " + " ".join(f"{100 * x:.1f}%" for x in values))
        names = [n for n in row if n.startswith(("tokens_per", "mismatches", "dense", "hybrid"))]
        numbers += [f"{name} {row[name]['mean']:.3g}" for name in names]
        if "error" in row:
            numbers.append(f"error {row['error']['mean']:.1g}")
        numbers += [f"{name} {value}" for name, value in row.get("bytes", {}).items()]
        lines.append(f"{row['method']:16} " + ", ".join(numbers))
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    numbers = {n: tuple(int(x) for x in getattr(settings, n)) for n in ("edges", "shape", "slots")}
    settings = dataclasses.replace(settings, **numbers)
    try:
        rows = run(settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(show(rows))
    name = record.name_of("longspec", settings.model, flags.FLAGS.label)
    statements.conclude(name, rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "python-5m", "The frozen target.")
    flags.DEFINE_string("policy", "yarn:4", "How it attends, as when the drafts were trained.")
    flags.DEFINE_list("others", [], "Further policies, for the first draft.")
    flags.DEFINE_list("drafts", [], "METHOD=DIR of exported drafts.")
    flags.DEFINE_list("rivals", ["lookup"], "Other drafters by name, such as draft:python-1m.")
    flags.DEFINE_string("corpus", "python_stdlib", "python_stdlib, python_packages or text:PATH.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of windows and prompts.")
    flags.DEFINE_list("edges", ["256", "512", "1024", "2048"], "Positions that part the windows.")
    flags.DEFINE_integer("windows", 8, "Windows of the last edge's length per seed.")
    flags.DEFINE_integer("prompts", 4, "Held-out prompts per seed.")
    flags.DEFINE_integer("prompt_tokens", 1024, "Tokens of every prompt.")
    flags.DEFINE_integer("new_tokens", 96, "Tokens to generate for each.")
    flags.DEFINE_list("shape", [str(n) for n in BEAM], "Nodes per level of the tree.")
    flags.DEFINE_list("slots", ["4096", "16384"], "Slots of the cache, for bytes and attention.")
    flags.DEFINE_integer("repeats", 9, "Timed calls of each attention; the middle one counts.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
