"""Pictures of runs: learning curves, and embeddings of unseen classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.pairs import Episodes
from l2g_meta.errors import FitError
from l2g_meta.files.writing import new_file
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.models.metric import MetricModel
from l2g_meta.task import Task
from l2g_meta.training.log import read_log


def learning_curve(runs: Sequence[Path | str], path: Path | str, *, labels: Sequence[str] | None = None) -> Path:
    """Training loss and validation accuracy of runs against updates (cf. fig. 2 of the paper), as a picture.

    Training losses of different methods differ in kind (L2G: L(θ'; T_j); episodic: L(θ; T)); validation is under θ
    for all.

    Args:
        runs: run directories.
        path: of the picture, e.g. ``curve.png``.
        labels: one per run; their folders' names by default.
    """
    figure, (left, right) = subplots(1, 2)
    for run, label in zip(runs, labels or [Path(run).name for run in runs], strict=True):
        rows = read_log(Path(run))
        if not rows:  # lost; a run that goes on says so
            continue
        k = np.array([int(row["iteration"]) for row in rows])
        loss = np.array([float(row["loss"] or "nan") for row in rows])
        window = max(1, len(loss) // 50)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        left.plot(k[window - 1 :], smooth, label=label)
        done = [row for row in rows if row["val_accuracy"]]
        mean, half = (np.array([float(row[name] or "nan") for row in done]) for name in ("val_accuracy", "val_ci95"))
        at = [int(row["iteration"]) for row in done]
        right.plot(at, mean, marker="o", markersize=3, label=label)
        right.fill_between(at, mean - half, mean + half, alpha=0.15)
    left.set(xlabel="updates", ylabel="training loss", title="Meta-training loss")
    right.set(xlabel="updates", ylabel="accuracy (%)", title="Validation under θ, 95% over episodes")
    if right.lines:
        right.legend()
    return save(figure, path)


@dataclass(frozen=True)
class Scatter:
    """One picture of embeddings, as points of a plane.

    Args:
        title: of the picture.
        supports: coordinates of the supports, (n_support, 2).
        support_labels: their classes, from 0.
        queries: coordinates of the queries, (n_query, 2).
        query_labels: their classes.
    """

    title: str
    supports: list[list[float]]
    support_labels: list[int]
    queries: list[list[float]]
    query_labels: list[int]


def tsne(models: Mapping[str, nn.Module], dataset: Any, path: Path | str, *, heading: str = "", **options: Any) -> Path:
    """t-SNE of one episode's embeddings under each model, side by side (cf. fig. 3): supports stars, queries dots.

    Args:
        models: as of ``tsne_points``.
        dataset: a data set, or a list of several, a row of pictures each; the split is in each title.
        path: of the picture.
        heading: above the pictures.
        options: of ``tsne_points``: ways, shots, queries, seed and device.

    Raises:
        ImportError: without scikit-learn.
        FitError: for a model without an ``encoder``.
    """
    return draw_scatters(tsne_points(models, dataset, **options), path, heading=heading)


def tsne_points(
    models: Mapping[str, nn.Module],
    dataset: Any,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 25,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[list[Scatter]]:
    """What ``tsne`` draws: for each data set, the picture of each model.

    Args:
        models: title to ``MetricModel`` or its wrapper; all are shown the same episode.
        dataset: as for ``TaskPairs``, or a list of several.
        ways: classes shown.
        shots: supports per class.
        queries: queries per class.
        seed: of the episode and of t-SNE.
        device: where the models are.

    Raises:
        ImportError: without scikit-learn.
        FitError: for a model without an ``encoder``.
    """
    require_tsne()
    rows = []
    for data in dataset if isinstance(dataset, list | tuple) else [dataset]:
        task = Episodes(data, ways=ways, shots=shots, queries=queries, seed=seed, device=device)[0]
        shown = f"{ways} classes of {getattr(data, 'name', '')} {getattr(data, 'split', '')}".strip()
        rows.append([_embedded(f"{title}: {shown}", model, task, seed) for title, model in models.items()])
    return rows


def require_tsne() -> Any:
    """scikit-learn's ``TSNE``.

    Raises:
        ImportError: with what to install.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE pictures need scikit-learn; pip install scikit-learn") from error
    return TSNE


def flattened(z: np.ndarray, seed: int) -> np.ndarray:  # (n, d) -> (n, 2)
    """Embeddings as points of a plane, by t-SNE.

    Raises:
        ImportError: without scikit-learn.
    """
    return require_tsne()(random_state=seed, init="pca", perplexity=min(30.0, (len(z) - 1) / 3)).fit_transform(z)


def _embedded(title: str, model: nn.Module, task: Task, seed: int) -> Scatter:
    model = model.module if isinstance(model, L2GWrapper) else model
    if not isinstance(model, MetricModel):
        raise FitError(f"need a MetricModel, whose encoder gives embeddings, got {type(model).__name__} for {title!r}")
    with torch.no_grad(), batchnorm_policy(model, "running"):
        z = model.encoder(torch.cat([task.support_x, task.query_x])).flatten(1).cpu().numpy()
    n = len(task.support_y)
    flat = flattened(z, seed)
    return Scatter(title, flat[:n].tolist(), task.support_y.tolist(), flat[n:].tolist(), task.query_y.tolist())


def draw_scatters(rows: Sequence[Sequence[Scatter]], path: Path | str, *, heading: str = "") -> Path:
    """Rows of pictures of embeddings: supports are stars, queries dots, classes colours.

    Args:
        rows: as of ``tsne_points``.
        path: of the picture.
        heading: above the pictures.
    """
    figure, axes = subplots(len(rows), len(rows[0]))
    for axis, scatter in zip(np.ravel(axes), (scatter for row in rows for scatter in row), strict=True):
        dots, stars = np.transpose(scatter.queries), np.transpose(scatter.supports)
        axis.scatter(*dots, c=scatter.query_labels, cmap="tab10", vmax=9, s=12)
        axis.scatter(*stars, c=scatter.support_labels, cmap="tab10", vmax=9, s=140, marker="*", edgecolors="black")
        axis.set_title(scatter.title, fontsize=9)
        axis.set(xticks=[], yticks=[])
    stars, dots = (_marker(marker, size) for marker, size in (("*", 12), ("o", 4)))
    figure.legend([stars, dots], ["supports", "queries"], loc="outside lower center", ncols=2, frameon=False)
    if heading:
        figure.suptitle(heading, fontsize=8, wrap=True)
    return save(figure, path)


def _marker(marker: str, size: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="gray", linestyle="", marker=marker, markersize=size)


def subplots(rows: int, columns: int) -> Any:
    """A figure and its axes, (rows, columns) of them or as Matplotlib squeezes them."""
    # Without pyplot: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save(figure: Any, path: Path | str) -> Path:
    """Writes the picture.

    Raises:
        L2GError: if it cannot be written.
    """
    path = Path(path)
    with new_file(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=120)
    return path
