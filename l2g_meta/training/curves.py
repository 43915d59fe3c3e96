"""Learning curves of runs, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2g_meta.files.names import shown
from l2g_meta.files.writing import new_file
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
    for run, label in zip(runs, labels or [Path(run).resolve().name for run in runs], strict=True):
        rows = read_log(Path(run))
        if not rows:  # lost; a run that goes on says so
            continue
        label = shown(label).replace("$", r"\$").lstrip("_") or "run"  # Matplotlib sets $...$ as a formula, hides _...
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
