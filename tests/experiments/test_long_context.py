"""The harness on a tiny real model, and on readers and guessers whose scores are known."""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import long_context, record
from experiments.figures import save
from experiments.long_context import Settings, load_policies, run
from experiments.long_context_loss import (
    bucket_means,
    cut_windows,
    in_range_nats,
    read_text,
    window_nats,
)
from experiments.long_context_summary import effective_length, short_length, show, summarise
from experiments.long_context_tasks import PromptEncoder, evaluate, make_task_set
from experiments.shown import long_context as shown
from experiments.shown import long_context_figures
from models import decoder
from models.load import Model
from tests.experiments.conftest import TEXT
from tests.train.data.long_tasks.readers import read
from train.data.long_tasks.registry import Materials
from train.data.long_tasks.scores import chance
from train.data.long_tasks.text import made_up_source

TRAINED = 64


@pytest.fixture(scope="module")
def ids(model: Model) -> list[int]:
    return np.random.default_rng(0).integers(3, model.cfg.vocab_size, 600).tolist()


# Loss.
def test_nats_by_position_are_those_of_the_logits(model: Model, ids: list[int]):
    windows = cut_windows(ids, 2, 48, 0)
    got = window_nats(model, decoder.default_policy(model.cfg), windows, 2)
    out = decoder.forward(model.params, model.cfg, jnp.asarray(windows[:, :-1]))
    logits = np.asarray(decoder.unembed(model.params, model.cfg, out.hidden), np.float64)
    laws = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(laws, windows[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert got.shape == (2, 48)


def test_tokens_in_range_have_half_of_the_trained_length_before_them(model: Model, ids: list[int]):
    """Each token's loss is that of a window of the trained length that ends at or after it."""
    windows = cut_windows(ids, 2, 40, 1)
    policy = decoder.default_policy(model.cfg)
    got = in_range_nats(model, windows, 16, 2)
    first = window_nats(model, policy, windows[:, :17], 2)
    second = window_nats(model, policy, windows[:, 8:25], 2)
    last = window_nats(model, policy, windows[:, 24:41], 2)
    np.testing.assert_allclose(got[:, :16], first, atol=1e-4)
    np.testing.assert_allclose(got[:, 16:24], second[:, 8:], atol=1e-4)
    np.testing.assert_allclose(got[:, 32:], last[:, 8:], atol=1e-4)
    whole = in_range_nats(model, windows, 500, 2)
    np.testing.assert_allclose(whole, window_nats(model, policy, windows, 2), atol=1e-4)


def test_windows_are_seeded_and_distinct(ids: list[int]):
    a, b = cut_windows(ids, 5, 50, 3), cut_windows(ids, 5, 50, 3)
    np.testing.assert_array_equal(a, b)
    assert len({tuple(row) for row in a.tolist()}) == 5
    assert (a != cut_windows(ids, 5, 50, 4)).any()
    with pytest.raises(ValueError, match=r"600 tokens, and 8 windows of 601 are asked for"):
        cut_windows(ids, 8, 600, 0)


def test_buckets_by_hand():
    nats = np.array([[1.0, 3.0, 5.0, 7.0, 9.0], [3.0, 5.0, 7.0, 9.0, 11.0]])
    assert bucket_means(nats, 2) == [3.0, 7.0, 10.0]


def test_the_frame_of_a_book_is_left_out(tmp_path: pathlib.Path):
    book = tmp_path / "book.txt"
    frame = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***"
    book.write_text(
        f"Licence.\r\n{frame.format('START')}\r\nCall me\r\n.\r\n{frame.format('END')}\nEnd."
    )
    assert read_text(str(book)) == "\nCall me\n.\n"


# Tasks.
def task_set(model: Model, name: str):
    encoder = PromptEncoder(model.tokenizer)
    return make_task_set(name, encoder, 400, 3, 4, (0, 1), Materials(made_up_source(0)))


def test_a_reader_of_the_prompt_scores_everything(model: Model):
    tasks = task_set(model, "passkey-short")
    row = evaluate(tasks, lambda examples, task: [read(e) for e in examples], 100)
    assert row["accuracy"]["samples"] == [1.0, 1.0]
    assert [d["mean"] for d in row["by_depth"]] == [1.0] * 3
    assert row["examples"] == 12 and row["chance"] < 0.01
    found = [b["mean"] for b in row["by_position"] if b]
    assert found and set(found) == {1.0}


def test_who_reads_only_the_end_is_found_out_by_depth(model: Model):
    """Correct at the last depth and nowhere else: accuracy, depths and distances say so."""
    tasks = task_set(model, "passkey-short")

    def answer(examples: Any, task: Any) -> list[str]:
        late = [e.answer_token > 0.8 * e.prompt_tokens for e in examples]
        return [read(e) if end else "nothing" for e, end in zip(examples, late, strict=True)]

    row = evaluate(tasks, answer, 100)
    assert [d["mean"] for d in row["by_depth"]] == [0.0, 0.0, 1.0]
    assert row["accuracy"]["mean"] == pytest.approx(1 / 3)
    near = [b["mean"] for b in row["by_distance"] if b]
    assert near[0] > near[-1] == 0.0


def test_a_guesser_scores_chance(model: Model):
    tasks = task_set(model, "common-words")
    example = tasks.examples[0][0]
    assert 0 < chance(example) < 0.5 and tasks.depths == (None,)


def test_tasks_that_do_not_fit_are_refused(model: Model):
    encoder = PromptEncoder(model.tokenizer)
    data = Materials(made_up_source(0))
    with pytest.raises(
        ValueError, match=r"'passkey' writes up to 12 tokens, more than a text of 8"
    ):
        make_task_set("passkey", encoder, 8, 2, 1, (0,), data)
    with pytest.raises(ValueError, match="unknown task 'passkeys'"):
        make_task_set("passkeys", encoder, 100, 2, 1, (0,), data)


# Summaries.
def sample(*values: float) -> dict[str, Any]:
    return record.sample(list(values))


def loss(policy: str, length: int, excess: float) -> dict[str, Any]:
    nats = [sample(2.0, 2.2), sample(2.0 + excess, 2.2 + excess)]
    return {
        "kind": "loss", "policy": policy, "length": length, "edges": [length // 2, length],
        "nats": nats, "excess": [sample(0.0, 0.0), sample(excess, excess)], "mean": nats[0],
    }  # fmt: skip


def task(policy: str, length: int, accuracy: float, by_chance: float = 0.1) -> dict[str, Any]:
    return {
        "kind": "task", "policy": policy, "task": "lines", "length": length, "examples": 100,
        "accuracy": sample(accuracy, accuracy), "chance": by_chance, "depths": [0.0, 1.0],
        "by_depth": [sample(accuracy, accuracy), sample(accuracy, accuracy)],
    }  # fmt: skip


def test_effective_lengths_end_at_the_first_failure():
    assert effective_length([True, True, False, True], [8, 16, 32, 64]) == 16
    assert effective_length([False, True], [8, 16]) == 0
    with pytest.raises(ValueError, match=r"no length of 128 is within the trained 64"):
        short_length([128], 64)


def test_a_summary_sets_the_short_beside_the_long():
    rows = [loss("dense", 64, 0.0), loss("dense", 128, 3.0)]
    rows += [loss("yarn:4", 64, 0.04), loss("yarn:4", 128, 0.06)]
    rows += [task("dense", 64, 0.9), task("dense", 128, 0.1)]
    rows += [task("yarn:4", 64, 0.8), task("yarn:4", 128, 0.75)]
    got = summarise(rows, "yarn:4", TRAINED, 0.05, 0.8)
    assert got["long_change"]["mean"] == pytest.approx(-2.94)
    assert got["effective"] == {"mean": 64, "seeds": [64, 64]}
    lines = got["tasks"]["lines"]
    assert lines["effective"]["mean"] == 128 and lines["short_change"]["mean"] == pytest.approx(
        -0.1
    )
    assert summarise(rows, "dense", TRAINED, 0.05, 0.8)["tasks"]["lines"]["effective"]["mean"] == 64


def test_a_task_that_dense_attention_cannot_do_has_no_effective_length():
    rows = [loss("dense", 64, 0.0), task("dense", 64, 0.12)]
    assert summarise(rows, "dense", TRAINED, 0.05, 0.8)["tasks"]["lines"]["effective"] is None


# Everything.
def settings(folder: pathlib.Path, **changes: Any) -> Settings:
    fields = {
        "model": str(folder / "stories260k"), "policies": ("yarn:4",), "lengths": (64, 128),
        "tasks": ("passkey-short",), "text": f"text:{folder / 'texts'}", "haystack": "made-up",
        "items": "", "chat": False, "seeds": (0, 1), "windows": 2, "depths": 2, "count": 1,
        "batch": 2, "trained": TRAINED, "bucket": 0, "loss_threshold": 0.05,
        "accuracy_threshold": 0.8,
    }  # fmt: skip
    return Settings(**(fields | changes))


@pytest.mark.slow
def test_the_whole_command(folder: pathlib.Path, model: Model, tmp_path: pathlib.Path, monkeypatch):
    other = f"window:9@{folder / 'stories260k'}"
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Chapter {i}. {TEXT}" for i in range(60)))
    changes = {"lengths": (128, 192), "trained": 128, "text": str(book)}
    asked = settings(folder, policies=("yarn:4", other), attention=True, **changes)
    keep = str(tmp_path / "kept.jsonl")
    run(dataclasses.replace(asked, policies=(other,), attention=False), keep)
    with monkeypatch.context() as patched:  # what is kept is not measured again
        patched.setattr(long_context, "in_range_nats", lambda *args: pytest.fail("measured"))
        rows = run(asked, keep)
        for name in ("window_nats", "evaluate", "measure_set"):
            patched.setattr(long_context, name, lambda *args: pytest.fail("measured"))
        assert run(asked, keep) == rows
    with pytest.raises(ValueError, match="of another computation"):
        run(dataclasses.replace(asked, count=2), keep)
    names = [row["policy"] for row in rows if row["kind"] == "summary"]
    assert names == ["dense", "window:128", "yarn:4", other]
    assert len([r for r in rows if r["kind"] == "loss"]) == 8
    assert len([r for r in rows if r["kind"] == "task"]) == 8
    assert len([r for r in rows if r["kind"] == "attention"]) == 8
    assert "of the best head's" in show(rows)
    path = record.save("long_context_x", rows, config=asked, seeds=asked.seeds, folder=tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    result = json.loads(path.read_text())
    names = shown.tables("x", "long_context_x", ("loss", "task", "attention"))
    losses, accuracies, attention = (t.render() for t in names)
    assert "| policy | task | 128 | 192 |" in attention
    measured = [r for r in rows if r["kind"] == "attention" and r["policy"] == "yarn:4"]
    cells = " | ".join(
        f"{shown.percent(r['best'])} ({shown.percent(r['mass'], 1)})" for r in measured
    )
    assert len(measured) == 2 and f"| yarn:4 | passkey-short | {cells} |" in attention
    assert (
        "| yarn:4 |" in losses and "Trained length 128" in losses and "passkey-short" in accuracies
    )
    for figure in shown.figures("long_context_x"):
        save(figure, result, tmp_path / pathlib.Path(figure.path).name, "x")
    text = (tmp_path / "long_context_x.svg").read_text()
    assert "trained length" in text and "yarn:4" in text
    assert "start" in (tmp_path / "long_context_x_depth.svg").read_text()
    assert "evidence to the end" in (tmp_path / "long_context_x_distance.svg").read_text()
    without = [row for row in rows if row["kind"] == "task"]
    alone = summarise(without, "yarn:4", 128, 0.05, 0.8)
    whole = next(r for r in rows if r["kind"] == "summary" and r["policy"] == "yarn:4")
    assert alone["tasks"] == whole["tasks"] and "short_loss" not in alone
    assert show([*without, alone]).splitlines()[0].startswith("dense")


def test_every_panel_shows_the_baselines_and_few_others():
    others = [f"linear:{i}" for i in range(8)]
    found = long_context_figures.panels(["dense", "window:64", *others, "dense"])
    assert [p[:2] for p in found] == [["dense", "window:64"]] * 2
    assert [name for p in found for name in p[2:]] == others
    assert max(len(p) for p in found) == 2 + long_context_figures.LINES
    assert long_context_figures.panels(["dense"]) == [["dense"]]


def test_many_policies_are_drawn_in_several_panels(tmp_path: pathlib.Path):
    policies = ["dense", "window", *(f"linear:{i}" for i in range(9))]
    one, lengths = record.sample([0.5]), (128, 256)
    rows = [
        {
            "kind": "loss", "policy": policy, "length": n, "edges": [n // 2, n], "nats": [one] * 2
        }
        for policy in policies
        for n in lengths
    ] + [
        {
            "kind": "task", "policy": policy, "length": n, "task": task, "depths": [0.0, 1.0],
            "by_depth": [one] * 2, "by_distance": [one, None], "width": n // 2,
        }
        for policy in policies
        for n in lengths
        for task in ("lines", "needle")
    ]  # fmt: skip
    result = {"rows": [*rows, {"kind": "summary", "trained": 128}]}
    for draw, count in (("curves", 2), ("heat_maps", 22), ("distances", 4)):
        canvas = getattr(long_context_figures, draw)(result)
        drawn = [a for a in canvas.axes if a.get_visible() and a.get_label() != "<colorbar>"]
        assert len(drawn) == count
        plt.close(canvas)


def test_baselines_are_always_there(folder: pathlib.Path):
    asked = settings(folder)
    assert long_context.all_policies(asked, 64) == ("dense", "window:64", "yarn:4")
    given = dataclasses.replace(asked, policies=("window:32", "dense"))
    assert long_context.all_policies(given, 64) == ("dense", "window:32")
    elsewhere = dataclasses.replace(asked, policies=("window:32@OTHER",))
    assert long_context.all_policies(elsewhere, 64) == ("dense", "window:64", "window:32@OTHER")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("yarm:4",)}, "unknown policy 'yarm:4'"),
        ({"lengths": (128,)}, "no length of 128 is within the trained 64"),
        ({"tasks": ("lime",)}, "unknown task 'lime'"),
        ({"windows": 3}, "3 windows in batches of 2: make it a multiple"),
        ({"windows": 0, "tasks": ()}, "neither windows of text nor tasks"),
    ],
)
def test_what_is_asked_wrongly_is_refused_first(
    folder: pathlib.Path, changes: dict, message: str, monkeypatch
):
    monkeypatch.setattr(long_context, "window_nats", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        run(settings(folder, **changes))


def test_without_windows_no_loss_is_measured(folder: pathlib.Path, monkeypatch):
    for name in ("window_nats", "in_range_nats"):
        monkeypatch.setattr(long_context, name, lambda *args: pytest.fail("measured"))
    answered = lambda *args: lambda examples, task: [read(e) for e in examples]
    monkeypatch.setattr(long_context, "engine_answers", answered)
    asked = settings(folder, windows=0, lengths=(128,), trained=128, policies=())
    assert {row["kind"] for row in run(asked)} == {"task", "summary"}


@pytest.mark.slow
def test_policies_are_added_to_a_result(folder: pathlib.Path, monkeypatch):
    asked_of = []

    def answered(model, policy, *args):
        asked_of.append(policy)
        return lambda examples, task: [read(e) for e in examples]

    monkeypatch.setattr(long_context, "engine_answers", answered)
    asked = settings(folder, windows=0, lengths=(128,), trained=128)
    both = run(asked)
    before = run(dataclasses.replace(asked, policies=()))
    asked_of.clear()
    assert run(asked, before=before)[: len(before)] == before
    assert len(asked_of) == 1  # what is there is not measured again
    by_name = lambda rows: sorted(map(str, rows))
    assert by_name(run(asked, before=before)) == by_name(both)
    with pytest.raises(ValueError, match="nothing to add"):
        run(asked, before=both)


def test_models_with_other_tokenizers_do_not_compare(model: Model):
    with pytest.raises(ValueError, match="another tokenizer than --model"):
        load_policies(("dense@python-1m",), model, 64)


def test_a_page_shows_chosen_policies_by_length(monkeypatch):
    def loss(policy, length, nats):
        both = {"nats": [record.sample([9.0]), record.sample([nats])]}
        return (
            {"kind": "loss", "policy": policy, "length": length} | both | {"excess": both["nats"]}
        )

    def task(policy, accuracy, name="lines"):
        share = record.sample([accuracy])
        return {"kind": "task", "policy": policy, "length": 64, "task": name, "accuracy": share}

    rows = [loss("a", 64, 1.5), loss("b", 64, 2.0), loss("a", 32, 0.5), loss("b", 32, 3.0)]
    rows += [task("a", 0.25), task("a", 0.75, "keys")]
    monkeypatch.setattr(record, "load", lambda name: {"rows": rows, "name": name})
    monkeypatch.setattr(shown, "caption", lambda result: "caption")
    losses = shown.ByLength("x", "r", "d", ("b", "a")).render().splitlines()
    assert losses[0] == "| policy | 32 | 64 |"
    assert losses[2:4] == [
        "| b | 3.00 (+3.00) | 2.00 (+2.00) |",
        "| a | 0.50 (+0.50) | 1.50 (+1.50) |",
    ]
    assert shown.ByLength("x", "r", "d", ("a",), "lines").render().splitlines()[2] == "| a | 25% |"
