"""The launcher: ``python -m train --config=configs/x.py --workdir=DIR --config.a.b=c``."""

import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags


def main() -> None:
    """Define the flags, read them and train; bad input is one sentence and exit status 1."""
    config = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run; a second launch resumes.")
    mesh = flags.DEFINE_string("mesh", "", "Sizes of the mesh axes, as data=2,fsdp=2,tensor=2.")
    profile = flags.DEFINE_integer("profile", 0, "Write a jax trace of so many updates.")
    distributed = flags.DEFINE_bool("distributed", False, "Join the other processes of the run.")
    coordinator = flags.DEFINE_string(
        "coordinator", None, "host:port of process 0 (found by itself on clusters jax knows)."
    )
    processes = flags.DEFINE_integer("num_processes", None, "How many processes take part.")
    process = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.mark_flags_as_required(["config", "workdir"])

    def launch(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        logging.set_verbosity(logging.WARNING)  # orbax and tfds tell every step they take
        if distributed.value:
            jax.distributed.initialize(coordinator.value, processes.value, process.value)
        try:
            _launch(config.value, pathlib.Path(str(workdir.value)), mesh.value, profile.value)
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(launch)


def _launch(values, workdir: pathlib.Path, mesh_text: str, profile_steps: int) -> None:
    # Imported after jax.distributed.initialize, which must come before any use of devices.
    from models.sharding import make_mesh
    from train.config import TrainConfig, build
    from train.loop import train
    from train.run_folder import command_line, describe_run, open_folder

    config = build(TrainConfig, values.to_dict())
    mesh = make_mesh(mesh_text)
    open_folder(workdir)
    if jax.process_index() == 0:
        describe_run(workdir, values.to_dict(), command_line(), mesh.shape)
    result = train(config, workdir, mesh, profile_steps=profile_steps)
    if jax.process_index() == 0:
        step = int(result.state.step)
        how = "stopped by a signal and saved" if result.stopped else "finished"
        print(f"{how} at step {step} in {workdir}", file=sys.stderr)


if __name__ == "__main__":
    main()
