"""What a policy gains far out and loses near by, and how far it reaches."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import record

Row = dict[str, Any]


def effective_length(good: Sequence[bool], lengths: Sequence[int]) -> int:
    """The longest length up to which everything is good; 0 if already the shortest is not."""
    reached = 0
    for length, fine in zip(lengths, good, strict=True):
        if not fine:
            break
        reached = length
    return reached


def summarise(
    rows: Sequence[Row],
    policy: str,
    trained: int,
    loss_threshold: float,
    accuracy_threshold: float,
) -> Row:
    """One policy's row: short-context regression beside long-context gain, and effective lengths.

    By loss, a length is reached while the last bucket of positions is at most ``loss_threshold``
    nats above the same tokens read within the trained length. By a task, while accuracy is at least
    ``accuracy_threshold`` times that of the dense policy at the longest length within the trained
    one; None where that is not above chance, so that the model cannot do the task at all. Both must
    hold at all shorter lengths, too. Answered by the means and, in ``seeds``, by each seed. Without
    rows of loss there are no numbers of it.

    Raises:
        ValueError: no length within the trained one was measured.
    """
    measured = [row for row in rows if row["kind"] in ("loss", "task")]
    lengths = sorted({row["length"] for row in measured if row["policy"] == policy})
    short, long = short_length(lengths, trained), lengths[-1]
    summary: Row = {"kind": "summary", "policy": policy, "short": short, "long": long}
    if any(row["kind"] == "loss" for row in measured):
        summary |= _loss_summary(rows, policy, short, long, loss_threshold)
    names = dict.fromkeys(row["task"] for row in rows if row["kind"] == "task")
    summary["tasks"] = {
        name: _task_summary(rows, policy, name, short, accuracy_threshold) for name in names
    }
    return summary


def _loss_summary(rows: Sequence[Row], policy: str, short: int, long: int, threshold: float) -> Row:
    """Loss of a policy in range, at the longest length, and how far it holds."""
    losses = [row for row in rows if row["kind"] == "loss"]
    mine, dense = (
        {row["length"]: row for row in losses if row["policy"] == name}
        for name in (policy, "dense")
    )
    lengths = sorted(mine)
    return {
        "short_loss": mine[short]["mean"],
        "short_change": _difference(mine[short]["mean"], dense[short]["mean"]),
        "long_loss": mine[long]["nats"][-1],
        "long_change": _difference(mine[long]["nats"][-1], dense[long]["nats"][-1]),
        "long_excess": mine[long]["excess"][-1],
        "effective": _effective(
            [mine[n]["excess"][-1] for n in lengths], lengths, lambda x: x <= threshold
        ),
    }


def _task_summary(
    rows: Sequence[Row], policy: str, name: str, short: int, threshold: float
) -> dict[str, Any]:
    """Accuracy of a policy at one task, in range, at the longest length, and how far it holds."""
    mine = [row for row in rows if row["kind"] == "task" and row["task"] == name]
    done = {row["length"]: row for row in mine if row["policy"] == policy}
    base = next(row for row in mine if (row["policy"], row["length"]) == ("dense", short))
    at = sorted(done)
    wanted = threshold * base["accuracy"]["mean"]
    # More than two standard errors of a coin above chance, over all examples and seeds.
    trials = base["examples"] * len(base["accuracy"]["samples"])
    noise = 2 * np.sqrt(base["chance"] * (1 - base["chance"]) / trials) + 1 / trials
    able = base["accuracy"]["mean"] > base["chance"] + noise
    return {
        "short": done[short]["accuracy"],
        "short_change": _difference(done[short]["accuracy"], base["accuracy"]),
        "long": done[at[-1]]["accuracy"],
        "chance": done[at[-1]]["chance"],
        "effective": _effective([done[n]["accuracy"] for n in at], at, lambda x: x >= wanted)
        if able
        else None,
    }


def short_length(lengths: Sequence[int], trained: int) -> int:
    """The longest length within the trained one.

    Raises:
        ValueError: there is none.
    """
    within = [length for length in lengths if length <= trained]
    if not within:
        raise ValueError(
            f"no length of {', '.join(map(str, lengths))} is within the trained {trained}: add "
            "one, to compare with."
        )
    return max(within)


def _difference(a: Row, b: Row) -> Row:
    """``a - b`` seed by seed."""
    return record.sample([x - y for x, y in zip(a["samples"], b["samples"], strict=True)])


def _effective(samples: Sequence[Row], lengths: Sequence[int], good: Any) -> Row:
    """The effective length by the means, and by each seed."""
    seeds = range(len(samples[0]["samples"]))
    return {
        "mean": effective_length([bool(good(s["mean"])) for s in samples], lengths),
        "seeds": [
            effective_length([bool(good(s["samples"][i])) for s in samples], lengths) for i in seeds
        ],
    }


def show(rows: Sequence[Row]) -> str:
    """The summaries and accuracies as plain text."""
    losses = [row for row in rows if row["kind"] == "summary" and "short_loss" in row]
    lines = [
        f"{'policy':16} {'short loss':>10} {'change':>8} {'long loss':>10} {'vs dense':>9} "
        f"{'excess':>7} {'effective':>9}"
    ]
    for r in losses:
        lines.append(
            f"{r['policy']:16} {r['short_loss']['mean']:10.3f} {r['short_change']['mean']:+8.3f} "
            f"{r['long_loss']['mean']:10.3f} {r['long_change']['mean']:+9.3f} "
            f"{r['long_excess']['mean']:+7.3f} {r['effective']['mean']:9d}"
        )
    lines = [*lines, ""] if losses else []
    for r in (row for row in rows if row["kind"] == "task"):
        mean, spread = (100 * r["accuracy"][name] for name in ("mean", "spread"))
        depths = " ".join(f"{100 * d['mean']:4.0f}" for d in r["by_depth"])
        lines.append(
            f"{r['policy']:16} {r['task']:18} {r['length']:7d} {mean:6.1f}% ± {spread:.1f} "
            f"(chance {100 * r['chance']:.1f}) by depth {depths}"
        )
    for r in (row for row in rows if row["kind"] == "attention"):
        mass, best, share = (100 * r[name]["mean"] for name in ("mass", "best", "share"))
        lines.append(
            f"{r['policy']:16} {r['task']:18} {r['length']:7d} evidence gets {mass:.2f}% of all "
            f"attention, {best:.1f}% of the best head's (share of tokens {share:.2f}%)"
        )
    return "\n".join(lines)
