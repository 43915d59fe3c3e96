"""Figures 2 and 3 of the paper, from the cells of the tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from l2g_meta.paper.catalogue import COLUMNS, EXPERIMENTS, ROWS
from l2g_meta.paper.cells import write_json
from l2g_meta.paper.plan import SCALES, Cell, Plan
from l2g_meta.training.build import build_data, build_device, load_run
from l2g_meta.training.curves import draw_scatters, save, subplots, tsne_points
from l2g_meta.training.log import read_log


def draw(plan: Plan) -> Path | None:
    """The picture of a figure's plan, ``<experiment>-<scale>.png``; ``None`` for tables and studies."""
    figures = {"figure2": convergence, "figure3": embeddings}
    if plan.experiment not in figures:
        return None
    return figures[plan.experiment](plan, plan.out / f"{plan.experiment}-{plan.scale}.png")


def convergence(plan: Plan, path: Path) -> Path:
    """Figure 2: meta-training loss, and validation loss under θ, against updates; bands hold all seeds.

    Training losses differ in kind: L(θ) for the base, L(θ'; T_j) for L2G. The validation loss is under θ for both.
    """
    figure, axes = subplots(len(plan.data), 2)
    lengths = [len(read_log(cell.folder)) for cell in plan.cells]
    scale = "log" if max(lengths) > 2 * min(lengths) else "linear"  # rows of one task per update have the longer runs
    for (left, right), data in zip(np.reshape(axes, (-1, 2)), plan.data, strict=True):
        for row in plan.rows:
            logs = [read_log(cell.folder) for cell in plan.cells if (cell.data, cell.row) == (data, row)]
            title = ROWS[row].title
            window = max(1, len(logs[0]) // 50)
            loss = [[float(line["loss"] or "nan") for line in log] for log in logs]
            smooth = [np.convolve(values, np.ones(window) / window, mode="valid") for values in loss]
            _band(left, np.arange(window, len(loss[0]) + 1), smooth, title)
            done = [[line for line in log if line["val_loss"]] for log in logs]
            at = np.array([int(line["iteration"]) for line in done[0]])
            _band(right, at, [[float(line["val_loss"]) for line in log] for log in done], title)
        left.set(xlabel="updates", ylabel="L(θ); L2G: L(θ'; T_j)", title=f"{data}: meta-training loss", xscale=scale)
        right.set(xlabel="updates", ylabel="loss", title=f"{data}: validation loss under θ", xscale=scale)
        right.legend(fontsize=8)
    figure.suptitle(_title(plan), fontsize=8, wrap=True)
    return save(figure, path)


def _title(plan: Plan) -> str:
    spec, scale = EXPERIMENTS[plan.experiment], SCALES[plan.scale]
    settings = ", ".join(COLUMNS[column].title for column in plan.columns)
    return f"{spec.title}, {settings}, {plan.seeds} trained seed(s); {plan.scale}: {scale.title}"


def _band(axis: Any, at: np.ndarray, curves: Any, label: str) -> None:
    points = min(len(at), *map(len, curves))  # seeds of equal wall time differ in updates
    at, values = at[:points], np.array([values[:points] for values in curves])  # (seeds, points)
    axis.plot(at, values.mean(0), label=label, marker="o" if len(at) < 30 else None, markersize=3)
    axis.fill_between(at, values.min(0), values.max(0), alpha=0.15)


def embeddings(plan: Plan, path: Path) -> Path:
    """Figure 3: t-SNE of one episode of training classes and one of test classes, base beside L2G, seed 0.

    Supports are stars, queries dots; all under θ, which is what classifies at test. Coordinates and classes are kept in
    ``<experiment>-<scale>-points.json``, for ``Scatter`` and ``draw_scatters``.
    """
    cells: list[Cell] = [cell for cell in plan.cells if cell.seed == 0]
    loaded = {ROWS[cell.row].title: load_run(cell.folder, device=plan.device) for cell in cells}
    config = next(iter(loaded.values()))[1]
    device = build_device(plan.device)
    models = {title: wrapper for title, (wrapper, _) in loaded.items()}
    data = [build_data(config, split) for split in ("train", "test")]
    queries = min(25, min(len(rows) for d in data for rows in d.index) - 1)
    points = tsne_points(models, data, ways=5, shots=1, queries=queries, device=device)
    drawn = {"title": _title(plan), "rows": [[asdict(scatter) for scatter in row] for row in points]}
    write_json(path.with_name(f"{path.stem}-points.json"), drawn)
    return draw_scatters(points, path, heading=_title(plan))
