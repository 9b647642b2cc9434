"""What one worker of a sweep does: it takes trial after trial and trains each."""

import json
import math
import sys
import time
from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from configs.sweep import Sweep
from models.sharding import make_mesh
from train.config import TrainConfig
from train.loop import train
from train.run_folder import command_line, describe_run, open_folder, write_json
from train.sweep.plan import at_point, values_at
from train.sweep.study import Claim, SharedStudy


class SweepError(RuntimeError):
    """What would spoil every trial: the worker ends and leaves them as they are."""


def work(shared: SharedStudy, mesh: str = "") -> bool:
    """Train trials until none is left; False if a signal ended it before.

    A trial that fails by its own fault (its values do not fit the task, its loss is not finite) is
    marked as failed with the reason, and the worker goes on. Full disks and the like end it.

    Raises:
        SweepError: the task does not measure the sweep's metric.
        OSError: a folder cannot be written.
    """
    while (claim := shared.next_trial()) is not None:
        try:
            if not _run(shared, claim, mesh):
                return False
        finally:
            claim.release()
    return True


def _run(shared: SharedStudy, claim: Claim, mesh: str) -> bool:
    """One trial; False if a signal ended it, so that it stays open."""
    sweep, number = shared.sweep, claim.trial.number
    print(f"trial {number}: {json.dumps(claim.point)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        config = at_point(sweep, claim.point)
        run_folder = claim.folder / "run"
        open_folder(run_folder)
        devices = make_mesh(mesh)
        describe_run(run_folder, values_at(sweep, claim.point), command_line(), devices.shape)
        result = train(config, run_folder, devices, watch=_watch(claim, sweep, config))
    except (ValueError, FloatingPointError) as error:
        return _end(shared, claim, TrialState.FAIL, start, reason=str(error))
    if result.stopped:
        return False
    value = _metric(result.evaluation, sweep)
    if not math.isfinite(value):
        reason = f"{sweep.metric} is {value}"
        return _end(shared, claim, TrialState.FAIL, start, reason=reason)
    if result.given_up:
        return _end(shared, claim, TrialState.PRUNED, start, reason="stopped early")
    _report(claim.trial, _evaluation_number(config, int(result.state.step)), value)
    return _end(shared, claim, TrialState.COMPLETE, start, value=value)


def _watch(
    claim: Claim, sweep: Sweep, config: TrainConfig
) -> Callable[[int, dict[str, float]], bool]:
    """Reports every evaluation to the study and asks its pruner."""

    def watch(step: int, evaluation: dict[str, float]) -> bool:
        value = _metric(evaluation, sweep)
        if not math.isfinite(value):
            return True
        _report(claim.trial, _evaluation_number(config, step), value)
        return claim.trial.should_prune()

    return watch


def _report(trial: optuna.Trial, number: int, value: float) -> None:
    """An evaluation; one that was reported before its worker was killed is left as it is."""
    stored = trial.study.get_trials(deepcopy=False)[trial.number]
    if number not in stored.intermediate_values:
        trial.report(value, number)


def _evaluation_number(config: TrainConfig, step: int) -> int:
    """Which evaluation of the run it is, from 1."""
    return -(-step // (config.evaluate_every or config.steps))


def _metric(evaluation: dict[str, float], sweep: Sweep) -> float:
    if sweep.metric not in evaluation:
        raise SweepError(
            f"the task does not measure {sweep.metric!r}: let the sweep's metric be one of "
            f"{', '.join(sorted(evaluation)) or 'what its evaluate() returns'}."
        )
    return evaluation[sweep.metric]


def _end(
    shared: SharedStudy,
    claim: Claim,
    state: TrialState,
    start: float,
    value: float | None = None,
    reason: str | None = None,
) -> bool:
    trial = claim.trial
    trial.set_user_attr(
        "seconds", trial.user_attrs.get("seconds", 0.0) + time.perf_counter() - start
    )
    if reason is not None:
        trial.set_user_attr("reason", reason)
    shared.study.tell(trial, value, state=state)
    write_json(
        claim.folder / "result.json",
        {"point": claim.point, "state": state.name.lower(), "value": value, "reason": reason},
    )
    shown = reason if value is None else f"{shared.sweep.metric} {value:.5g}"
    print(f"trial {trial.number}: {state.name.lower()}, {shown}", file=sys.stderr, flush=True)
    return True
