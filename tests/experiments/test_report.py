"""Tables and figures follow from results, and stale ones are noticed."""

import json

import pytest

from experiments import figures, methods, record, report
from experiments.shown import FIGURES, TABLES
from experiments.shown.speculative import speculative_row, tokens_per_pass


def speculative_result() -> list[dict]:
    """Rows as the drafter comparison saves them."""
    exact = {"tokens": 10, "differing": 1, "near_ties": 1, "width_error": 1e-6}
    row = {
        "method": "lookup",
        "shared_head": False,
        "by_depth@0": [record.sample([0.5]), record.sample([0.25])],
        "by_depth@1": [record.sample([0.5]), record.sample([0.25])],
        "exactness": [{**exact, "same_width_mismatches": 0}],
    }
    names = ("tokens_per_pass", "modelled_speedup", "measured_speedup")
    names = ("draft_cost", *(f"{name}@{t}" for name in names for t in "01"))
    return [{**row, **{name: record.sample([1.5, 2.5]) for name in names}}]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A tree with one result and one document, in place of the repository."""
    results = tmp_path / "results"
    record.save("trial", speculative_result(), config={"model": "m"}, seeds=[0], folder=results)
    monkeypatch.setattr(record, "RESULTS", results)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("a\n<!-- table: t -->\nold\n<!-- end table -->\nb\n")
    return tmp_path


def table() -> report.Table:
    """A table of one column pair over the trial result."""
    return report.Table("t", "page.md", "trial", ("drafter",) * 9, speculative_row)


def test_an_update_makes_everything_current(scratch):
    drawn = (figures.Figure("figures/x.svg", "trial", tokens_per_pass),)
    assert report.stale((table(),), drawn) == ["table t in page.md", "figure figures/x.svg"]
    report.update((table(),), drawn)
    assert report.stale((table(),), drawn) == []
    text = (scratch / "page.md").read_text()
    assert "prompt lookup" in text and "2.00 ± 0.71" in text and "1 near-ties in 10" in text
    assert text.startswith("a\n") and text.endswith("b\n") and "\nold\n" not in text


def test_a_changed_result_is_noticed(scratch):
    drawn = (figures.Figure("figures/x.svg", "trial", tokens_per_pass),)
    report.update((table(),), drawn)
    path = record.RESULTS / "trial.json"
    result = json.loads(path.read_text())
    result["rows"][0]["tokens_per_pass@0"]["mean"] = 9.0
    path.write_text(json.dumps(result))
    assert len(report.stale((table(),), drawn)) == 2


def test_a_text_that_differs_is_not_called_exact():
    row = speculative_result()[0]
    row["exactness"][0]["differing"] = 2
    assert "**no**" in speculative_row(row)[-1]


def test_missing_markers_are_an_error():
    with pytest.raises(ValueError, match="markers"):
        report.insert("no markers here", "t", "body")


def test_committed_tables_and_figures_are_current():
    assert report.stale(TABLES, FIGURES) == []


def test_statements_are_listed_with_their_answers(scratch):
    answers = [
        {"statement": "it works", "holds": True, "seeds": [True, False], "numbers": "2 against 1"},
        {"statement": "it is fast", "holds": False, "seeds": [False]},
        {"statement": "it is cheap", "holds": None, "seeds": []},
    ]
    record.save("said", [], config={}, seeds=[0, 1], statements=answers, folder=record.RESULTS)
    assert report.Statements("s", "page.md", "said").render().splitlines() == [
        "- holds in the mean, 1 of 2 seeds (2 against 1): it works",
        "- **does not hold**: it is fast",
        "- not measured: it is cheap",
    ]
    chosen = report.Statements("s", "page.md", "said", ("it is cheap",))
    assert chosen.render() == "- not measured: it is cheap"
    with pytest.raises(ValueError, match="does not answer 'it is new'"):
        report.Statements("s", "page.md", "said", ("it is new",)).render()


def test_a_caption_names_every_run_that_a_result_is_of(scratch):
    result = record.load("trial")
    one = report.caption(result)
    assert one.count("commit") == 1 and one.endswith(f"`{result['command']}`")
    old = {"commit": "0123456789abcdef", "modified": True, "date": "2020-01-02", "command": "old"}
    both = report.caption(result | {"earlier": [old]})
    assert "commit 0123456789 (with changes), 2020-01-02: `old`; then commit" in both
    assert both.endswith(one[one.index("commit") :])


def test_every_method_has_a_row():
    text = methods.MethodTable("methods", "WORKSPACE.md").render()
    rows = {line.split("]")[0].strip("| [") for line in text.splitlines()[2:]}
    assert rows >= {"Clover", "Token Recycling"}
    clover = next(line for line in text.splitlines() if "[Clover]" in line)
    assert "2408.00264" in clover and "`clover1`" in clover and "`medusa_smollm2`" in clover
    assert "`base_lm`" not in clover and "| tested |" in clover


def test_a_method_without_a_paper_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    page = tmp_path / "research" / "family" / "method" / "README.md"
    page.parent.mkdir(parents=True)
    page.write_text("# Method\n\nNo paper.\n")
    with pytest.raises(ValueError, match="must begin with"):
        methods.MethodTable("methods", "WORKSPACE.md").render()
