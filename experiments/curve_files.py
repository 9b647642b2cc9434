"""Recorded learning curves, as sets of runs that compete with one another.

The folder of a sweep (``python -m train.sweep``) is one set: what its trials reported. In ``.npz``
files the known layouts are, by the names of the arrays (curves are rows, NaN after their end):

- ``<task>/valid_loss``: losses (runs, evaluations), a set per task, as TaskSet was repacked;
- ``valid``, ``openmlid`` and ``learner``: accuracies (curves, anchors) of LCDB, a set per data set
  with its learners as runs;
- ``losses`` or ``accuracies``: (runs, evaluations), one set.
"""

import dataclasses
import math
import pathlib

import numpy as np
import optuna
from jaxtyping import Float
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from research.approximation.lc_pfn.normalizer import Normalizer


@dataclasses.dataclass(frozen=True)
class CurveSet:
    """Runs of one task.

    Attributes:
        name: of file and task.
        values: (runs, evaluations) losses or accuracies; NaN from the end of a run on.
        normalizer: of losses; None for accuracies.
    """

    name: str
    values: Float[np.ndarray, "runs t"]
    normalizer: Normalizer | None

    @property
    def curves(self) -> Float[np.ndarray, "runs t"]:
        """The values in [0, 1], larger is better."""
        return self.values if self.normalizer is None else self.normalizer(self.values)


def load_curves(path: str | pathlib.Path) -> list[CurveSet]:
    """All sets of a file, or the one of a sweep's folder.

    Accuracies are taken as they are. Losses are normalised with bounds of 0 and infinity, soft
    bounds of 0 and the median first value of the task's runs, which is about the loss of a network
    that knows nothing.

    Raises:
        FileNotFoundError: no such file, or a folder without a sweep.
        ValueError: no array of a known layout, arrays of another shape, values that are no losses
            or accuracies, or a sweep whose runs were stopped early.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return [_sweep(path)]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: name an .npz of learning curves.")
    with np.load(path, allow_pickle=False) as arrays:
        names = list(arrays)
        found = [name for name in names if name.endswith("/valid_loss")]
        if found:
            sets = {name.removesuffix("/valid_loss"): arrays[name] for name in found}
            return [_losses(f"{path.stem}/{task}", curves) for task, curves in sets.items()]
        if {"valid", "openmlid"} <= set(names):
            return _lcdb(path.stem, arrays["valid"], arrays["openmlid"])
        if "losses" in names:
            return [_losses(path.stem, arrays["losses"])]
        if "accuracies" in names:
            return [_accuracies(path.stem, arrays["accuracies"])]
    raise ValueError(
        f"{path} holds {', '.join(names[:5])}: name an array losses, accuracies or "
        "<task>/valid_loss, (runs, evaluations)."
    )


def _sweep(folder: pathlib.Path) -> CurveSet:
    if not (folder / "study.log").is_file():
        raise FileNotFoundError(f"{folder} has no study.log: name the folder of a sweep.")
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    ended = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.FAIL)]
    if any(t.state == TrialState.PRUNED for t in study.trials) or not ended:
        raise ValueError(
            f"{folder} has runs that were stopped early, or none: sweep with --stop=none."
        )
    reports = [
        [t.intermediate_values[step] for step in sorted(t.intermediate_values)] for t in ended
    ]
    values = np.full((len(ended), max(map(len, reports))), np.nan)
    for row, report in zip(values, reports, strict=True):
        row[: len(report)] = report
    minimize = study.direction == optuna.study.StudyDirection.MINIMIZE
    return (_losses if minimize else _accuracies)(folder.name, values)


def _checked(name: str, curves: np.ndarray) -> Float[np.ndarray, "runs t"]:
    """Float64 curves that end at their first value that is not finite, at least one without."""
    if curves.ndim != 2 or curves.shape[1] < 2:
        raise ValueError(f"{name} has shape {curves.shape}: give (runs, evaluations).")
    curves = curves.astype(np.float64)
    curves = np.where(np.cumsum(~np.isfinite(curves), 1) > 0, np.nan, curves)
    curves = curves[~np.isnan(curves[:, 0])]
    if not len(curves):
        raise ValueError(f"{name} has no run with a finite first value.")
    return curves


def _losses(name: str, curves: np.ndarray) -> CurveSet:
    curves = _checked(name, curves)
    if np.nanmin(curves) < 0:
        raise ValueError(f"{name} has losses below 0: shift them, or give accuracies.")
    soft = float(np.median(curves[:, 0]))
    normalizer = Normalizer(0.0, math.inf, 0.0, soft, minimize=True)
    return CurveSet(name, curves, normalizer)


def _accuracies(name: str, curves: np.ndarray) -> CurveSet:
    curves = _checked(name, curves)
    if np.nanmin(curves) < 0 or np.nanmax(curves) > 1:
        raise ValueError(f"{name} has accuracies outside [0, 1]: divide percentages by 100.")
    return CurveSet(name, curves, None)


def _lcdb(name: str, valid: np.ndarray, dataset: np.ndarray) -> list[CurveSet]:
    sets = []
    for number in np.unique(dataset):
        curves = valid[dataset == number]
        length = int((~np.isnan(curves)).sum(1).max())  # anchors depend on the data set's size
        if len(curves) > 1 and length > 1:
            sets.append(_accuracies(f"{name}/{number}", curves[:, :length]))
    return sets
