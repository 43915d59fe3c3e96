"""Which tasks of the stream of pairs an update takes: the same stream for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from l2g_meta.data.batches import Batches
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.task import Task
from l2g_meta.training.checks import SUPERVISED
from l2g_meta.training.config import Config

T = TypeVar("T")


def tasks_of_update(config: Config, pairs: TaskPairs | Batches, k: int) -> list[tuple[Task, ...]]:
    """The tasks of update k, one tuple for each call of the objective, from one stream for all methods.

    L2G takes B pairs; ``maml`` the T_i of the same B pairs; the others both tasks of the same B pairs. With
    ``tasks_per_update`` N, all but L2G take N consecutive tasks of T_i, T_j, T_i, T_j, ….
    """
    return tasks_of_calls(pairs, calls_of_update(config, k))


Place = tuple[int, int]  # of a task: the position of its pair in the stream, and 0 for T_i or 1 for T_j


def calls_of_update(config: Config, k: int) -> list[tuple[Place, ...]]:
    """Where the tasks of each call of the objective in update k are in the stream.

    Example:
        >>> calls_of_update(Config(method="episodic", tasks_per_update=3).resolved(), 1)
        [((1, 1),), ((2, 0),), ((2, 1),)]
    """
    if config.method == SUPERVISED:
        return [((position, 0),) for position in positions_of_update(config, k)]
    skip = k * (config.tasks_per_update or 0) % 2  # of a pair that the update before began
    return arrange(config, [((p, 0), (p, 1)) for p in positions_of_update(config, k)], skip)


def tasks_of_calls(pairs: TaskPairs | Batches, calls: Sequence[tuple[Place, ...]]) -> list[tuple[Task, ...]]:
    """The tasks of some calls of the objective; their images in one gather."""
    positions = sorted({position for call in calls for position, _ in call})
    found: dict[int, tuple[Task, ...]] = dict(zip(positions, pairs.batch(positions), strict=True)) if positions else {}
    return [tuple(found[position][member] for position, member in call) for call in calls]


def positions_of_update(config: Config, k: int) -> range:
    """The pairs of the stream that update k takes tasks from; for supervised training its batches."""
    n = config.tasks_per_update
    if n is None or config.method == SUPERVISED:
        return range(k * config.episodes_per_update, (k + 1) * config.episodes_per_update)
    return range(k * n // 2, (k * n + n + 1) // 2)


def arrange(config: Config, batch: Sequence[tuple[T, T]], skip: int = 0) -> list[tuple[T, ...]]:
    """What each call of the objective takes of an update's pairs; ``skip`` tasks belong to the update before."""
    n = config.tasks_per_update
    if n is None and config.method == "l2g":
        return list(batch)
    tasks = [task for pair in batch for task in pair]
    if n is not None:
        tasks = tasks[skip : skip + n]
    elif config.method == "maml":
        tasks = tasks[0::2]
    return [(task,) for task in tasks]
