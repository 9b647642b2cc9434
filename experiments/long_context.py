"""How far a model reads, by policy: loss by position, and tasks by length and depth.

    python -m experiments.long_context --model=DIR --policies=dense,linear:4,yarn:4 \
        --lengths=256,512,1024 --tasks=lines,passkey --text=FILE

Dense attention and a sliding window of the trained length are always among the policies: the
baselines that any method has to beat. ``POLICY@MODEL`` is a policy on another model with the same
tokenizer, such as one that was fine-tuned for it. Loss is measured on windows of real text; beside
it stands the loss of ``--model`` on the very same tokens within the trained length. Tasks are
generated within ``--lengths`` tokens, output included, and the same examples go to all policies.
With ``--keep=FILE`` a run that was interrupted goes on, and policies or tasks may be added to it;
with ``--extend`` policies are added to a result that was saved.
What is short-context regression and what long-context gain stands in one row per policy.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record
from experiments.long_context_attention import WITHOUT_EVIDENCE, measure_set
from experiments.long_context_loss import (
    bucket_edges,
    bucket_means,
    check_batches,
    cut_windows,
    in_range_nats,
    read_text,
    window_nats,
)
from experiments.long_context_summary import short_length, show, summarise
from experiments.long_context_tasks import (
    PromptEncoder,
    TaskSet,
    engine_answers,
    evaluate,
    make_task_set,
)
from experiments.settings import from_flags
from inference.checks import check_reach
from inference.policies.registry import make_policy
from models.load import Model, load
from train.data.long_tasks.qa_items import load_items
from train.data.long_tasks.registry import TASKS, Materials
from train.data.long_tasks.text import made_up_source, read_source
from train.journal import Journal


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and on what; see the flags."""

    model: str
    policies: tuple[str, ...]
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    text: str
    haystack: str
    items: str
    chat: bool
    seeds: tuple[int, ...]
    windows: int
    depths: int
    count: int
    batch: int
    trained: int
    bucket: int
    loss_threshold: float
    accuracy_threshold: float
    attention: bool = False


def trained_length(settings: Settings, model: Model) -> int:
    """The length the model was trained at."""
    return settings.trained or model.cfg.max_length


def all_policies(settings: Settings, trained: int) -> tuple[str, ...]:
    """The policies asked for, after dense attention and a sliding window of the trained length."""
    # A window on another model (POLICY@MODEL) is no baseline for this one.
    has_window = any(n.startswith("window:") and "@" not in n for n in settings.policies)
    baselines = ("dense",) if has_window else ("dense", f"window:{trained}")
    return tuple(dict.fromkeys((*baselines, *settings.policies)))


def load_policies(names: Sequence[str], base: Model, longest: int) -> dict[str, tuple[Model, Any]]:
    """The model and policy of each name: ``POLICY`` on ``base``, or ``POLICY@MODEL``.

    Raises:
        ValueError: an unknown policy, one that does not fit its model or whose positions end before
            the ``longest`` text, or another tokenizer.
        FileNotFoundError: there is no such model.
    """
    models = {"": base}
    found = {}
    for name in names:
        policy, _, place = name.partition("@")
        if place not in models:
            models[place] = load(place)
            if models[place].tokenizer.fingerprint != base.tokenizer.fingerprint:
                raise ValueError(
                    f"{place} has another tokenizer than --model: lengths and losses would not "
                    "compare."
                )
        found[name] = models[place], make_policy(policy, models[place].cfg)
        check_reach(found[name][1], longest, f"the longest text for {name!r}")
    return found


def make_materials(settings: Settings, text: str) -> Materials:
    """What the tasks hide their needles in, and ask about."""
    source = made_up_source(0) if settings.haystack == "made-up" else read_source(text)
    items = tuple(load_items(settings.items)) if settings.items else ()
    return Materials(source, items)


