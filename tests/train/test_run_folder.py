"""What a run leaves besides its checkpoints."""

import json
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np

from train import run_folder
from train.metrics import MetricsFile, Window, read_metrics
from train.run_folder import command_line, describe_run, hash_tree


def test_the_hash_sees_names_types_shapes_and_values():
    tree = {"a": np.arange(6.0, dtype=np.float32), "b": np.zeros(2, np.int32)}
    others = [
        {"a": tree["a"], "c": tree["b"]},
        {"a": tree["a"].reshape(2, 3), "b": tree["b"]},
        {"a": tree["a"], "b": tree["b"].view(np.float32)},
        {"a": np.nextafter(tree["a"], 9, dtype=np.float32), "b": tree["b"]},
    ]
    hashes = {hash_tree(t) for t in (tree, *others)}
    assert len(hashes) == 5
    assert hash_tree({k: jnp.asarray(v) for k, v in tree.items()}) == hash_tree(tree)


def test_the_folder_says_how_to_repeat_the_run(tmp_path: pathlib.Path, monkeypatch):
    states = iter([("c" * 40, "a change"), ("d" * 40, "")])
    monkeypatch.setattr(run_folder, "_git", lambda: next(states))
    main = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="train.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--config=c.py", "--config.x=a b"])
    argv = command_line()
    describe_run(tmp_path, {"seed": 1}, argv, {"data": 1})
    describe_run(tmp_path, {"seed": 1}, argv, {"data": 1})
    run = json.loads((tmp_path / "run.json").read_text())
    assert [x["command"] for x in run["launches"]] == [
        "python -m train --config=c.py '--config.x=a b'"
    ] * 2
    assert run["launches"][0]["versions"]["jax"] and "cores" in run["launches"][0]["processor"]
    assert [(x["commit"][0], x["diff"]) for x in run["launches"]] == [
        ("c", "diff_1.patch"),
        ("d", None),
    ]
    assert (tmp_path / "diff_1.patch").read_text() == "a change"
    assert not (tmp_path / "diff_2.patch").exists()
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}


def test_numbers_that_are_not_finite_become_null(tmp_path: pathlib.Path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(3, {"loss": float("nan"), "rate": 1.5})
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": None, "rate": 1.5}]


def row(loss: float, weight: float, bad: int) -> dict[str, jnp.ndarray]:
    values = {"loss": loss, "weight": weight, "bad_in_row": bad}
    return {name: jnp.asarray([value], jnp.float32) for name, value in values.items()}


def test_a_window_averages_good_updates_by_weight_and_can_be_carried_over():
    rows = [row(1.0, 1.0, 0), row(4.0, 2.0, 0), row(float("nan"), 5.0, 1)]
    whole, first = Window(), Window()
    for r in rows:
        whole.add(r)
    first.add(rows[0])
    rest = Window(json.loads(json.dumps(first.rows())))
    for r in rows[1:]:
        rest.add(r)
    values = whole.take()
    assert values == rest.take() == {"loss": 3.0, "weight": 3.0, "skipped": 1}
    whole.add(rows[2])
    assert np.isnan(whole.take()["loss"])
