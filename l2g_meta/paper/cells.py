"""Trains and tests cells: one after the other; several processes, on any machines, may share the folder."""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.bench.timing import describe_machine
from l2g_meta.data.images import SPLITS
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import L2GError
from l2g_meta.evaluation.alignment import alignment
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.files.locks import claim
from l2g_meta.files.sealed import sealed
from l2g_meta.files.tensors import make_folder
from l2g_meta.files.writing import check_writable, write_text
from l2g_meta.models.batchnorm_policy import POLICIES
from l2g_meta.paper.equal_time import equal_time
from l2g_meta.paper.plan import EQUAL_TIME, RESULT, SCALES, Cell, Plan, check_same
from l2g_meta.paper.published import COLUMNS
from l2g_meta.paper.study import ROWS
from l2g_meta.training.build import build_data, build_device, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.log import read_log
from l2g_meta.training.loop import train
from l2g_meta.training.objectives import OBJECTIVES

ALIGNED_SEED = 2_000_003  # of the pairs of test tasks whose gradients are compared
WAIT = 5.0  # seconds between looks at cells that others hold


def run_cells(plan: Plan, *, quiet: bool = False) -> list[str]:
    """Brings every cell to its result, those that no other process has; returns what failed.

    Args:
        plan: the experiment.
        quiet: neither progress bars nor a line for each cell on the error output.

    Raises:
        L2GError: before anything is trained, if there is no such device, folder or data.
        OSError: if the folder cannot be written.
    """
    build_device(plan.device)  # what is missing is found now, not after hours of work
    make_folder(plan.out, "a folder to write for --out", "choose another")
    check_writable(plan.out / RESULT)
    for config in {cell.data: cell.config() for cell in plan.cells}.values():
        for split in SPLITS:
            build_data(config, split)
    return work(plan.cells, quiet=quiet)


def work(cells: Sequence[Cell], *, quiet: bool) -> list[str]:
    """Takes the first cell that nobody has until all are done; returns what failed."""
    failed: dict[Cell, str] = {}
    while left := [cell for cell in cells if not cell.done and cell not in failed]:
        if not any(_take(cell, failed, quiet) for cell in left):
            time.sleep(WAIT)  # others have them all
    return list(failed.values())


def _take(cell: Cell, failed: dict[Cell, str], quiet: bool) -> bool:
    """Runs a cell unless somebody else does; whether it was ours to run."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with claim(cell.folder / "lock") as ours:
        if ours and not cell.done:
            try:
                began = time.perf_counter()
                result = run_cell(cell, progress=not quiet)
                accuracy = result["tests"][result["config"]["bn"]]["accuracy_mean"]
                if not quiet:
                    _tell(f"{cell.name}: {accuracy:.2f} % ({time.perf_counter() - began:.0f} s)")
            except (L2GError, OSError, RuntimeError) as error:  # the disk, or the device's memory, is full: go on
                failed[cell] = f"{cell.name}: {error}"
                _tell(f"l2g: {failed[cell]}")
        return ours


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_cell(cell: Cell, *, progress: bool = False) -> dict[str, Any]:
    """Trains a cell, or goes on with it, and tests it under both BatchNorm policies; returns and stores the result."""
    device = build_device(cell.plan.device)
    machine = f"{describe_machine(device)}, Python {platform.python_version()}"
    begun = cell.begun
    if begun:
        check_same(cell, Config.load(cell.folder / "config.json"))
    elif ROWS[cell.row].time_of is not None:
        write_json(cell.folder / EQUAL_TIME, sealed(equal_time(cell) | {"machine": machine}))
    config, scale = cell.config(), SCALES[cell.plan.scale]
    train(config, cell.folder, resume=begun, progress=progress, keep_weights=scale.averaged)
    wrapper, _ = load_run(cell.folder, device=config.device)
    data = {split: build_data(config, split) for split in SPLITS}
    column = COLUMNS[cell.column]
    log = read_log(cell.folder)
    inner = [float(line["alignment"] or "nan") for line in log[len(log) // 2 :]] or [math.nan]
    result = {
        "config": {k: v for k, v in asdict(config).items() if k not in ("root", "device")},
        "classes": {split: len(dataset.index) for split, dataset in data.items()},
        "tests": _tests(cell, wrapper, data["test"], device),
        "updates": len(log),
        "tasks": sum(int(line["tasks"]) for line in log),
        "seconds": sum(float(line["seconds"]) for line in log),
        "machine": machine,
        "equal_time": cell.decided,
        "alignment": None if math.isnan(mean := statistics.fmean(inner)) else mean,
    }
    if scale.averaged:
        average, _ = load_run(cell.folder, checkpoint="average", device=config.device)
        result["average"] = _tests(cell, average, data["test"], device)
    if scale.aligned and config.method in OBJECTIVES:
        pairs = TaskPairs(data["test"], ways=column.ways[0], shots=column.shots[0], queries=scale.test_queries,
                          seed=ALIGNED_SEED, device=device)  # fmt: skip
        result["held_out"] = alignment(wrapper, pairs, scale.aligned)._asdict()
    write_json(cell.folder / RESULT, sealed(result))
    return result


def _tests(cell: Cell, wrapper: L2GWrapper, dataset: Any, device: torch.device) -> dict[str, Any]:
    """Accuracies of a cell's episodes under each BatchNorm policy."""
    column, scale = COLUMNS[cell.column], SCALES[cell.plan.scale]
    sizes: dict[str, Any] = {"queries": scale.test_queries, "episodes": scale.test_episodes}
    tests: dict[str, Any] = {}
    for bn in POLICIES:
        settings = [
            evaluate(wrapper, dataset, ways=ways, shots=shots, **sizes, bn=bn, device=device)
            for ways, shots in itertools.product(column.ways, column.shots)
        ]
        accuracies = torch.tensor([s.accuracies for s in settings], dtype=torch.float64).mean(0)
        tests[bn] = {
            "accuracy_mean": accuracies.mean().item(),
            "accuracies": [round(a, 4) for a in accuracies.tolist()],  # of an episode, the mean over settings
            "settings": {f"{s.ways}w{s.shots}s": s.accuracy_mean for s in settings},
        }
    return tests


def write_json(path: Path, values: Any) -> None:
    """Writes JSON beside its place and renames it into it; lists of numbers on one line."""
    text = re.sub(r"\[[-+.\d\s,e]+\]", lambda found: " ".join(found[0].split()), json.dumps(values, indent=1))
    write_text(path, text + "\n")