def measure_loss(
    settings: Settings,
    base: Model,
    policies: dict[str, tuple[Model, Any]],
    ids: Sequence[int],
    trained: int,
    kept: Journal,
) -> list[dict[str, Any]]:
    """A row per policy and length: nats by bucket, and the excess over the loss in range."""
    width = settings.bucket or max(1, trained // 4)
    longest = max(settings.lengths)
    windows = [cut_windows(ids, settings.windows, longest, seed) for seed in settings.seeds]
    batch = min(settings.windows, settings.batch)
    known = kept.get(
        "loss in range", lambda: [in_range_nats(base, w, trained, batch).tolist() for w in windows]
    )
    references = [np.asarray(values) for values in known]

    def measured(name: str, length: int) -> dict[str, Any]:
        model, policy = policies[name]
        nats, excess = [], []
        for tokens, reference in zip(windows, references, strict=True):
            values = window_nats(model, policy, tokens[:, : length + 1], batch)
            nats.append(values)
            excess.append(values - reference[:, :length])
        return {
            "kind": "loss",
            "policy": name,
            "length": length,
            "edges": bucket_edges(length, width),
            "nats": _by_bucket(nats, width),
            "excess": _by_bucket(excess, width),
            "mean": record.sample([float(x.mean()) for x in nats]),
        }

    rows = []
    for name in policies:
        for length in settings.lengths:
            rows.append(kept.get(f"loss {name} {length}", lambda n=name, t=length: measured(n, t)))
            print(f"loss of {name} at {length}: {rows[-1]['mean']['mean']:.3f}", flush=True)
    return rows


def _by_bucket(by_seed: Sequence[np.ndarray], width: int) -> list[dict[str, Any]]:
    means = [bucket_means(values, width) for values in by_seed]
    return [record.sample(list(bucket)) for bucket in zip(*means, strict=True)]


def measure_tasks(
    settings: Settings,
    policies: dict[str, tuple[Model, Any]],
    encoder: PromptEncoder,
    sets: Sequence[TaskSet],
    trained: int,
    kept: Journal,
) -> list[dict[str, Any]]:
    """A row per policy, task and length."""
    width = settings.bucket or max(1, trained // 4)

    def measured(name: str, tasks: TaskSet) -> dict[str, Any]:
        answerer = engine_answers(*policies[name], encoder, tasks.length, settings.batch)
        return {"policy": name, **evaluate(tasks, answerer, width)}

    rows = []
    for name in policies:
        for tasks in sets:
            piece = f"{tasks.task} {name} {tasks.length}"
            rows.append(kept.get(piece, lambda n=name, t=tasks: measured(n, t)))
            accuracy = 100 * rows[-1]["accuracy"]["mean"]
            print(f"{tasks.task} of {name} at {tasks.length}: {accuracy:.1f}%", flush=True)
    return rows


def measure_attention(
    settings: Settings,
    policies: dict[str, tuple[Model, Any]],
    encoder: PromptEncoder,
    sets: Sequence[TaskSet],
    kept: Journal,
) -> list[dict[str, Any]]:
    """A row per policy, task whose evidence has a place, and length."""

    def measured(name: str, tasks: TaskSet) -> dict[str, Any]:
        return {"policy": name, **measure_set(*policies[name], encoder, tasks, settings.batch)}

    rows = []
    for name in policies:
        for tasks in sets:
            if tasks.depths == (None,) or tasks.task in WITHOUT_EVIDENCE:
                continue
            piece = f"attention {tasks.task} {name} {tasks.length}"
            rows.append(kept.get(piece, lambda n=name, t=tasks: measured(n, t)))
            best = 100 * rows[-1]["best"]["mean"]
            print(f"attention of {name} at {tasks.length}, {tasks.task}: {best:.1f}%", flush=True)
    return rows


def open_journal(settings: Settings, path: str) -> Journal:
    """Finished measurements, none without a path.

    Policies and tasks may be added to a file later; anything else that a number depends on may not
    differ, the commit included.

    Raises:
        ValueError, OSError: see :class:`train.journal.Journal`.
    """
    about = dataclasses.asdict(settings) | record.commit()
    for name in ("policies", "tasks", "loss_threshold", "accuracy_threshold", "attention"):
        del about[name]
    return Journal(path or None, about)


def run(
    settings: Settings, keep: str = "", before: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Everything, cheapest failures first.

    Args:
        keep: a file of finished measurements, with which an interrupted run goes on.
        before: rows with the same settings, which come first; their policies are not run again.

    Raises:
        ValueError: an unknown policy or task, lengths that a task or the text cannot have, or none
            within the trained length; a file of other measurements.
        OSError: the file cannot be read or written.
    """
    model = load(settings.model)
    trained = trained_length(settings, model)
    short_length(settings.lengths, trained)
    if not settings.windows and not settings.tasks:
        raise ValueError("neither windows of text nor tasks are asked for: give one of them.")
    check_batches(settings.windows, min(settings.windows, settings.batch) or 1)
    known = {row["policy"] for row in before}
    names = [name for name in all_policies(settings, trained) if name not in known]
    if not names:
        raise ValueError("every policy has its rows already: there is nothing to add.")
    policies = load_policies(names, model, max(settings.lengths))
    text = read_text(settings.text)
    encoder = PromptEncoder(model.tokenizer, settings.chat)
    sets: list[TaskSet] = []
    if settings.tasks:
        data = make_materials(settings, text)
        sets = [
            make_task_set(
                task, encoder, length, settings.depths, settings.count, settings.seeds, data
            )
            for task in settings.tasks
            for length in settings.lengths
        ]
    kept = open_journal(settings, keep)
    rows: list[dict[str, Any]] = []
    if settings.windows:
        rows = measure_loss(settings, model, policies, model.tokenizer.encode(text), trained, kept)
    rows += measure_tasks(settings, policies, encoder, sets, trained, kept)
    if settings.attention:
        rows += measure_attention(settings, policies, encoder, sets, kept)
    rows = [*before, *rows]
    for name in names:
        summary = summarise(
            rows, name, trained, settings.loss_threshold, settings.accuracy_threshold
        )
        rows.append({**summary, "trained": trained})
    return rows


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    name = record.name_of("long_context", settings.model, flags.FLAGS.label)
    folder = pathlib.Path(flags.FLAGS.out) if flags.FLAGS.out else None
    before: list[dict[str, Any]] = []
    earlier = None
    try:
        if flags.FLAGS.extend:
            earlier = record.load(name, folder)
            record.check_extends(earlier, settings, ("policies",))
            before = earlier["rows"]
        lengths = tuple(sorted({int(n) for n in settings.lengths}))
        rows = run(dataclasses.replace(settings, lengths=lengths), flags.FLAGS.keep, before)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(show(rows))
    if earlier is not None:
        policies = dict.fromkeys((*earlier["config"]["policies"], *settings.policies))
        settings = dataclasses.replace(settings, policies=tuple(policies))
    path = record.save(
        name, rows, config=settings, seeds=settings.seeds, earlier=earlier, folder=folder
    )
    print("saved", path)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "python-5m", "The model.")
    flags.DEFINE_list("policies", ["linear:4", "ntk:4", "dynamic:1", "yarn:4"], "What to compare.")
    flags.DEFINE_list("lengths", ["256", "512", "1024", "2048"], "Tokens of texts.")
    flags.DEFINE_list("tasks", ["lines-short", "passkey-short"], f"Of {', '.join(TASKS)}.")
    flags.DEFINE_string("text", "python_stdlib", "A file, or a corpus by name: its test split.")
    flags.DEFINE_enum("haystack", "text", ["text", "made-up"], "What needles are hidden in.")
    flags.DEFINE_string("items", "", "JSON lines of document, question, answer; made up if none.")
    flags.DEFINE_bool("chat", False, "Prompts are a user's turn in the chat template.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of windows and examples.")
    flags.DEFINE_integer("windows", 8, "Windows of text per seed, 0: no loss.", lower_bound=0)
    flags.DEFINE_integer("depths", 5, "Depths from 0 to 1.", lower_bound=1)
    flags.DEFINE_integer("count", 8, "Examples per depth, length and seed.", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "Rows of a pass.", lower_bound=1)
    flags.DEFINE_integer("trained", 0, "Trained length, 0: the model's own.", lower_bound=0)
    flags.DEFINE_integer("bucket", 0, "Positions of a bucket, 0: a quarter of the trained length.")
    flags.DEFINE_float("loss_threshold", 0.05, "Nats above the loss in range that still count.")
    flags.DEFINE_float("accuracy_threshold", 0.8, "Share of the accuracy in range that counts.")
    flags.DEFINE_bool("attention", False, "Attention on the evidence of the tasks, too.")
    flags.DEFINE_string("keep", "", "File of finished measurements: an interrupted run goes on.")
    flags.DEFINE_bool("extend", False, "Add --policies to the result that is there.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")
    flags.DEFINE_string("out", "", "Folder of the result; default: the committed ones.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
