"""Which classes are taken for which, over many episodes that each offer a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l2g_meta.report.measure import EpisodePredictions


@dataclass(frozen=True)
class Confusion:
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
        >>> found = confusion([EpisodePredictions(rows, np.array([0, 1, 1]), np.ones(3))], 3)
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
