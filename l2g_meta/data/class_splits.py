"""How the classes of T_i and T_j relate: none in common (L2G), or none of one super-category either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from l2g_meta.errors import DataError

CUTS = 1000  # of the super-categories into two sides, until both are large enough


class Relation(Protocol):
    """Draws the classes of tasks that belong together."""

    def draw(self, rng: np.random.Generator, n_classes: int, ways: Sequence[int]) -> list[np.ndarray]:
        """Classes of each task, (ways,) each, none twice in a task."""
        ...

    def needed(self, ways: Sequence[int]) -> int:
        """Classes that it takes at least."""
        ...


@dataclass(frozen=True)
class Disjoint:
    """Tasks without a common class: drawn as one set of distinct classes, then split.

    Example:
        >>> first, second = Disjoint().draw(np.random.default_rng(0), 10, [5, 5])
        >>> len({*first.tolist(), *second.tolist()})
        10
    """

    def draw(self, rng: np.random.Generator, n_classes: int, ways: Sequence[int]) -> list[np.ndarray]:
        """Classes of each task."""
        return np.split(rng.choice(n_classes, sum(ways), replace=False), np.cumsum(ways)[:-1])

    def needed(self, ways: Sequence[int]) -> int:
        """Those of all tasks."""
        return sum(ways)


@dataclass(frozen=True)
class Far:
    """Two tasks without a common super-category: these are cut into two sides at random, one for each task.

    Args:
        categories: super-category of each class.

    Example:
        >>> first, second = Far(["bird", "bird", "fish", "fish"]).draw(np.random.default_rng(0), 4, [2, 2])
        >>> sorted([sorted(first.tolist()), sorted(second.tolist())])
        [[0, 1], [2, 3]]
    """

    categories: Sequence[str]

    def draw(self, rng: np.random.Generator, n_classes: int, ways: Sequence[int]) -> list[np.ndarray]:
        """Classes of both tasks.

        Raises:
            DataError: if no cut leaves enough classes on both sides.
        """
        names, category = np.unique(np.asarray(self.categories), return_inverse=True)
        if len(category) != n_classes:
            raise DataError(f"need a super-category of each of {n_classes} classes, got {len(category)}")
        for _ in range(CUTS):
            left = rng.permutation(len(names)) < len(names) / 2
            sides = [np.flatnonzero(left[category]), np.flatnonzero(~left[category])]
            if all(len(side) >= n for side, n in zip(sides, ways, strict=True)):
                return [rng.choice(side, n, replace=False) for side, n in zip(sides, ways, strict=True)]
        raise DataError(
            f"need super-categories for tasks of {' and '.join(map(str, ways))} ways without a common one, got "
            f"{len(names)} with {n_classes} classes; lower --ways, or draw other pairs"
        )

    def needed(self, ways: Sequence[int]) -> int:
        """Those of both tasks, at the least."""
        return sum(ways)
