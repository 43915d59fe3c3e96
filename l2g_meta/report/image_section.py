"""What a page shows of the images of one data set: confusions, t-SNE, episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from l2g_meta.errors import L2GError
from l2g_meta.report.experiments import Experiment, Report
from l2g_meta.report.measure import EpisodePredictions, predictions_among
from l2g_meta.report.projection import projected, sample_rows
from l2g_meta.report.reported_run import ReportedRun
from l2g_meta.report.thumbnails import Sheet

DETAILED = 6  # experiments whose images are shown
TILES = 100  # queries shown of an episode
SUPPORTS = 6  # shown of a class


class Confusion(NamedTuple):
    """Counts over episodes.

    Args:
        taken: queries of class a that were taken for class b, (n_classes, n_classes).
        offered: queries of class a in episodes that had class b, (n_classes, n_classes).
    """

    taken: np.ndarray
    offered: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Share of the queries of a, in episodes that had b, which were taken for b; NaN where they never met."""
        with np.errstate(invalid="ignore"):
            return self.taken / self.offered


def confusion(predictions: Sequence[EpisodePredictions], n_classes: int) -> Confusion:
    """Counts over episodes.

    An episode can confuse only the classes that it has. So a count alone says how often two classes met as much as how
    alike they are; ``rates`` divides by it.

    Example:
        >>> from l2g_meta.data.sources import TaskRows
        >>> y = np.array([0, 0, 1])
        >>> rows = TaskRows(np.array([4, 8]), np.array([0, 1]), np.array([5, 6, 9]), y, np.array([2, 0]))
        >>> found = confusion([EpisodePredictions(rows, np.array([0, 1, 1]))], 3)
        >>> found.taken.tolist(), found.offered.tolist()
        ([[1, 0, 0], [0, 0, 0], [1, 0, 1]], [[1, 0, 1], [0, 0, 0], [2, 0, 2]])
    """
    taken, offered = (np.zeros((n_classes, n_classes), dtype=np.int64) for _ in range(2))
    for episode in predictions:
        classes, y = episode.rows.classes, episode.rows.query_y
        np.add.at(taken, (classes[y], classes[episode.predicted]), 1)
        queries = np.bincount(y, minlength=len(classes))
        offered[np.ix_(classes, classes)] += queries[:, None]
    return Confusion(taken, offered)


def hardest(confusions: Sequence[Confusion], n: int) -> list[int]:
    """The n classes that are recognised least often, the mean over models; the hardest first.

    Example:
        >>> a = Confusion(np.diag([5, 1, 3]), np.full((3, 3), 10))
        >>> hardest([a, a], 2)
        [1, 2]
    """
    recall = np.mean([np.diag(c.rates) for c in confusions], axis=0)
    order = np.argsort(recall, kind="stable")  # NaN, never drawn, comes last
    return order[np.isfinite(recall[order])][:n].tolist()


@dataclass(frozen=True, eq=False)
class ImageSection:
    """Experiments on one data set, their hard classes, and the sheet of its thumbnails.

    Args:
        number: of the sheet, in the style's class names.
        experiments: that were tested on it.
        sheet: collects the thumbnails.
        hard: classes, the hardest first.
        rows: of their images that are projected.
        confusions: of each experiment, over its trained seeds, in episodes of the hard classes alone.
    """

    number: int
    experiments: list[Experiment]
    sheet: Sheet
    hard: list[int]
    rows: np.ndarray
    confusions: list[Confusion]

    @property
    def names(self) -> list[str]:
        """Of the hard classes."""
        return [self.sheet.data.class_names[c] for c in self.hard]

    def matrices(self) -> Iterator[tuple[Experiment, Confusion, dict[bool, float]]]:
        """The confusions of each experiment, and the largest rate, on the diagonal or not."""
        own = np.eye(len(self.hard), dtype=bool)
        for experiment, counts in zip(self.experiments, self.confusions, strict=True):
            rates = {True: counts.rates[own], False: counts.rates[~own]}
            yield experiment, counts, {on: float(np.nanmax(some, initial=1e-9)) for on, some in rates.items()}

    def projections(self) -> Iterator[tuple[Experiment, ReportedRun, list[tuple[float, ...]] | None, str]]:
        """For each experiment its first tested run and a t-SNE picture, the same images in all, or what is wrong."""
        classes = [self.hard.index(int(c)) for c in np.asarray(self.sheet.data.labels)[self.rows]]
        for experiment in self.experiments:
            run, measured = experiment.first_tested
            try:
                points = projected(measured.model, self.sheet.data, self.rows)
            except (L2GError, ImportError) as error:
                yield experiment, run, None, str(error)
                continue
            places = [self.sheet.place(row) for row in self.rows]
            yield experiment, run, [(*p, c, *at) for p, c, at in zip(points.tolist(), classes, places, strict=True)], ""

    def episodes(self, each: int) -> Iterator[tuple[Experiment, dict[str, Any]]]:
        """The worst and the best episodes of each experiment's first tested run."""
        for experiment in self.experiments:
            run, measured = experiment.first_tested
            ranked = measured.ranked()
            chosen = [("worst", k) for k in ranked[:each]] + [("best", k) for k in ranked[::-1][:each]]
            if len(ranked) < 2 * each:
                chosen = [("episode", k) for k in ranked]
            for kind, k in chosen:
                shown = self._episode(measured.predictions[k])
                yield experiment, {"kind": kind, "k": k, "run": run} | shown

    def _episode(self, episode: EpisodePredictions) -> dict[str, Any]:
        """Its classes, each with its images, and what the queries were taken for."""
        rows, predicted, correct = episode.rows, episode.predicted, episode.correct
        names = [self.sheet.data.class_names[c] for c in rows.classes]
        most, left_out, classes = max(3, TILES // len(names)), 0, []
        for n, name in enumerate(names):
            supports = rows.support[rows.support_y == n]
            queries = np.flatnonzero(rows.query_y == n)
            queries = queries[np.argsort(correct[queries], kind="stable")]  # wrong ones first
            left_out += max(0, len(supports) - SUPPORTS) + max(0, len(queries) - most)
            right = f"{int(correct[queries].sum())} of {len(queries)} right"
            counts = np.bincount(predicted[queries], minlength=len(names))
            if taken := ", ".join(f"{m} for {b + 1}" for b, m in enumerate(counts) if m and b != n):
                right += f"; taken: {taken}"
            shown = [(rows.query[q], predicted[q], names[predicted[q]]) for q in queries[:most]]
            classes.append({
                "name": name, "right": right, "supports": supports[:SUPPORTS], "n_supports": len(supports),
                "queries": shown,
            })  # fmt: skip
        return {"classes": classes, "right": correct.sum(), "queries": len(rows.query), "left_out": left_out}


def image_sections(report: Report) -> list[ImageSection]:
    """One for each data set that something was tested on; at most ``DETAILED`` experiments in all."""
    found: list[ImageSection] = []
    left, options = DETAILED, report.options
    for number, group in enumerate(report.by_data()):
        experiments = group[:left]
        left -= len(experiments)
        if not experiments:
            break
        tested = [experiment.measured for experiment in experiments]
        data = tested[0][0].data
        counts = [confusion([p for m in seeds for p in m.predictions], data.n_classes) for seeds in tested]
        hard = hardest(counts, options.classes)
        alone = data.of_classes(hard)  # once, a copy of their images
        among_hard = [
            confusion([p for m in seeds for p in predictions_among(m, alone, options)], alone.n_classes)
            for seeds in tested
        ]
        found.append(ImageSection(number, experiments, Sheet(data), hard, sample_rows(data, hard), among_hard))
    return found
