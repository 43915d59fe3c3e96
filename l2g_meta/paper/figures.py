"""Figures 2 and 3 of the paper, from the cells of the tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from l2g_meta.paper.cells import write_json
from l2g_meta.paper.plan import SCALES, Plan
from l2g_meta.paper.published import COLUMNS
from l2g_meta.paper.study import EXPERIMENTS, ROWS
from l2g_meta.paper.tables import curve
from l2g_meta.training.build import build_data, build_device, load_run
from l2g_meta.training.curves import draw_scatters, save, subplots, tsne_points


def draw(plan: Plan) -> Path | None:
    """The picture of a figure's plan, ``<experiment>-<scale>.png``; ``None`` for tables and studies."""
    figures = {"figure2": convergence, "figure3": embeddings}
    if plan.experiment not in figures:
        return None
    return figures[plan.experiment](plan, plan.out / f"{plan.experiment}-{plan.scale}.png")


def convergence(plan: Plan, path: Path) -> Path:
    """Figure 2: meta-training loss since the validation before, and validation loss, against updates; all seeds.

    Training losses differ in kind: L(θ) for the base, L(θ'; T_j) for L2G. The validation loss is under θ for both.
    Bands hold all seeds.
    """
    figure, axes = subplots(len(plan.data), 2)
    lengths = [cell.result["updates"] for cell in plan.cells]
    scale = "log" if max(lengths) > 2 * min(lengths) else "linear"  # rows of one task per update have the longer runs
    for pair, data in zip(np.reshape(axes, (-1, 2)), plan.data, strict=True):
        for row in plan.rows:
            of_seeds = [list(curve(cell)) for cell in plan.cells if (cell.data, cell.row) == (data, row)]
            points = min(map(len, of_seeds))  # seeds of equal wall time differ in updates
            at = [int(line["updates"]) for line in of_seeds[0][:points]]
            for axis, name in zip(pair, ("loss", "val_loss"), strict=True):
                values = np.array([[float(line[name]) for line in lines[:points]] for lines in of_seeds])
                axis.plot(at, values.mean(0), label=ROWS[row].title, marker="o", markersize=3)
                axis.fill_between(at, values.min(0), values.max(0), alpha=0.15)
        pair[0].set(xlabel="updates", ylabel="L(θ); L2G: L(θ'; T_j)", title=f"{data}: meta-training loss", xscale=scale)
        pair[1].set(xlabel="updates", ylabel="loss", title=f"{data}: validation loss under θ", xscale=scale)
        pair[1].legend(fontsize=8)
    figure.suptitle(_title(plan), fontsize=8, wrap=True)
    return save(figure, path)


def _title(plan: Plan) -> str:
    spec, scale = EXPERIMENTS[plan.experiment], SCALES[plan.scale]
    settings = ", ".join(COLUMNS[column].title for column in plan.columns)
    return f"{spec.title}, {settings}, {plan.seeds} trained seed(s); {plan.scale}: {scale.title}"


def embeddings(plan: Plan, path: Path) -> Path:
    """Figure 3: t-SNE of one episode of training classes and one of test classes, base beside L2G, seed 0.

    Supports are stars, queries dots; all under θ, which is what classifies at test. Coordinates and classes are kept in
    ``<experiment>-<scale>-points.json``, for ``Scatter`` and ``draw_scatters``.
    """
    loaded = {cell: load_run(cell.folder, device=plan.device) for cell in plan.cells if cell.seed == 0}
    config = next(iter(loaded.values()))[1]
    models = {ROWS[cell.row].title: wrapper for cell, (wrapper, _) in loaded.items()}
    data = [build_data(config, split) for split in ("train", "test")]
    queries = min(25, min(len(rows) for d in data for rows in d.index) - 1)
    points = tsne_points(models, data, ways=5, shots=1, queries=queries, device=build_device(plan.device))
    drawn = {"title": _title(plan), "rows": [[asdict(scatter) for scatter in row] for row in points]}
    write_json(path.with_name(f"{path.stem}-points.json"), drawn)
    return draw_scatters(points, path, heading=_title(plan))
