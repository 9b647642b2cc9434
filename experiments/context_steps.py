"""What a step of the trainings for longer contexts takes, against plain tuning, in one run.

    python -m experiments.context_steps --methods=clex,clex-ntk,random

The trainings are those of :mod:`experiments.context_trainings`, with their configs and models.
Steps of all of them alternate, so that a machine that changes its pace changes all; a ratio is that
of two steps of one turn.
"""

import dataclasses
import importlib
import statistics
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from experiments import record, statements
from experiments.bench_train import Training, seconds
from experiments.context_trainings import METHODS, row_length
from experiments.report import markdown, number
from experiments.settings import from_flags
from experiments.statements import Row, Statement, value
from train.config import TrainConfig, build

NAME = "context_steps"
"""Of the result."""
PLAIN = "rope256"
"""Plain tuning on rows of the trained length: what the others are held against."""

BOUND = 1.3
"""What CLEX's protocol allows a step, over plain tuning."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed; see the flags."""

    methods: tuple[str, ...]
    update_tokens: int
    repeats: int

    def checked(self) -> "Settings":
        """The same with plain tuning first.

        Raises:
            ValueError: an unknown method, or updates of less than a row.
        """
        if unknown := set(self.methods) - METHODS.keys():
            raise ValueError(f"unknown method {min(unknown)!r}: choose of {', '.join(METHODS)}.")
        if self.update_tokens < (most := max(row_length(METHODS[m]) for m in self.methods)):
            raise ValueError(f"an update needs at least a row: --update_tokens={most}.")
        methods = tuple(dict.fromkeys((PLAIN, *self.methods)))
        return dataclasses.replace(self, methods=methods)


def training(method: str, tokens: int) -> Training:
    """The compiled step of a method with updates of ``tokens`` tokens."""
    chosen = METHODS[method]
    config = importlib.import_module(f"configs.{chosen.config}").get_config()
    config.update_from_flattened_dict({**chosen.changes, "task.evaluation_split": ""})
    config.batch_size, config.steps_per_call = tokens // row_length(chosen), 1
    return Training(build(TrainConfig, config.to_dict()))


def run(settings: Settings) -> list[dict[str, Any]]:
    """Seconds of a step of every method, and over those of plain tuning."""
    trainings = {m: training(m, settings.update_tokens) for m in settings.methods}
    for made in trainings.values():
        seconds(made.run)  # touches all memory once
    times: dict[str, list[float]] = {method: [] for method in trainings}
    for _ in range(settings.repeats):
        for method, made in trainings.items():
            times[method].append(seconds(made.run))
    return [
        {
            "method": method,
            "seconds": record.sample(found),
            "ratio": record.sample([a / b for a, b in zip(found, times[PLAIN], strict=True)]),
            "compile_seconds": trainings[method].compile_seconds,
        }
        for method, found in times.items()
    ]


def median(row: Row) -> float:
    """Of a method's ratio: one slow step of either side does not move it."""
    return statistics.median(row["ratio"]["samples"])


def _cheap(rows: dict[str, Row], turn: int) -> bool:
    row = rows["clex"]
    return (median(row) if turn < 0 else value(row, "ratio", turn)) <= BOUND


STATEMENTS = (
    Statement(
        f"a step of CLEX takes at most {BOUND} times that of plain tuning",
        ("clex",),
        _cheap,
        lambda rows: f"{median(rows['clex']):.2f}, the median",
    ),
)


def step_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a method."""
    return (
        next(iter(METHODS[row["method"]].policies)),
        number({k: 1e3 * row["seconds"][k] for k in ("mean", "spread")}, 0),
        number(row["ratio"]),
        f"{median(row):.2f}",
    )


HEADER = ("training", "ms per step", "over plain tuning", "median")


def main(_: Sequence[str]) -> None:
    """Time with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    try:
        settings = from_flags(Settings).checked()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    rows = run(settings)
    answers = statements.answer(rows, STATEMENTS, settings.repeats)
    print(markdown(HEADER, [step_row(row) for row in rows]))
    print(statements.show(answers))
    path = record.save(NAME, rows, config=settings, seeds=[0], statements=answers)
    print("saved", path)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_list("methods", ["clex", "clex-ntk", "random"], f"Of {', '.join(METHODS)}.")
    flags.DEFINE_integer("update_tokens", 4096, "Tokens of an update.", lower_bound=1)
    flags.DEFINE_integer("repeats", 15, "Steps of each, in turn.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
