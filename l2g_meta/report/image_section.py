"""What a page shows of the images of one data set: confusions, t-SNE, episodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import L2GError
from l2g_meta.report.confusion import Confusion, confusion, hardest
from l2g_meta.report.experiments import Experiment, Report
from l2g_meta.report.measure import EpisodePredictions, predictions_among
from l2g_meta.report.projection import projected, sample_rows
from l2g_meta.report.reported_run import ReportedRun
from l2g_meta.report.thumbnails import Sheet

DETAILED = 6  # experiments whose images are shown
TILES = 100  # queries shown of an episode
SUPPORTS = 6  # shown of a class


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
    def data(self) -> ClassDataset:
        """The data set."""
        return self.sheet.data

    @property
    def names(self) -> list[str]:
        """Of the hard classes."""
        return [self.data.class_names[c] for c in self.hard]

    def matrices(self) -> Iterator[tuple[Experiment, list[list[dict[str, Any]]]]]:
        """The confusions of each experiment, a row for each hard class; a shade is from 0 to 1."""
        places = range(len(self.hard))
        own = np.eye(len(self.hard), dtype=bool)
        for experiment, counts in zip(self.experiments, self.confusions, strict=True):
            most = [float(np.nanmax(counts.rates[part], initial=1e-9)) for part in (~own, own)]  # the darkest of each
            yield experiment, [[self._cell(counts, a, b, most[a == b]) for b in places] for a in places]

    def _cell(self, counts: Confusion, a: int, b: int, most: float) -> dict[str, Any]:
        names, offered, taken = self.names, int(counts.offered[a, b]), int(counts.taken[a, b])
        if not offered:
            return {"own": False, "shade": 0.0, "text": "–", "title": f"{names[a]} and {names[b]} never met"}
        what, where = ("recognised", "it") if a == b else (f"taken for {names[b]}", "both")
        title = f"{names[a]} {what}: {taken} of {offered} queries in episodes with {where}"
        return {"own": a == b, "shade": taken / offered / most, "text": f"{100 * taken / offered:.0f}", "title": title}

    def projections(self) -> Iterator[tuple[Experiment, ReportedRun, list[tuple[float, ...]] | None, str]]:
        """For each experiment its first tested run and a t-SNE picture, the same images in all, or what is wrong."""
        place = {c: n for n, c in enumerate(self.hard)}
        classes = [place[int(c)] for c in np.asarray(self.data.labels)[self.rows]]
        for experiment in self.experiments:
            run, measured = experiment.first_tested
            try:
                points = projected(measured.model, self.data, self.rows)
            except (L2GError, ImportError) as error:
                yield experiment, run, None, str(error)
                continue
            places = [self.sheet.place(row) for row in self.rows]
            yield experiment, run, [(*p, c, *at) for p, c, at in zip(points.tolist(), classes, places, strict=True)], ""

    @property
    def all_rows(self) -> int:
        """How many images the hard classes have."""
        return sum(len(self.data.index[c]) for c in self.hard)

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
        names = [self.data.class_names[c] for c in rows.classes]
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
