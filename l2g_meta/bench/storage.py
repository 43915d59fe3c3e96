"""What drawing and gathering an update's tasks costs, from memory maps of the sizes of two data sets."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2g_meta.bench.case import Case
from l2g_meta.bench.run import describe_machine
from l2g_meta.bench.timing import seconds
from l2g_meta.data.cache import create_images, open_dataset, write_classes
from l2g_meta.data.pairs import TaskPairs

SIZES = {"mini-imagenet": (38_400, 64), "tiered-imagenet": (448_695, 351)}  # images and classes of the training splits
UPDATES = 10  # different ones, which each pass draws again


def storage(case: Case, *, repeats: int = 5, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Medians over updates' data from each array in turn, as a dictionary that ``json`` takes.

    The arrays are sparse files, opened as converted data sets are. No disk is behind them: the first pass over the
    updates clears memory for the file cache instead of reading, later ones find the images there.

    Args:
        case: whose tasks are drawn; its device is where the inputs are wanted.
        repeats: passes after the first.
        say: is given each line of the table.
    """
    device = torch.device(case.device)
    say(
        f"{case.image_size} px, {case.ways}-way {case.shots}-shot, {case.queries} queries, pairs: {case.pairs}; "
        f"{describe_machine(case)}"
    )
    times: dict[str, list[list[float]]] = {name: [[] for _ in range(repeats + 1)] for name in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: _stream(Path(folder) / name, case, *size) for name, size in SIZES.items()}
        for run in range(repeats + 1):
            for k in range(UPDATES):
                for name, stream in streams.items():
                    positions = range(k * case.pairs, (k + 1) * case.pairs)
                    times[name][run].append(seconds(partial(stream.batch, positions), device))
    rows = [_row(name, case, first, sum(later, [])) for name, (first, *later) in times.items()]
    say(f"{'':18}{'images':>9}{'GB':>7}{'ms/update: first':>19}{'later':>9}{'ratio':>8}")
    for row in rows:
        row |= {"ratio": row["seconds"] / rows[0]["seconds"], "all_seconds": times[row["name"]]}
        say(
            f"{row['name']:18}{row['images']:9,}{row['bytes'] / 1e9:7.1f}{1e3 * row['first_seconds']:19.1f}"
            f"{1e3 * row['seconds']:9.1f}{row['ratio']:8.2f}"
        )
    return {"case": asdict(case), "machine": describe_machine(case), "rows": rows}


def _row(name: str, case: Case, first: list[float], later: list[float]) -> dict[str, Any]:
    n = SIZES[name][0]
    medians = {"first_seconds": statistics.median(first), "seconds": statistics.median(later)}
    return {"name": name, "images": n, "bytes": n * 3 * case.image_size**2, **medians}


def _stream(folder: Path, case: Case, n: int, n_classes: int) -> TaskPairs:
    folder.mkdir()
    create_images(folder, (n, case.image_size, case.image_size, 3))
    write_classes(folder, np.arange(n) * n_classes // n, [str(c) for c in range(n_classes)])
    data = open_dataset(folder, name=folder.name, split="train")
    return TaskPairs(data, ways=case.ways, shots=case.shots, queries=case.queries, device=case.device)
