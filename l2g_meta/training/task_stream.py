"""Which tasks of the stream of pairs an update takes: the same stream for all methods."""

from __future__ import annotations

from collections.abc import Sequence

from l2g_meta.data.batches import Batches
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.task import Task
from l2g_meta.training.checks import SUPERVISED
from l2g_meta.training.config import Config

Place = tuple[int, int]  # of a task: the position of its pair in the stream, and 0 for T_i or 1 for T_j


def positions_of_update(config: Config, k: int) -> range:
    """The pairs of the stream that update k takes tasks from; for supervised training its batches."""
    n = config.tasks_per_update
    if n is None or config.method == SUPERVISED:
        return range(k * config.episodes_per_update, (k + 1) * config.episodes_per_update)
    return range(k * n // 2, (k * n + n + 1) // 2)


def calls_of_update(config: Config, k: int) -> list[tuple[Place, ...]]:
    """Where the tasks of each call of the objective in update k are in the stream.

    L2G takes B pairs; ``maml`` the T_i of the same B pairs; the others both tasks of the same B pairs. With
    ``tasks_per_update`` N, all but L2G take N consecutive tasks of T_i, T_j, T_i, T_j, ….

    Example:
        >>> calls_of_update(Config(method="episodic", tasks_per_update=3).resolved(), 1)
        [((1, 1),), ((2, 0),), ((2, 1),)]
    """
    positions, n = positions_of_update(config, k), config.tasks_per_update
    if config.method == SUPERVISED:
        return [((p, 0),) for p in positions]
    if config.method == "l2g" and n is None:
        return [((p, 0), (p, 1)) for p in positions]
    members = (0,) if config.method == "maml" and n is None else (0, 1)
    places = [(p, member) for p in positions for member in members]
    if n is not None:
        places = places[k * n % 2 :][:n]  # the update before took the first, if it began the pair
    return [(place,) for place in places]


def tasks_of_calls(pairs: TaskPairs | Batches, calls: Sequence[tuple[Place, ...]]) -> list[tuple[Task, ...]]:
    """The tasks of some calls of the objective; their images in one gather."""
    positions = sorted({position for call in calls for position, _ in call})
    found: dict[int, tuple[Task, ...]] = dict(zip(positions, pairs.batch(positions), strict=True)) if positions else {}
    return [tuple(found[position][member] for position, member in call) for call in calls]
