"""The launcher of sweeps: ``python -m train.sweep --sweep=configs/sweeps/x.py``.

The same command again goes on where a killed one was: nothing that is finished runs twice, and
what was begun resumes from its last checkpoint. Workers on other machines join by the same command
on the same folder (or ``--cluster=slurm`` submits them).
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags, logging


def main() -> None:
    """Define the flags, read them and sweep; bad input is one sentence and exit status 1."""
    flags.DEFINE_string("sweep", None, "A file of configs/sweeps/.", required=True)
    flags.DEFINE_string("folder", None, "Of the sweep's state and runs; runs/sweeps/<name>.")
    flags.DEFINE_integer("workers", 1, "Processes on this machine, or jobs of the cluster.")
    flags.DEFINE_string(
        "stop", "none", "Pruner: none, median, hyperband, lc_pfn, or module:attribute."
    )
    flags.DEFINE_list("stop_options", [], "For the pruner, as confidence=0.999,rule=final.")
    flags.DEFINE_string("storage", None, "Database URL for Optuna; else a file in the folder.")
    flags.DEFINE_string("cluster", None, "slurm or local: submit the workers through submitit.")
    flags.DEFINE_list("cluster_options", [], "For submitit, as timeout_min=60,slurm_partition=x.")
    flags.DEFINE_list("devices", [], "Accelerators, one worker each, as 0,1,2,3.")
    flags.DEFINE_string("mesh", "", "Mesh of every run, as in python -m train.")
    flags.DEFINE_bool("report", False, "Only show the table and redraw the picture.")
    flags.DEFINE_integer("worker", None, "Which of the workers this process is; set by itself.")

    def launch(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]}: options start with --.")
        logging.set_verbosity(logging.WARNING)
        try:
            _launch()
        except (ValueError, OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(launch)


def _launch() -> None:
    values = flags.FLAGS
    if values.worker is not None:
        _take_share(values.worker, values.workers, values.devices)
    # Imported after the share is taken: jax counts the cores and devices when it loads.
    import optuna

    from train.sweep.plan import load_sweep
    from train.sweep.report import summary, write_report
    from train.sweep.study import SharedStudy
    from train.sweep.worker import work

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if values.workers < 1:
        raise ValueError(f"--workers={values.workers}: give at least 1.")
    sweep = load_sweep(values.sweep)
    folder = pathlib.Path(values.folder or f"runs/sweeps/{pathlib.Path(values.sweep).stem}")
    options = _by_name("stop_options", values.stop_options)
    shared = SharedStudy(folder, sweep, values.stop, values.storage, options)
    finished = True
    if values.worker is not None:
        sys.exit(0 if work(shared, values.mesh) else 3)
    if not values.report:
        if values.cluster:
            _submit(folder, values.cluster, values.cluster_options, values.workers)
        elif values.workers == 1:
            finished = work(shared, values.mesh)
        else:
            finished = _run_workers(folder, values.workers)
    print(write_report(sweep, shared.trials(), folder))
    print(f"{summary(sweep, shared.trials())}\n{folder}/table.md, table.csv, plot.svg")
    if not finished:
        sys.exit("stopped by a signal and saved: the same command goes on from here.")


def _command(index: int) -> list[str]:
    return [sys.executable, "-m", "train.sweep", *sys.argv[1:], f"--worker={index}"]


def _take_share(index: int, workers: int, devices: Sequence[str]) -> None:
    """Give this worker its part of the cores, or its accelerator."""
    if devices:
        for name in ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_DEVICES"):
            os.environ[name] = devices[index % len(devices)]
    elif hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[index::workers]
        if mine:
            os.sched_setaffinity(0, mine)


def _run_workers(folder: pathlib.Path, count: int) -> bool:
    """All workers, each with a log of its own; False if a signal ended them.

    Raises:
        RuntimeError: one ended with an error.
    """
    logs = folder / "workers"
    logs.mkdir(exist_ok=True)
    processes = []
    for index in range(count):
        with open(logs / f"{index}.log", "a", encoding="utf-8") as log:
            processes.append(subprocess.Popen(_command(index), stdout=log, stderr=log))
    print(f"{count} workers write to {logs}", file=sys.stderr, flush=True)

    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    shown = 0
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.5)
            shown = _show_finished(folder, shown)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in processes]
    if bad := [i for i, code in enumerate(codes) if code not in (0, 3)]:
        last = (logs / f"{bad[0]}.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RuntimeError(
            f"worker {bad[0]} ended with status {codes[bad[0]]} ({' '.join(last)}): see "
            f"{logs}/{bad[0]}.log; the same command goes on from here."
        )
    return 3 not in codes


def _show_finished(folder: pathlib.Path, shown: int) -> int:
    """Print how many trials have ended, when that has changed."""
    count = len(list((folder / "trials").glob("*/result.json")))
    if count != shown:
        print(f"{count} trials have ended", file=sys.stderr, flush=True)
    return count


def _by_name(flag: str, options: Sequence[str]) -> dict[str, int | float | str]:
    """``NAME=VALUE`` pairs of a flag; numbers as numbers.

    Raises:
        ValueError: an option without ``=``.
    """
    found: dict[str, int | float | str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--{flag}: {option!r} is not NAME=VALUE.")
        for kind in (int, float, str):
            with contextlib.suppress(ValueError):
                found[name] = kind(value)
                break
    return found


def _submit(folder: pathlib.Path, cluster: str, options: Sequence[str], workers: int) -> None:
    """Submit the workers as jobs and wait for them.

    Raises:
        ValueError: an option without ``=``, or submitit is not installed.
        RuntimeError: a job failed.
    """
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--cluster needs submitit: pip install -e '.[slurm]'.") from error
    executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
    executor.update_parameters(**_by_name("cluster_options", options))
    # A job has its share of a machine from the cluster, so each is the only worker it knows of.
    command = [*_command(0), "--workers=1"]
    with executor.batch():
        jobs = [executor.submit(submitit.helpers.CommandFunction(command)) for _ in range(workers)]
    print(f"submitted {', '.join(job.job_id for job in jobs)}", file=sys.stderr, flush=True)
    for job in jobs:
        if (error := job.exception()) is not None:
            lines = str(error).strip().splitlines()
            raise RuntimeError(f"job {job.job_id} failed: {lines[-1] if lines else error}")


if __name__ == "__main__":
    main()
