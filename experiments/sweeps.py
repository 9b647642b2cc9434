"""Run a sweep and keep what it found: the example sweeps of the documents.

    python -m experiments.sweeps --sweep=configs/sweeps/tiny_lm.py --workers=2

The sweep runs by :mod:`train.sweep` in ``--folder``, so that a command that was cut off goes on
where it was. A row is a trial: its point, how it ended, and its metric by evaluation.
"""

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from optuna.trial import FrozenTrial, TrialState, create_trial

from experiments import record
from train.sweep.plan import load_sweep
from train.sweep.report import STATES, summary
from train.sweep.study import SharedStudy


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is swept and how; see the flags."""

    sweep: str
    folder: str
    stop: str
    stop_options: tuple[str, ...]
    workers: int


def arguments(settings: Settings) -> list[str]:
    """The settings as flags of ``python -m train.sweep``."""
    given = dataclasses.asdict(settings) | {"stop_options": ",".join(settings.stop_options)}
    return [f"--{name}={value}" for name, value in given.items()]


def run(settings: Settings) -> list[dict[str, Any]]:
    """Run the sweep to its end; a row per trial.

    Raises:
        ValueError: the file is no sweep, or the folder is of another one.
        RuntimeError: the sweep was stopped or failed.
    """
    sweep = load_sweep(settings.sweep)
    done = subprocess.run([sys.executable, "-m", "train.sweep", *arguments(settings)])
    if done.returncode:
        raise RuntimeError("the sweep did not come to its end: the same command goes on with it.")
    study = SharedStudy(pathlib.Path(settings.folder), sweep, "none", None)
    print(summary(sweep, study.trials()))
    return [to_row(trial) for trial in study.trials()]


def to_row(trial: FrozenTrial) -> dict[str, Any]:
    """What the result keeps of a trial."""
    return {
        "point": trial.user_attrs["point"],
        "state": STATES[trial.state],
        "value": trial.value,
        "curve": [list(pair) for pair in sorted(trial.intermediate_values.items())],
    }


def to_trial(row: dict[str, Any]) -> FrozenTrial:
    """The trial of a row, as far as tables and pictures read it."""
    state = next(state for state, name in STATES.items() if name == row["state"])
    return create_trial(
        state=state,
        value=row["value"] if state == TrialState.COMPLETE else None,
        user_attrs={"point": row["point"]},
        intermediate_values={int(step): value for step, value in row["curve"]},
    )


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings and save."""
    logging.set_verbosity(logging.WARNING)
    values = {
        field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(Settings)
    }
    name = record.name_of(pathlib.Path(values["sweep"]).stem, None, flags.FLAGS.label)
    values["stop_options"] = tuple(values["stop_options"])
    values["folder"] = values["folder"] or f"runs/sweeps/shown_{name}"
    settings = Settings(**values)
    try:
        rows = run(settings)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    seeds = sorted({row["point"].get("seed", 0) for row in rows})
    print("saved", record.save(f"sweep_{name}", rows, config=settings, seeds=seeds))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("sweep", None, "A file of configs/sweeps/.", required=True)
    flags.DEFINE_string("folder", "", "Of the sweep; default: runs/sweeps/shown_NAME.")
    flags.DEFINE_string("stop", "none", "Pruner, as in python -m train.sweep.")
    flags.DEFINE_list("stop_options", [], "For the pruner.")
    flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1)
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
