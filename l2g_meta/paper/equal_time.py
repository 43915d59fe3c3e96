"""Equal wall time: what an update of a row costs beside one of L2G's, measured in turn in one process."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from l2g_meta.bench.timing import interleaved
from l2g_meta.data.host import placed
from l2g_meta.evaluation.world import World
from l2g_meta.paper.plan import SCALES, Cell
from l2g_meta.paper.study import ROWS
from l2g_meta.training.build import (
    build_data,
    build_device,
    build_model,
    build_objective,
    build_optimizer,
    build_pairs,
    build_wrapper,
    set_precision,
)
from l2g_meta.training.config import Config
from l2g_meta.training.update import Updater


def equal_time(cell: Cell) -> dict[str, Any]:
    """How many updates of a cell take as long as all those of the row whose time it has, as both cost now and here.

    After one update of each that is not timed they take turns, so that other work on the machine slows both.

    Args:
        cell: of a row with ``time_of``.

    Returns:
        ``of`` (the other row), ``of_updates`` (how many it has), ``of_seconds`` and ``seconds`` (medians of one update
        of the other row and of this one), ``ratio`` of the two, and ``updates``: ``of_updates`` times that.
    """
    other = replace(cell, row=ROWS[cell.row].time_of or cell.row)
    configs = [other.config(), cell.config()]
    device = build_device(cell.plan.device)
    data = placed(build_data(configs[0], "train"), device)  # once for both
    updates = {str(i): _updates(config, data, device) for i, config in enumerate(configs)}
    seconds = interleaved(updates, repeats=SCALES[cell.plan.scale].timed)
    theirs, ours = map(statistics.median, seconds.values())
    return {
        "of": other.row,
        "of_updates": configs[0].iterations,
        "of_seconds": theirs,
        "seconds": ours,
        "ratio": theirs / ours,
        "updates": max(1, round(configs[0].iterations * theirs / ours)),
    }


def _updates(config: Config, data: Any, device: torch.device) -> Callable[[], Any]:
    """A function that does the next update of a run, as ``train`` does it."""
    set_precision(config.precision)
    pairs = build_pairs(config, data, device)
    wrapper = build_wrapper(config, build_model(config, tuple(pairs[0][0].support_x.shape[1:]))).to(device).train()
    update = Updater(config, build_objective(config), wrapper, build_optimizer(config, wrapper), pairs, World())
    positions = itertools.count()
    return lambda: update(next(positions))
