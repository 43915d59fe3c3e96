"""The charts of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from l2g_meta.classify.calibration import Reliability
from l2g_meta.report.experiments import Experiment, Report
from l2g_meta.report.reported_run import ReportedRun
from l2g_meta.report.svg import BOTTOM, COLOURS, TOP, Chart, add, colour, markup, picture

CURVE_POINTS = 240  # drawn of a learning curve
MARKERS = 40  # of validations


def smoothed(k: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving mean over a fiftieth of the updates, thinned: updates and means, (m,) each with m ≤ ``CURVE_POINTS``.

    Example:
        >>> smoothed(np.arange(3), np.array([1.0, 2.0, 3.0]))[1].tolist()
        [1.0, 2.0, 3.0]
    """
    keep = np.isfinite(values)
    k, values = k[keep], values[keep]
    window = max(1, len(values) // 50)
    if len(values):
        k, values = k[window - 1 :], np.convolve(values, np.ones(window) / window, mode="valid")
    which = np.unique(np.linspace(0, len(k) - 1, min(len(k), CURVE_POINTS)).astype(int)) if len(k) else []
    return k[which], values[which]


def loss_chart(report: Report) -> Chart | None:
    """Training loss against updates; ``None`` without any."""
    curves = [(style, *smoothed(*run.log[:, :2].T)) for style, run in _coloured(report)]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    every = np.concatenate([y for _, _, y in curves])
    chart = Chart(
        (0, max(k[-1] for _, k, _ in curves)), padded(every.min(), every.max()),
        description=f"Training loss of {len(curves)} runs against updates", xlabel="updates", ylabel="training loss",
    )  # fmt: skip
    for style, k, y in curves:
        chart.line(k, y, style)
    return chart


def validation_chart(report: Report) -> Chart | None:
    """Validation accuracy against updates with its interval over episodes; ``None`` without any."""
    found = [(style, run, run.validation) for style, run in _coloured(report) if len(run.validation)]
    if not found:
        return None
    every = np.concatenate([rows for *_, rows in found])
    half = np.nan_to_num(every[:, 3])
    chart = Chart(
        (0, max(run.updates for _, run, _ in found)),
        padded((every[:, 2] - half).min(), (every[:, 2] + half).max()),
        description=f"Validation accuracy of {len(found)} runs against updates",
        xlabel="updates",
        ylabel="validation accuracy (%)",
    )
    for style, _, rows in found:
        k, mean, half = rows[:, 0], rows[:, 2], rows[:, 3]
        chart.band(k.tolist(), (mean - half).tolist(), (mean + half).tolist(), style)
        chart.line(k, mean, style)
    for style, run, rows in found:
        shown = np.linspace(0, len(rows) - 1, min(len(rows), MARKERS)).astype(int)
        for k, _, mean, half in rows[shown].tolist():
            chart.dot(k, mean, style, f"{run.label}, update {k:.0f}: {mean:.1f} ± {half:.1f} %", r=2.5)
    return chart


def accuracy_chart(group: Sequence[Experiment], split: str) -> Chart:
    """Accuracy of each run with its interval over episodes, and of several seeds their mean with one over seeds.

    Args:
        group: experiments on the same images.
        split: that they were tested on.
    """
    lines: list[tuple[str, float, float, str, str]] = []
    for experiment in group:
        style = colour(experiment.number)
        for run in experiment.runs:
            if run.measured is not None:
                e = run.measured.evaluation
                lines.append((run.label, e.accuracy_mean, e.ci95_episodes, style, f"{e.episodes} episodes"))
        e_all = experiment.evaluation
        if e_all is not None and e_all.ci95_runs is not None:
            over = f"{len(e_all.run_means)} trained models"
            lines.append((experiment.letter, e_all.accuracy_mean, e_all.ci95_runs, f"{style} mean", over))
    lines.reverse()
    low = min(mean - half if math.isfinite(half) else mean for _, mean, half, *_ in lines)
    high = max(mean + half if math.isfinite(half) else mean for _, mean, half, *_ in lines)
    low, high = padded(low, high)
    chart = Chart(
        (max(low, 0.0), min(high, 100.0)), (-0.6, len(lines) - 0.4),
        description=f"Accuracy with 95% intervals of {len(lines)} results", xlabel=f"accuracy on {split} (%)",
        height=TOP + BOTTOM + 26 * len(lines) + 6, ynames=[name for name, *_ in lines],
    )  # fmt: skip
    for y, (name, mean, half, style, over) in enumerate(lines):
        if math.isfinite(half):
            chart.whisker(max(mean - half, 0.0), min(mean + half, 100.0), y, style)
        chart.dot(mean, y, style, f"{name}: {mean:.2f} ± {half:.2f} %, 95% over {over}", r=4.5)
    return chart


def reliability_chart(found: Reliability, style: str, name: str) -> Chart:
    """Accuracy in each bin of confidence, the diagonal, and the share of predictions in each bin below."""
    bins, total = len(found.count), sum(found.count)
    chart = Chart(
        (0, 100), (-26, 100), description=f"Reliability of {name}: accuracy against probability in {bins} bins",
        xlabel="probability of the prediction (%)", ylabel="right (%)", height=330, yfirst=0,
    )  # fmt: skip
    most = max(found.count)
    for b, (n, accuracy, mean) in enumerate(zip(found.count, found.accuracy, found.confidence, strict=True)):
        if not n:
            continue
        x = (100 * b / bins + 0.6, 100 * (b + 1) / bins - 0.6)
        title = f"{n:,} of {total:,} predictions: {100 * mean:.1f} % probable, {100 * accuracy:.1f} % right"
        chart.bar(x, (0, 100 * accuracy), style, title)
        low, high = sorted((100 * accuracy, 100 * mean))
        chart.bar(x, (low, high), "gap", title)
        chart.bar(x, (-26, -26 + 20 * n / most), "count", title)
    chart.line((0, 100), (0, 100), "ideal")
    return chart


SIDE = 400  # units of a t-SNE picture


def scatter(
    points: np.ndarray, classes: Sequence[int], tiles: Sequence[tuple[int, int]], names: Sequence[str]
) -> Markup:
    """Points (n, 2) in [0, 1] whose thumbnails the page's script shows.

    Args:
        points: coordinates.
        classes: position of each point's class in ``names``, (n,).
        tiles: place of each thumbnail on the sheet, (n,).
        names: of the classes.
    """
    description = f"t-SNE of {len(points)} images of {len(names)} classes; arrow keys go from image to image"
    svg, margin = picture(description, SIDE, SIDE, role="group"), 14
    for i, (point, c, (column, line)) in enumerate(zip(points.tolist(), classes, tiles, strict=True)):
        u, v = (round(margin + (SIDE - 2 * margin) * t, 1) for t in point)
        diamond: dict[str, object] = {"d": f"M{u} {v - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5-6.5z"}
        shape = {"cx": u, "cy": v, "r": 5} if c < COLOURS else diamond
        add(
            svg, "circle" if c < COLOURS else "path", f"pt {colour(c)}", **shape, tabindex=-1 if i else 0, role="img",
            data_c=c, data_x=column, data_y=line, aria_label=f"{c + 1}: {names[c]}",
        )  # fmt: skip
    return markup(svg)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with some room on both sides.

    Example:
        >>> padded(10.0, 20.0), padded(3.0, 3.0)
        ((9.5, 20.5), (2.5, 3.5))
    """
    room = (high - low) * 0.05 or 0.5
    return float(low - room), float(high + room)


def _coloured(report: Report) -> list[tuple[str, ReportedRun]]:
    return [(colour(experiment.number), run) for experiment in report.experiments for run in experiment.runs]
