"""Runs as experiments, tested on the same episodes where they can be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from l2g_meta.errors import L2GError
from l2g_meta.evaluation.episodes import Evaluation, over_models, paired_difference
from l2g_meta.models.functional import confidence_interval
from l2g_meta.report.measure import Measured, ReportOptions, measure
from l2g_meta.report.reported_run import ReportedRun, read_run
from l2g_meta.training.build import build_data
from l2g_meta.training.config import Config


@dataclass(eq=False)
class Experiment:
    """Runs that differ in their seed alone, or one run; ``number`` gives its letter and its colour."""

    number: int
    runs: list[ReportedRun]

    @property
    def letter(self) -> str:
        """Of its number: A, B and so on."""
        return letters(self.number)

    @property
    def config(self) -> Config | None:
        """Of its first run."""
        return self.runs[0].config

    @property
    def title(self) -> str:
        """Method and head, in words."""
        return self.runs[0].name if self.config is None else f"{self.config.method} {self.config.head}"

    @property
    def measured(self) -> list[Measured]:
        """Of the runs that could be tested."""
        return [run.measured for run in self.runs if run.measured is not None]

    @property
    def first_tested(self) -> tuple[ReportedRun, Measured]:
        """The run whose images are shown, and its results."""
        return next((run, run.measured) for run in self.runs if run.measured is not None)

    @property
    def evaluation(self) -> Evaluation | None:
        """Of one run, or over the trained seeds."""
        found = [m.evaluation for m in self.measured]
        return over_models(found) if len(found) > 1 else next(iter(found), None)


@dataclass(frozen=True)
class Report:
    """All that a page shows."""

    options: ReportOptions
    experiments: list[Experiment]

    @property
    def runs(self) -> list[ReportedRun]:
        """Of all experiments."""
        return [run for experiment in self.experiments for run in experiment.runs]

    def by_data(self) -> list[list[Experiment]]:
        """Experiments that were tested, those on the same images together."""
        groups: dict[Any, list[Experiment]] = {}
        for experiment in self.experiments:
            if experiment.measured:
                groups.setdefault(signature(experiment.measured[0]), []).append(experiment)
        return list(groups.values())


def evaluate_runs(paths: Sequence[Path], options: ReportOptions, *, tell: Callable[[str], object] = print) -> Report:
    """Reads the runs and tests each on the same episodes; what fails is kept as a problem of its run.

    Raises:
        L2GError: if a path is no run directory, or given twice.
    """
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise L2GError(f"need different runs, got {path} more than once; leave one out")
    runs, load = [read_run(path) for path in paths], functools.cache(build_data)
    for run in runs:
        if run.config is None or not run.best:
            continue
        try:
            run.measured = measure(run.path, options, load)
            tell(f"{run.path}: {run.measured.evaluation}")
        except (L2GError, ImportError) as error:
            run.problems.append(f"not tested: {error}")
    return Report(options, experiments(runs))


def experiments(runs: Sequence[ReportedRun]) -> list[Experiment]:
    """Runs that differ in their seed alone, together; in the order of the first of each."""
    groups: list[list[ReportedRun]] = []
    for run in runs:
        for group in groups:
            if _are_seeds(group[0], run) and run.seed not in [other.seed for other in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    found = [Experiment(*numbered) for numbered in enumerate(groups)]
    for experiment in found:
        for n, run in enumerate(experiment.runs, 1):
            run.label = experiment.letter + (str(n) if len(experiment.runs) > 1 else "")
    return found


def _are_seeds(a: ReportedRun, b: ReportedRun) -> bool:
    first, second = a.config, b.config
    if first is None or second is None:
        return False
    same = not first.differences(replace(second, seed=first.seed))
    # The same name of a data set in two folders may be two data sets.
    return same and (a.measured is None or b.measured is None or signature(a.measured) == signature(b.measured))


def signature(measured: Measured) -> tuple[Any, ...]:
    """What must be equal for two runs to have seen the same images."""
    data = measured.data
    return data.name, data.split, data.image_shape, data.class_names, tuple(len(rows) for rows in data.index)


def differences(report: Report) -> Iterator[dict[str, Any]]:
    """Later experiments minus earlier ones in points, where both saw the same episodes of the same images.

    Each is of the experiments ``a`` − ``b``: the ``mean`` over episodes and the seeds of each, the half width of its
    95% interval over ``episodes``, and that over the ``seeds``, if they have the same and several.
    """
    for group in report.by_data():
        for b, a in combinations(group, 2):
            with suppress(L2GError):  # other ways or shots
                mean, half = paired_difference(a.evaluation, b.evaluation)  # type: ignore[arg-type]
                yield {"a": a, "b": b, "mean": mean, "episodes": half, "seeds": _over_seeds(a, b)}


def _over_seeds(a: Experiment, b: Experiment) -> float | None:
    means = [{r.seed: r.measured.evaluation.accuracy_mean for r in e.runs if r.measured} for e in (a, b)]
    if means[0].keys() != means[1].keys() or len(means[0]) < 2:
        return None
    return confidence_interval([means[0][seed] - means[1][seed] for seed in means[0]])


def letters(i: int) -> str:
    """A, B, …, Z, AA, AB, ….

    Example:
        >>> letters(0), letters(25), letters(26)
        ('A', 'Z', 'AA')
    """
    return (letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)
