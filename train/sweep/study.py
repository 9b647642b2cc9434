"""A sweep's state: an Optuna study in a file or a database that all its workers share.

Every point is a trial of the study, whether it was listed or is chosen by a sampler. A trial
belongs to the worker that holds the lock of its folder. The system drops the locks of a process
that dies, so what a killed worker had begun is found, and goes on from its last checkpoint.
"""

import dataclasses
import datetime
import fcntl
import json
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import IO, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from configs.sweep import Point, Search, Sweep
from train.config import first_difference
from train.resolve import resolve
from train.sweep.plan import SAMPLERS, at_point, distributions, example_points, horizon

PRUNERS = {
    "none": "optuna.pruners:NopPruner",
    "median": "optuna.pruners:MedianPruner",
    "hyperband": "optuna.pruners:HyperbandPruner",
    "lc_pfn": "research.approximation.lc_pfn.pruner:LCPFNPruner",
}
ABANDONED = datetime.timedelta(minutes=1)  # far more than between a trial's birth and its lock


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this process owns until it releases the lock."""

    trial: Trial
    point: Point
    folder: pathlib.Path
    lock: IO[str]

    def release(self) -> None:
        """Let others see that nobody works on the trial."""
        self.lock.close()


class SharedStudy:
    """The study of one sweep in one folder.

    Args:
        folder: of the sweep; workers on several machines need it on a file system that they share.
        sweep: what is swept.
        stop: a key of ``PRUNERS``, or ``module:attribute`` of a pruner that takes no arguments.
        storage: a database URL for Optuna; None: a journal file in the folder.
        options: of the pruner, by the names of its arguments.

    Raises:
        ValueError: the folder is of another sweep, or the pruner or an option does not fit.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        sweep: Sweep,
        stop: str,
        storage: str | None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.folder, self.sweep = folder, sweep
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.study = optuna.create_study(
                study_name=folder.resolve().name,
                storage=storage or JournalStorage(JournalFileBackend(str(folder / "study.log"))),
                pruner=_pruner(stop, sweep, options),
                direction="minimize" if sweep.minimize else "maximize",
                load_if_exists=True,
            )
            self._check_same()
            self.id = self._folder_id()
            self._add_points()

    def next_trial(self) -> Claim | None:
        """A trial that nobody works on: one that was cut off first, then a new one; None: done."""
        with self._alone():
            for trial in self._trials(TrialState.RUNNING):
                claim = self._adopt(trial)
                if claim is not None:
                    return claim
            points = self.sweep.points
            if isinstance(points, Search):
                if (drawn := len(self._trials())) >= points.trials:
                    return None
                # By the number of points drawn: a sampler of another worker, or one that begins
                # again, must not draw what has been drawn.
                self.study.sampler = SAMPLERS[points.sampler](seed=points.seed + 1_000_003 * drawn)
                trial = self.study.ask(distributions(points.space))
                trial.set_user_attr("point", trial.params)
            elif not self._trials(TrialState.WAITING):
                return None
            else:
                trial = self.study.ask()
            trial.set_user_attr("folder", self.id)
            claim = self._lock(trial)
            assert claim is not None, "a new trial's lock was taken"
            return claim

    def trials(self) -> list[FrozenTrial]:
        """All trials, in the order of their numbers."""
        return self._trials()

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _adopt(self, trial: FrozenTrial) -> Claim | None:
        """A running trial of this folder that no process holds."""
        owner = trial.user_attrs.get("folder")
        born = trial.datetime_start
        if owner is None:  # its worker died before it could sign
            old = born is not None and datetime.datetime.now() - born > ABANDONED
            if not old:
                return None
        elif owner != self.id:
            return None
        revived = Trial(self.study, trial._trial_id)
        if owner is None:
            revived.set_user_attr("folder", self.id)
            if "point" not in trial.user_attrs:
                revived.set_user_attr("point", trial.params)
        return self._lock(revived)

    def _lock(self, trial: Trial) -> Claim | None:
        folder = self.folder / "trials" / f"{trial.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return Claim(trial, trial.user_attrs["point"], folder, lock)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.folder / "claim.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check_same(self) -> None:
        described = {
            "config": self.sweep.config.to_dict(),
            "metric": self.sweep.metric,
            "minimize": self.sweep.minimize,
        }
        before = self.study.user_attrs.get("sweep")
        if before is None:
            self.study.set_user_attr("sweep", described)
            return
        difference = first_difference(before, described, str(self.folder), may_change=())
        if difference is not None:
            raise ValueError(f"another sweep was begun there: {difference}. Choose a new --folder.")

    def _folder_id(self) -> str:
        path = self.folder / "id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        return path.read_text()

    def _add_points(self) -> None:
        if isinstance(self.sweep.points, Search):
            return
        known = [trial.user_attrs["point"] for trial in self._trials()]
        for point in self.sweep.points:
            point = json.loads(json.dumps(point))  # as the study gives it back
            if point not in known:
                self.study.enqueue_trial({}, user_attrs={"point": point})
                known.append(point)


def _pruner(stop: str, sweep: Sweep, options: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    """The pruner of that name; the horizon is the number of evaluations of a whole run.

    Raises:
        ValueError: an unknown name or option, or a config that never evaluates before its end.
    """
    if stop not in PRUNERS and ":" not in stop:
        raise ValueError(
            f"unknown --stop={stop}: choose {', '.join(PRUNERS)}, or module:attribute of a pruner."
        )
    kind = resolve(PRUNERS.get(stop, stop))
    if stop == "none" and not options:
        return kind()
    horizons = {horizon(at_point(sweep, point)) for point in example_points(sweep)}
    if min(horizons) < 2:
        raise ValueError(
            f"--stop={stop} decides between evaluations and the config has none before its end: "
            "set config.evaluate_every to a part of config.steps."
        )
    if getattr(kind, "needs_horizon", False):
        if len(horizons) > 1:
            raise ValueError(
                f"--stop={stop} needs runs of equal length and the points evaluate "
                f"{sorted(horizons)} times: let steps / evaluate_every be the same."
            )
        options = {"horizon": horizons.pop(), "minimize": sweep.minimize, **options}
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"--stop={stop} does not take --stop_options: {error}.") from error
