"""Methods for longer contexts, trained from one base model under equal tuning, and its policies.

    python -m experiments.context_methods --folder=runs/context --jobs=2

Every method of :mod:`experiments.context_trainings` is trained with every rate of ``--rates`` on
the first seed; the rate whose model reads validation text of ``--choose_length`` tokens best (or of
the method's own length, where it has one) is taken for the other seeds. Then all of them, and the
policies that need no training, read the same texts and answer the same tasks
(:mod:`experiments.long_context`), a seed of training with a seed of texts. The same command goes on
where it was stopped. ``--extend`` adds methods or seeds to the result of one seed that is there,
with its settings: only what it lacks is trained and measured. ``--answer`` runs nothing: it answers
the statements of the result anew, from its rows. The corpora are those of
``configs/records_lm.py`` and ``configs/giraffe.py``, and for the methods ``text`` and ``tasks``:

    python -m train.data.records --tokenizer=assets/python-5m --length=255 --tokens=3000000 \\
        --seed=2 --share=0 --out=runs/records_text.jsonl
    python -m train.data.records --tokenizer=assets/python-5m --length=255 --tokens=3000000 \\
        --seed=2 --tasks=infilling,keyword-paragraph,position-paragraph,reorder \\
        --out=runs/records_tasks.jsonl
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from experiments import context_statements, long_context, record, statements
from experiments.context_trainings import CONFIGS, METHODS, Settings, command, export_folder
from experiments.long_context_loss import cut_windows, read_text, window_nats
from experiments.long_context_summary import show, summarise
from experiments.settings import from_flags
from models.load import load
from train.run_folder import write_json

NAME = "context_methods"
"""Of the result."""
SAME = 1e-3
"""Nats by which one model may differ between two runs."""

ZERO_SHOT = {
    "linear 4": "linear:4",
    "NTK 4": "ntk:4",
    "dynamic NTK": "dynamic:1",
    "YaRN 4": "yarn:4",
    "power 0.1": "power:0.1",
    "power 0.5": "power:0.5",
    "truncated": "truncated:256",
    "dual chunk": "dual_chunk:192:32",
    "dual chunk, temperature": "dual_chunk:192:32:256",
}
"""Policies of the base model without training, beside dense attention and a window."""


def in_parallel(commands: Sequence[Sequence[str]], jobs: int, logs: pathlib.Path) -> None:
    """Run commands, ``jobs`` at a time, each with a log of its own.

    Raises:
        RuntimeError: one failed; those that run are waited for.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def run(number: int, words: Sequence[str]) -> None:
        path = logs / f"{number}.log"
        with path.open("w") as log:
            done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            tail = path.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(words)} failed ({' '.join(tail)}): see {path}.")
        print(f"done {number + 1} of {len(commands)}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, i, words) for i, words in enumerate(commands)]:
            future.result()


def extended(settings: Settings, result: dict[str, Any]) -> Settings:
    """Settings of a result with more methods or seeds; its rows and rates count as known.

    Raises:
        ValueError: the result has several seeds, whose rows are joined, or its seed is not the
            first of the settings, or it has other settings.
    """
    if len(result["seeds"]) != 1:
        raise ValueError(
            "the rows of several seeds cannot be told apart: extend a result of one seed."
        )
    if result["seeds"][0] != settings.seeds[0]:
        raise ValueError(
            f"the result has seed {result['seeds'][0]}, by which its rates were chosen: name it "
            "first in --seeds."
        )
    record.check_extends(result, settings, ("methods", "seeds", "folder", "jobs"))
    rates = {row["method"]: row for row in result["rows"] if row["kind"] == "rates"}
    kept = {m: {"losses": row["losses"], "best": row["best"]} for m, row in rates.items()}
    rows = [row for row in result["rows"] if row["kind"] not in ("rates", "summary")]
    _rates_file(settings).parent.mkdir(parents=True, exist_ok=True)
    write_json(_rates_file(settings), kept | _read(_rates_file(settings), {}))
    path = _rows_file(settings, settings.seeds[0])
    write_json(path, _read(path, rows))
    methods = dict.fromkeys((*result["config"]["methods"], *settings.methods))
    return dataclasses.replace(settings, methods=tuple(methods))


def train_all(settings: Settings, pairs: Sequence[tuple[str, str, int]]) -> None:
    """Train and export every (method, rate, seed) that has no export yet."""
    folder = pathlib.Path(settings.folder)
    missing = [pair for pair in pairs if not export_folder(settings, *pair).exists()]
    runs = [command(settings, *pair) for pair in missing]
    in_parallel(runs, settings.jobs, folder / "logs" / "train")
    exports = [
        [
            sys.executable, "-m", "train.export",
            f"--run={export_folder(settings, *pair).parent / 'run'}",
            f"--out={export_folder(settings, *pair)}",
        ]
        for pair in missing
    ]  # fmt: skip
    in_parallel(exports, settings.jobs, folder / "logs" / "export")


def choose_rates(settings: Settings) -> dict[str, dict[str, Any]]:
    """For each method the loss of every rate on validation text, and the best rate."""
    path = _rates_file(settings)
    known = _read(path, {})
    ids: list[int] = []
    for method in settings.methods:
        if method in known:
            continue
        label, form = next(iter(METHODS[method].policies.items()))
        length = METHODS[method].choose_length or settings.choose_length
        losses = {}
        for rate in settings.rates:
            place = export_folder(settings, method, rate, settings.seeds[0])
            model = load(str(place))
            ids = ids or model.tokenizer.encode(read_text(settings.text, "validation"))
            windows = cut_windows(ids, settings.windows, length, seed=1000)
            name = form.replace("DIR", str(place))
            _, policy = long_context.load_policies([name], model, length)[name]
            losses[rate] = float(window_nats(model, policy, windows, settings.batch).mean())
            print(f"{label} at rate {rate}: {losses[rate]:.3f} on validation text", flush=True)
        known[method] = {"losses": losses, "best": min(losses, key=lambda r: losses[r])}
        write_json(path, known)
    return {method: known[method] for method in settings.methods}


def policies_of(settings: Settings, rates: dict[str, dict[str, Any]], seed: int) -> dict[str, str]:
    """Every policy by its label, as :mod:`experiments.long_context` takes it."""
    trained = load(settings.model).cfg.max_length
    named = {"dense": "dense", "window": f"window:{trained}"} | ZERO_SHOT
    for method in settings.methods:
        place = str(export_folder(settings, method, rates[method]["best"], seed))
        for label, form in METHODS[method].policies.items():
            named[label] = form.replace("DIR", place)
    return named


def rows_of(settings: Settings, seed: int) -> list[dict[str, Any]]:
    """The rows that are known for a seed."""
    return _read(_rows_file(settings, seed), [])


def missing(named: dict[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The policies that have no rows yet."""
    known = {row["policy"] for row in rows}
    return {label: form for label, form in named.items() if label not in known}


def evaluate_seed(settings: Settings, seed: int) -> None:
    """Read texts and answer tasks with one seed's models; adds the rows to the seed's file."""
    named, rows = policies_of(settings, choose_rates(settings), seed), rows_of(settings, seed)
    labels = {form: label for label, form in missing(named, rows).items()}
    asked = long_context.Settings(
        model=settings.model, policies=tuple(labels), lengths=settings.lengths,
        tasks=settings.tasks, text=settings.text, haystack="text", items="", chat=False,
        seeds=(seed,), windows=settings.windows, depths=settings.depths, count=settings.count,
        batch=settings.batch, trained=load(settings.model).cfg.max_length, bucket=0,
        loss_threshold=settings.loss_threshold, accuracy_threshold=settings.accuracy_threshold,
    )  # fmt: skip
    measured = [row for row in long_context.run(asked) if row["kind"] != "summary"]
    check_again(rows, measured)
    found = [row | {"policy": labels[row["policy"]]} for row in measured if row["policy"] in labels]
    order = list(named)
    rows = [row for row in (*rows, *found) if row["policy"] in named]
    write_json(_rows_file(settings, seed), sorted(rows, key=lambda r: order.index(r["policy"])))


def check_again(known: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> None:
    """That dense attention, which every evaluation measures, loses what the known rows say.

    Raises:
        ValueError: it does not, so that the two cannot stand in one table.
    """

    def losses(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
        dense = [row for row in rows if row["policy"] == "dense" and row["kind"] == "loss"]
        return {row["length"]: row["nats"][-1]["mean"] for row in dense}

    again = losses(measured)
    for length, loss in losses(known).items():
        if abs(loss - again[length]) > SAME:
            raise ValueError(
                f"dense attention loses {again[length]:.4f} nats at {length} tokens, {loss:.4f} "
                "in the rows that are known: measure all of them again, in an empty --folder."
            )


def _rows_file(settings: Settings, seed: int) -> pathlib.Path:
    return pathlib.Path(settings.folder) / f"rows-{seed}.json"


def _rates_file(settings: Settings) -> pathlib.Path:
    return pathlib.Path(settings.folder) / "rates.json"


def _read(path: pathlib.Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


def merged(parts: Sequence[Any]) -> Any:
    """The same row of several seeds as one: samples are joined, all but chance must agree.

    A bucket that no example of a seed fell into (None) joins by the others' samples.

    Raises:
        ValueError: what is no sample differs between the seeds.
    """
    known = [part for part in parts if part is not None]
    if known and isinstance(known[0], dict) and "samples" in known[0]:
        return record.sample([x for part in known for x in part["samples"]])
    first = parts[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for part in parts for key in part if key != "chance")
        for key in keys:  # Rows of earlier code may lack what is None in others, and nothing else.
            if any(key not in p for p in parts) and any(p.get(key) is not None for p in parts):
                raise ValueError(f"rows of some seeds lack {key!r}: measure all by one version.")
        joined = {key: merged([part.get(key) for part in parts]) for key in keys}
        # That of the seeds' own prompts, which differ.
        chance = [part["chance"] for part in parts if "chance" in part]
        return joined | ({"chance": record.sample(chance)["mean"]} if chance else {})
    if isinstance(first, list):
        return [merged(list(items)) for items in zip(*parts, strict=True)]
    if any(part != first for part in parts):
        raise ValueError(
            f"seeds disagree on {first!r}: evaluate them with one version of the code."
        )
    return first


def run(settings: Settings) -> list[dict[str, Any]]:
    """Trainings, the choice of rates, evaluations; the rows of all seeds and their summaries.

    Raises:
        RuntimeError: a training or an evaluation failed.
        ValueError, FileNotFoundError: see :func:`experiments.long_context.run`.
    """
    first, *others = settings.seeds
    unread = [m for m in settings.methods if m not in _read(_rates_file(settings), {})]
    train_all(settings, [(m, rate, first) for m in unread for rate in settings.rates])
    rates = choose_rates(settings)
    train_all(settings, [(m, rates[m]["best"], s) for m in settings.methods for s in others])
    todo = [
        seed
        for seed in settings.seeds
        if missing(policies_of(settings, rates, seed), rows_of(settings, seed))
    ]
    again = [a for a in sys.argv[1:] if not a.startswith("--evaluate_seed")]
    own = [sys.executable, "-m", "experiments.context_methods", *again]
    in_parallel(
        [[*own, f"--evaluate_seed={seed}"] for seed in todo],
        settings.jobs,
        pathlib.Path(settings.folder) / "logs" / "evaluate",
    )
    by_seed = [rows_of(settings, seed) for seed in settings.seeds]
    rows = [merged(parts) for parts in zip(*by_seed, strict=True)]
    trained = load(settings.model).cfg.max_length
    for name in dict.fromkeys(row["policy"] for row in rows):
        summary = summarise(
            rows, name, trained, settings.loss_threshold, settings.accuracy_threshold
        )
        rows.append({**summary, "trained": trained})
    rows += [{"kind": "rates", "method": m, **rates[m]} for m in settings.methods]
    return rows


def answered(rows: Sequence[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """The statements of the protocols, answered by the rows of a result."""
    flat = context_statements.rows_by_method(rows)
    return statements.answer(flat, context_statements.STATEMENTS, seeds)


def answer_again(folder: pathlib.Path | None) -> None:
    """Answer the statements of a result from its rows, print and save."""
    result = record.load(NAME, folder)
    answers = answered(result["rows"], len(result["seeds"]))
    print(statements.show(answers))
    print("saved", record.restate(NAME, answers, folder))


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(flags.FLAGS.out) if flags.FLAGS.out else None
    if flags.FLAGS.answer:
        answer_again(folder)
        return
    settings = from_flags(Settings)
    try:
        settings, earlier = settings.checked(), None
        if flags.FLAGS.extend:
            earlier = record.load(NAME, folder)
            settings = extended(settings, earlier)
        if flags.FLAGS.evaluate_seed >= 0:
            evaluate_seed(settings, flags.FLAGS.evaluate_seed)
            return
        rows = run(settings)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    answers = answered(rows, len(settings.seeds))
    print(show(rows))
    print(statements.show(answers))
    path = record.save(
        NAME,
        rows,
        config=settings,
        seeds=settings.seeds,
        statements=answers,
        earlier=earlier,
        folder=folder,
    )
    print("saved", path)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "records-11m", "The base model.")
    flags.DEFINE_string("folder", "runs/context", "Where trainings and rows are kept.")
    flags.DEFINE_list("methods", list(METHODS), f"What to train, with {', '.join(CONFIGS)}.")
    flags.DEFINE_list("rates", ["2e-4", "5e-4", "1e-3"], "Learning rates to choose from.")
    flags.DEFINE_integer("updates", 300, "Updates of every training.", lower_bound=1)
    flags.DEFINE_integer("update_tokens", 16384, "Tokens of an update.", lower_bound=1)
    flags.DEFINE_integer("choose_length", 1024, "Length of the text that chooses.")
    flags.DEFINE_list("lengths", ["256", "512", "1024", "2048", "4096"], "Tokens of texts.")
    flags.DEFINE_list("tasks", ["lines-short", "passkey-short"], "Tasks to answer.")
    flags.DEFINE_string("text", "python_stdlib", "A corpus: validation chooses, test measures.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of trainings and texts.")
    flags.DEFINE_integer("windows", 8, "Windows of text per seed.", lower_bound=1)
    flags.DEFINE_integer("depths", 5, "Depths from 0 to 1.", lower_bound=1)
    flags.DEFINE_integer("count", 8, "Examples per depth, length and seed.", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "Rows of a pass.", lower_bound=1)
    flags.DEFINE_integer("jobs", 1, "Trainings or evaluations at a time.", lower_bound=1)
    flags.DEFINE_integer("evaluate_seed", -1, "Only evaluate this seed's models.")
    flags.DEFINE_bool("extend", False, "Add --methods or --seeds to the result that is there.")
    flags.DEFINE_bool("answer", False, "Only answer the statements of the result, from its rows.")
    flags.DEFINE_float("loss_threshold", 0.05, "Nats above the loss in range that still count.")
    flags.DEFINE_float("accuracy_threshold", 0.8, "Share of the accuracy in range that counts.")
    flags.DEFINE_string("out", "", "Folder of the result; default: the committed ones.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
