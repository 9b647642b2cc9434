import importlib
import json
import pathlib
import sys
import types
from typing import Any

import pytest

from experiments import context_methods as methods
from experiments import context_statements, context_trainings, record, statements
from experiments.context_trainings import METHODS, Settings, command, export_folder, row_length


def settings(folder: pathlib.Path, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "model": "records-11m", "folder": str(folder), "methods": ("linear", "clex"),
        "rates": ("1e-3", "3e-4"), "updates": 30, "update_tokens": 4096, "choose_length": 1024,
        "lengths": (256, 512), "tasks": (), "text": "python_stdlib", "seeds": (0, 1),
        "windows": 2, "depths": 1, "count": 1, "batch": 2, "jobs": 1, "loss_threshold": 0.05,
        "accuracy_threshold": 0.8,
    }  # fmt: skip
    return Settings(**(given | changes))


def loss_row(policy: str, loss: float = 3.0, length: int = 512) -> dict[str, Any]:
    """What a policy loses, as far as it is looked at."""
    nats = [record.sample([loss])]
    return {"kind": "loss", "policy": policy, "length": length, "nats": nats}


RATES = {"linear": {"losses": {"1e-3": 3.0}, "best": "1e-3"}}


@pytest.mark.parametrize("method", METHODS)
def test_every_training_changes_keys_that_its_config_has(method: str, tmp_path: pathlib.Path):
    words = command(settings(tmp_path), method, "1e-3", 1)
    given = dict(w.removeprefix("--config.").split("=", 1) for w in words if "--config." in w)
    config = importlib.import_module(f"configs.{METHODS[method].config}").get_config()
    for key in given:
        place: Any = config
        for part in key.split("."):
            assert part in place, key
            place = place[part]
    tokens = int(given["batch_size"]) * row_length(METHODS[method])
    assert tokens == 4096
    assert given["optimizer.learning_rate"] == "0.001"
    assert int(given["optimizer.warmup_steps"]) < int(given["steps"])


