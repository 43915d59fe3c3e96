"""A run of a report: what its directory says, whatever is missing or damaged in it, and what was measured of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.tensors import read_info, refuse_given
from l2g_meta.report.measure import Measured
from l2g_meta.training.config import Config
from l2g_meta.training.log import read_log

NUMBERS = ("iteration", "loss", "val_accuracy", "val_ci95")


@dataclass(eq=False)
class ReportedRun:
    """A run as its files have it.

    Args:
        path: as it was given.
        config: ``None`` if it cannot be read.
        log: a row per update, (n, 4): update, loss, validation accuracy and half width in per cent; NaN where empty.
        best: header of the best checkpoint; empty if there is none.
        problems: what could not be read or tested.
        measured: its results; ``None`` if it could not be tested.
        label: its experiment's letter, with a number if there are several seeds.
    """

    path: Path
    config: Config | None
    log: np.ndarray
    best: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    measured: Measured | None = None
    label: str = ""

    @property
    def seed(self) -> int | None:
        """Of training."""
        return None if self.config is None else self.config.seed

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.resolve().name

    @property
    def updates(self) -> int:
        """Updates in the log."""
        return int(self.log[:, 0].max()) if len(self.log) else 0

    @property
    def validation(self) -> np.ndarray:
        """Rows of the log that have a validation, (n, 4)."""
        return self.log[np.isfinite(self.log[:, 2])]


def read_run(path: Path) -> ReportedRun:
    """All that can be read of a run directory.

    Raises:
        L2GError: if it is none.
    """
    if not any((path / name).is_file() for name in ("config.json", "log.csv", "best.safetensors")):
        found = "a folder without config.json and log.csv" if path.is_dir() else "no folder of that name"
        raise L2GError(f"need a run directory, {path}: {found}; name a folder made by `l2g train`")
    problems: list[str] = []

    def attempt(without: str, read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except L2GError as error:
            problems.append(f"{without}: {error}")
            return otherwise

    config = attempt("no config", lambda: Config.load(path / "config.json"), None)
    lost = np.empty((0, len(NUMBERS)))
    log = attempt("no learning curve", lambda: read_numbers(path), lost)
    best: dict[str, Any] = attempt("not tested", lambda: _header(path), {})
    if log is not lost:
        problems += _gaps(log, best)
    return ReportedRun(path, config, log, best, problems)


def _header(run: Path) -> dict[str, Any]:
    """Of the best checkpoint of a run whose data and model are its config's."""
    best = read_info(run / "best.safetensors")
    if not isinstance(best, dict):
        raise CheckpointError(f"need a header in {run / 'best.safetensors'}, got another kind; train again")
    refuse_given(best, run, "test it with l2g_meta.evaluation.episodes.evaluate")
    return best


def _gaps(log: np.ndarray, best: Mapping[str, Any]) -> list[str]:
    """What a log lacks, in words: of ``read_numbers``, beside the best checkpoint's header."""
    found = []
    last, needed = (int(log[:, 0].max()) if len(log) else 0), best.get("best_iteration")
    if isinstance(needed, int) and last < needed:
        found.append(f"learning curve cut off: log.csv ends at update {last}, the best checkpoint is of {needed}")
    if missing := last - len(set(log[:, 0])):
        found.append(f"learning curve has gaps: {missing} of {last} updates are not in log.csv")
    return found


def read_numbers(run: Path) -> np.ndarray:
    """A run's log as numbers, (n, 4), ascending; a cell that is empty or infinite is NaN.

    Raises:
        L2GError: if there is no log, or it is not one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the page says what the log lacks
        rows = [[float(row[name] or "nan") for name in NUMBERS] for row in read_log(run)]
    log = np.array(rows, dtype=float).reshape(-1, len(NUMBERS))
    log = np.where(np.isfinite(log), log, np.nan)[(log[:, 0] >= 1) & (log[:, 0] < 1e15)]
    return log[np.argsort(log[:, 0], kind="stable")]
