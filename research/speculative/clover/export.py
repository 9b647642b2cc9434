"""Trained heads out of a run: ``python -m research.speculative.clover.export``.

``--workdir`` is the run, ``--out`` the folder to write. That folder
is what ``--drafter=clover:DIR`` and ``--drafter=medusa:DIR`` take.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from models.sharding import ShardingRules, make_mesh
from research.speculative.clover.task import DrafterTask
from train.checkpoint import Checkpoints
from train.config import TrainConfig, build, build_task
from train.state import abstract_state

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def trained_heads(workdir: pathlib.Path, config: TrainConfig, task: DrafterTask) -> Any:
    """The heads of the newest checkpoint; their moving average if the run kept one.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: a checkpoint of another config.
    """
    trained, _ = task.partition(task.specs())
    abstract = abstract_state(
        trained,
        task.optimizer(config, trained),
        config.ema_decay > 0,
        make_mesh("", jax.devices()[:1]),
        ShardingRules(),
    )
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError(f"{workdir} has no checkpoint: train first.")
        checkpoints.read_record(step, dataclasses.asdict(config))
        state = checkpoints.restore(step, abstract, None)
    finally:
        checkpoints.close()
    return state.trained if state.average is None else state.average


def main() -> None:
    """Define the flags, read them and write the folder; errors are one sentence."""
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    out = flags.DEFINE_string("out", None, "Folder to write.", required=True)
    dtype = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of the weights on disk.")

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        try:
            folder = pathlib.Path(workdir.value)
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config = build(TrainConfig, values)
            task = build_task(config)
            task.save(trained_heads(folder, config, task), out.value, DTYPES[dtype.value])
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(run)


if __name__ == "__main__":
    main()