def test_settings_that_cannot_run_are_refused_before_anything_does(tmp_path: pathlib.Path):
    assert settings(tmp_path, lengths=(512, 256)).checked().lengths == (256, 512)
    for changes, message in (
        ({"methods": ("linear", "nothing")}, "unknown method 'nothing'"),
        ({"rates": ()}, "at least one rate and one seed"),
        ({"update_tokens": 511}, "--update_tokens=512"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tmp_path, **changes).checked()


def test_finished_trainings_are_left_alone_and_the_others_are_run_then_exported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[list[str]] = []

    def spy(commands: Any, jobs: int, logs: pathlib.Path) -> None:
        ran.extend(list(words) for words in commands)

    monkeypatch.setattr(methods, "in_parallel", spy)
    given = settings(tmp_path)
    export_folder(given, "linear", "1e-3", 0).mkdir(parents=True)
    methods.train_all(given, [("linear", "1e-3", 0), ("clex", "1e-3", 0)])
    assert [words[2] for words in ran] == ["train", "train.export"]
    assert all(any("clex/1e-3/0" in word for word in words) for words in ran)


def test_a_command_that_fails_is_told_with_its_last_words_and_its_log(tmp_path: pathlib.Path):
    fine = [sys.executable, "-c", "print('fine')"]
    wrong = [sys.executable, "-c", "raise SystemExit('no corpus')"]
    with pytest.raises(RuntimeError, match=r"failed \(no corpus\): see .*1\.log"):
        methods.in_parallel([fine, wrong], 2, tmp_path)
    assert (tmp_path / "0.log").read_text() == "fine\n"


def test_the_rate_that_reads_best_is_chosen_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    losses = {"1e-3": 3.0, "3e-4": 2.5}

    class Read:
        """A model that is known by where it was loaded from."""

        cfg = types.SimpleNamespace(max_length=256)

        def __init__(self, place: str):
            self.place, self.tokenizer = place, self

        def encode(self, text: str) -> list[int]:
            return list(range(5000))

    def nats(model: Any, policy: Any, windows: Any, batch: int) -> Any:
        asked.append(model.place)
        rate = next(rate for rate in losses if f"/{rate}/" in model.place)
        return windows[:, :1] * 0.0 + losses[rate]

    monkeypatch.setattr(methods, "load", Read)
    monkeypatch.setattr(methods, "read_text", lambda *_: "")
    monkeypatch.setattr(methods, "window_nats", nats)
    monkeypatch.setattr(
        methods.long_context, "load_policies", lambda names, model, _: {names[0]: (model, None)}
    )
    chosen = methods.choose_rates(settings(tmp_path))
    assert {method: found["best"] for method, found in chosen.items()} == {
        "linear": "3e-4", "clex": "3e-4",
    }  # fmt: skip
    assert len(asked) == 4
    assert methods.choose_rates(settings(tmp_path)) == json.loads(json.dumps(chosen))
    assert len(asked) == 4
    named = methods.policies_of(settings(tmp_path), chosen, seed=1)
    assert named["CLEX"] == "clex:{0}@{0}".format(tmp_path / "clex" / "3e-4" / "1" / "export")
    assert named["linear 4, tuned, read at 8"].startswith("linear:8@")
    assert named["YaRN 4"] == "yarn:4"


def test_only_policies_without_rows_are_evaluated(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    given = settings(tmp_path, methods=("linear",))
    known = [
        loss_row(label)
        for label in methods.policies_of(given, RATES, 0)
        if label not in ("window", "YaRN 4")
    ]
    (tmp_path / "rows-0.json").write_text(json.dumps(known))
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    asked: list[tuple[str, ...]] = []

    def run(wanted: Any) -> list[dict[str, Any]]:
        asked.append(wanted.policies)
        policies = ("dense", *wanted.policies)  # a baseline that is always there
        summaries = [{"kind": "summary", "policy": p} for p in policies]
        return [*(loss_row(p) for p in policies), *summaries]

    monkeypatch.setattr(methods.long_context, "run", run)
    methods.evaluate_seed(given, 0)
    assert asked == [("window:256", "yarn:4")]
    rows = methods.rows_of(given, 0)
    assert [row["policy"] for row in rows] == list(methods.policies_of(given, RATES, 0))
    named = methods.policies_of(given, RATES, 0)
    assert not methods.missing(named, rows) and methods.missing(named, methods.rows_of(given, 1))


def a_result(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    given = settings(folder, methods=("linear",), seeds=(0,), **changes)
    rates = {"kind": "rates", "method": "linear", **RATES["linear"]}
    rows = [loss_row("dense"), {"kind": "summary", "policy": "dense"}, rates]
    path = record.save(methods.NAME, rows, config=given, seeds=[0], folder=folder)
    return record.load(path.stem, folder)


def test_a_result_is_extended_by_what_it_lacks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    result = a_result(tmp_path)
    wanted = settings(tmp_path / "more", methods=("ntk",), seeds=(0,), jobs=2)
    given = methods.extended(wanted, result)
    assert given.methods == ("linear", "ntk")
    assert methods.rows_of(given, 0) == [loss_row("dense")]
    trained: list[Any] = []
    monkeypatch.setattr(methods, "train_all", lambda _, pairs: trained.extend(pairs))
    monkeypatch.setattr(methods, "choose_rates", lambda _: sys.exit())
    with pytest.raises(SystemExit):
        methods.run(given)
    assert {method for method, *_ in trained} == {"ntk"}
    # Once more, with rows that were measured since: they stay.
    rows = [loss_row("dense"), loss_row("NTK 4, tuned")]
    (tmp_path / "more" / "rows-0.json").write_text(json.dumps(rows))
    methods.extended(wanted, result)
    assert methods.rows_of(given, 0) == rows


def test_a_result_is_extended_by_seeds(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    result = a_result(tmp_path)
    given = methods.extended(settings(tmp_path / "more", methods=("linear",), seeds=(0, 1)), result)
    trained: list[Any] = []
    monkeypatch.setattr(methods, "train_all", lambda _, pairs: trained.extend(pairs))
    monkeypatch.setattr(methods, "policies_of", lambda *_: {"dense": "dense"})
    commands: list[Any] = []
    monkeypatch.setattr(methods, "in_parallel", lambda words, *_: commands.extend(words))
    # The evaluation, which is not run here, would write the rows of the second seed.
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        methods.run(given)
    # The rate that the first seed chose is what the second is trained with.
    assert trained == [("linear", RATES["linear"]["best"], 1)]
    assert [words[-1] for words in commands] == ["--evaluate_seed=1"]
    with pytest.raises(ValueError, match=r"has seed 0.*first in --seeds"):
        methods.extended(settings(tmp_path / "more", seeds=(1, 0)), result)


def test_a_result_of_other_settings_is_not_extended(tmp_path: pathlib.Path):
    result = a_result(tmp_path)
    for changes, message in (
        ({"updates": 31}, "the result has updates 30, not 31"),
        ({"lengths": (256,)}, r"lengths \[256, 512\], not \[256\]"),
    ):
        other = settings(tmp_path / "more", methods=("ntk",), **({"seeds": (0,)} | changes))
        with pytest.raises(ValueError, match=message):
            methods.extended(other, result)
    with pytest.raises(ValueError, match="of one seed"):
        methods.extended(settings(tmp_path), result | {"seeds": [0, 1]})


def test_rows_of_other_code_are_not_joined():
    known = [loss_row("dense"), loss_row("dense", 4.0, length=256), loss_row("window", 9.0)]
    methods.check_again(known, [loss_row("dense", 3.0004), loss_row("dense", 4.0, length=256)])
    with pytest.raises(ValueError, match=r"loses 3\.0100 nats at 512 tokens, 3\.0000"):
        methods.check_again(known, [loss_row("dense", 3.01)])


def test_rows_of_several_seeds_become_one():
    def row(value: float, **more: Any) -> dict[str, Any]:
        return {"policy": "dense", "nats": [record.sample([value])], "edges": [1, 2], **more}

    (joined,) = (methods.merged([row(1.0), row(3.0)]),)
    assert joined["nats"][0]["samples"] == [1.0, 3.0]
    assert joined["edges"] == [1, 2]
    with pytest.raises(ValueError, match="seeds disagree on 'a'"):
        methods.merged([row(1.0, extra="a"), row(1.0, extra="b")])
    assert "extra" in methods.merged([row(1.0, extra=None), row(1.0)])
    with pytest.raises(ValueError, match="lack 'extra'"):
        methods.merged([row(1.0), row(1.0, extra=record.sample([1.0]))])


def test_chance_and_empty_buckets_of_seeds_join():
    def row(chance: float, *buckets: float | None) -> dict[str, Any]:
        found = [None if value is None else record.sample([value]) for value in buckets]
        return {"chance": chance, "by_position": found}

    joined = methods.merged([row(0.2, None, 1.0, None), row(0.4, 0.5, 0.0, None)])
    assert joined["chance"] == pytest.approx(0.3)
    samples = [bucket and bucket["samples"] for bucket in joined["by_position"]]
    assert samples == [[0.5], [1.0, 0.0], None]


def flat(**losses: float) -> dict[str, Any]:
    """Rows of policies by name, of which ``losses`` are those at 1,024 tokens."""
    return {
        name: {
            "kind": "loss", "policy": name, "length": 1024, "nats": [record.sample([loss])],
            "excess": [record.sample([loss - 2.0])],
        }
        for name, loss in losses.items()
    }  # fmt: skip


def test_statements_read_the_last_bucket_of_each_length():
    rows = flat(dense=4.0, **{"linear 4": 3.0, "dynamic NTK": 2.5, "NTK 4": 2.6, "YaRN 4": 2.7})
    by_method = context_statements.rows_by_method(list(rows.values()))
    answers = statements.answer(by_method, context_statements.STATEMENTS, 1)
    held = {a["statement"]: a["holds"] for a in answers}
    assert held["beyond the trained length plain rotations lose more than a nat"] is True
    assert held["untrained, linear scaling beats none beyond the trained length"] is True
    below = "NTK, dynamic NTK and YaRN are below linear scaling at 4 times the length, untrained"
    assert held[below] is True
    assert sum(value is None for value in held.values()) == len(held) - 3
    rows["NTK 4"]["nats"] = [record.sample([3.5])]
    by_method = context_statements.rows_by_method(list(rows.values()))
    answers = statements.answer(by_method, context_statements.STATEMENTS, 1)
    assert {a["statement"]: a["holds"] for a in answers}[below] is False


def test_the_committed_answers_are_those_of_the_committed_rows():
    result = record.load(methods.NAME)
    assert result["statements"] == methods.answered(result["rows"], len(result["seeds"]))


def test_a_comparison_tells_the_pair_that_decides():
    rows = {n: {"x": record.sample([v])} for n, v in (("a", 1.0), ("b", 1.5), ("c", 3.0))}
    pairs = [context_statements.of("a", b, "x") for b in "bc"]
    for rule, holds, numbers in (
        (context_statements.less(), True, "closest of 2: 1.00 against 1.50"),
        (context_statements.within(0.5), False, "furthest off of 2: 1.00 against 3.00"),
        (context_statements.less(1.0), False, "furthest off of 2: 1.00 against 1.50"),
    ):
        said = context_statements.compared("said", "abc", rule, *pairs)
        assert said.test(rows, -1) is holds and said.numbers
        assert said.numbers(rows) == numbers
    bound = context_statements.to("a", "x", 1.5)
    above = context_statements.compared("said", "a", context_statements.at_most(), bound)
    assert above.test(rows, 0) and above.numbers and above.numbers(rows) == "1.00 against 1.50"


def test_orders_are_compared_at_every_measured_length():
    def row(*numbers: float) -> dict[str, Any]:
        names = ("loss@8", "lines@8", "loss@16", "lines@16")
        return {n: record.sample([v]) for n, v in zip(names, numbers, strict=True)}

    rows = {"a": row(1.0, 0.9, 1.0, 0.2), "b": row(2.0, 0.5, 2.0, 0.4), "c": row(3.0, 0.5, 3.0, 0)}
    said = context_statements.orders_differ("said", "abc", "lines")
    assert said.test(rows, -1) and said.numbers
    assert said.numbers(rows) == "of 3 pairs 0 at 8, 1 at 16"
    rows["a"]["lines@16"] = record.sample([0.5])
    assert not said.test(rows, -1)


def test_methods_name_only_labels_that_the_statements_know():
    labels = {label for method in METHODS.values() for label in method.policies}
    labels |= {"dense", "window", *methods.ZERO_SHOT}
    asked = {name for s in context_statements.STATEMENTS for name in s.methods}
    assert asked <= labels
    assert set(context_trainings.CONFIGS) == {f"configs/{m.config}.py" for m in METHODS.values()}
