"""Rows of both studies become cells of their tables, and the rates a figure."""

import matplotlib.pyplot as plt

from experiments import record
from experiments.shown import serving


def test_rows_of_batched_decoding():
    numbers = ("passes_per_token", "tokens_per_second", "slots_read_per_pass", "grouping_rate")
    outcome = {"exact": 46, "near_ties": 2, "wrong": 0}
    row = {"method": "exspec-8", "outcome": outcome} | {n: record.sample([0.5]) for n in numbers}
    cells = serving.batch_row(row)
    assert len(cells) == len(serving.BATCH_HEADER) and cells[-2:] == ("50%", "46, 2, 0")
    assert serving.is_decoding(row) and not serving.is_check(row)
    assert serving.batch_row(row | {"method": "pool-8"})[-2] == ""
    check = {"method": "padded-growth", "outcome": outcome}
    assert serving.is_check(check) and len(serving.check_row(check)) == len(serving.CHECK_HEADER)


def test_rows_of_rules_and_heads():
    numbers = ("verified", "discarded", "tokens_per_pass", "cost@4", "cost@8", "cost@16")
    rule = {"method": "specdec-0.5"} | {n: record.sample([0.25, 0.75]) for n in numbers}
    assert serving.is_rule(rule) and serving.rate_row(rule)[0] == "**specdec-0.5**"
    assert len(serving.rate_row(rule)) == len(serving.RATE_HEADER)
    names = ("auc", "calibration_error", "kl", "label", "prediction")
    head = {"method": "head-weight-1"} | {n: record.sample([0.7]) for n in names}
    assert serving.is_head(head) and serving.head_row(head)[:2] == ("weight-1", "0.700")
    assert len(serving.head_row(head)) == len(serving.HEAD_HEADER)
    methods = ("fixed-1", "fixed-4", "specdec-0.5", "target-text-0.5", "heuristic", "oracle")
    figure = serving.rates({"rows": [rule | {"method": m} for m in methods] + [head]})
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    plt.close(figure)
    assert labels == {
        "fixed lengths", "SpecDec++", "SpecDec++, target's text only", "heuristic", "oracle"
    }  # fmt: skip
