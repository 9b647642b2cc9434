"""What a run has learned, read without touching its folder: the run may still be going on."""

import dataclasses
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp

from models.sharding import ShardingRules, make_mesh
from train.checkpoint import SCHEMA
from train.config import TrainConfig, build, build_task
from train.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint of a run.

    Attributes:
        config, task: the run's, from the checkpoint itself.
        params: the trained parameters, on one device; their moving average if the run keeps one.
        averaged: whether they are the average.
        step: updates done.
        pending: metrics of the updates since the last line of ``metrics.jsonl``.
    """

    config: TrainConfig
    task: Any
    params: Any
    averaged: bool
    step: int
    pending: list[dict[str, float]]


def read_trained(run: pathlib.Path, step: int | None = None) -> Trained:
    """The newest checkpoint of the run in this folder, or the one after so many updates.

    Raises:
        FileNotFoundError: it has none, or not that one.
        ValueError: it is damaged, or of another version of the format.
    """
    folder = run.absolute() / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{run} has no checkpoint: name the --workdir of a training run.")
    # Read-only: opening it as the training does would remove what a live run is writing.
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        kept = sorted(manager.all_steps())
        if not kept:
            raise FileNotFoundError(
                f"{run} has no checkpoint yet: wait for the first, or train for longer."
            )
        step = kept[-1] if step is None else step
        if step not in kept:
            raise FileNotFoundError(
                f"{run} has no checkpoint after {step} updates, only after "
                f"{', '.join(map(str, kept))}: raise keep_checkpoints to keep more."
            )
        with _clear_damage(folder / str(step)):
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = dict(manager.restore(step, args=args)["record"])
        if record.get("schema") != SCHEMA:
            raise ValueError(
                f"the checkpoint {folder / str(step)} has format {record.get('schema')}, this "
                f"version reads {SCHEMA}: export it with the version that wrote it."
            )
        config = build(TrainConfig, record["config"])
        task = build_task(config)
        specs, _ = task.partition(task.specs())
        abstract = abstract_state(
            specs,
            task.optimizer(config, specs),
            config.ema_decay > 0,
            make_mesh("", jax.devices()[:1]),
            ShardingRules(),
        )
        with _clear_damage(folder / str(step)):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = manager.restore(step, args=args)["state"]
    averaged = state.average is not None
    return Trained(
        config=config,
        task=task,
        params=state.average if averaged else state.trained,
        averaged=averaged,
        step=step,
        pending=list(record["window"]),
    )


@contextmanager
def _clear_damage(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax raises many kinds for missing and truncated files
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the checkpoint {folder} cannot be read ({first}): remove that folder to export the "
            "one before it."
        ) from error
