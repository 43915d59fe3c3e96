"""The charts of a report as numbers; ``charts.html`` draws them as SVG.

Colours are classes of the page's style (``k0`` … ``k9``), so that they fit its scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from l2g_meta.report.experiments import Experiment, Report
from l2g_meta.report.reported_run import ReportedRun

COLOURS = 10  # classes k0 … k9
WIDTH, HEIGHT = 380, 270  # units of a chart, about the pixels of a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
CURVE_POINTS = 240  # drawn of a learning curve


def colour(i: int) -> str:
    """Class of the i-th colour."""
    return f"k{i % COLOURS}"


@dataclass
class Chart:
    """Axes with a scale, and what is drawn in them: each mark is a class of the page's style, and where it is.

    Args:
        x: range of the horizontal axis.
        y: range of the vertical axis, upwards.
        description: what the chart shows, for readers who do not see it.
        xlabel: below the horizontal axis.
        ylabel: above the vertical axis.
        height: in units.
        ynames: names at y = 0, 1, … instead of numbers.
        yfirst: least number on the vertical axis.
        areas: style, x and y of their corners.
        lines: style, x and y of their points.
        whiskers: style, least and largest x, y.
        dots: style, x, y, radius in units, title.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    description: str
    xlabel: str
    ylabel: str = ""
    height: int = HEIGHT
    ynames: Sequence[str] = ()
    yfirst: float = -math.inf
    areas: Sequence[tuple[str, Sequence[float], Sequence[float]]] = ()
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]] = ()
    whiskers: Sequence[tuple[str, float, float, float]] = ()
    dots: Sequence[tuple[str, float, float, float, str]] = ()

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the axes, in units."""
        return LEFT, TOP + (14 if self.ylabel else 0), WIDTH - RIGHT, self.height - BOTTOM

    @property
    def xticks(self) -> list[tuple[float, str]]:
        """Where numbers stand below, in units, and their texts."""
        return [(self.at(value, self.y[0])[0], short(value)) for value in ticks(*self.x)]

    @property
    def yticks(self) -> list[tuple[float, str]]:
        """Where numbers or names stand at the left, in units, and their texts."""
        numbers = [(value, short(value)) for value in ticks(max(self.y[0], self.yfirst), self.y[1])]
        return [(self.at(self.x[0], y)[1], text) for y, text in (list(enumerate(self.ynames)) or numbers)]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in units."""
        left, top, right, bottom = self.box
        u = left + (right - left) * (x - self.x[0]) / max(self.x[1] - self.x[0], 1e-12)
        v = bottom - (bottom - top) * (y - self.y[0]) / max(self.y[1] - self.y[0], 1e-12)
        return round(u, 1), round(v, 1)

    def path(self, x: Iterable[float], y: Iterable[float]) -> str:
        """A line through the points that are numbers, as SVG writes it; empty without any."""
        places = [self.at(*point) for point in zip(x, y, strict=True) if all(map(math.isfinite, point))]
        return "M" + "L".join(f"{u} {v}" for u, v in places) if places else ""


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high.

    Example:
        >>> ticks(0, 300), ticks(24.3, 31.2)
        ([0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0], [26.0, 28.0, 30.0])
    """
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(round(value, 10)) for value in found if low <= value <= high]


def short(value: float) -> str:
    """A number at an axis.

    Example:
        >>> short(20000.0), short(0.25), short(3.0)
        ('20k', '0.25', '3')
    """
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with some room on both sides.

    Example:
        >>> padded(10.0, 20.0), padded(3.0, 3.0)
        ((9.5, 20.5), (2.5, 3.5))
    """
    room = (high - low) * 0.05 or 0.5
    return float(low - room), float(high + room)


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
    which = np.linspace(0, len(k) - 1, min(len(k), CURVE_POINTS)).astype(int)
    return k[which], values[which]


def loss_chart(report: Report) -> Chart | None:
    """Training loss against updates; ``None`` without any."""
    curves = [(style, *smoothed(*run.log[:, :2].T)) for style, run in _coloured(report)]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    every = np.concatenate([y for _, _, y in curves])
    return Chart(
        (0, max(k[-1] for _, k, _ in curves)), padded(every.min(), every.max()), lines=curves,  # type: ignore[arg-type]
        description=f"Training loss of {len(curves)} runs against updates", xlabel="updates", ylabel="training loss",
    )  # fmt: skip


def validation_chart(report: Report) -> Chart | None:
    """Validation accuracy against updates with its interval over episodes; ``None`` without any."""
    found = [(style, run, run.validation.T) for style, run in _coloured(report) if len(run.validation)]
    if not found:
        return None
    _, _, mean, half = np.concatenate([columns for *_, columns in found], axis=1)
    half = np.nan_to_num(half)
    return Chart(
        (0, max(run.updates for _, run, _ in found)),
        padded((mean - half).min(), (mean + half).max()),
        description=f"Validation accuracy of {len(found)} runs against updates",
        xlabel="updates",
        ylabel="validation accuracy (%)",
        areas=[(s, [*k, *k[::-1]], [*(mean - half), *(mean + half)[::-1]]) for s, _, (k, _, mean, half) in found],
        lines=[(style, k, mean) for style, _, (k, _, mean, _) in found],
        dots=[
            (style, k, mean, 2.5, f"{run.label}, update {k:.0f}: {mean:.1f} ± {half:.1f} %")
            for style, run, columns in found
            for k, _, mean, half in columns.T.tolist()
        ],
    )


def accuracy_chart(group: Sequence[Experiment], split: str) -> Chart:
    """Accuracy of each run with its interval over episodes, and of several seeds their mean with one over seeds.

    Args:
        group: experiments on the same images.
        split: that they were tested on.
    """
    found: list[tuple[str, float, float, str, str]] = []
    for experiment in group:
        style = colour(experiment.number)
        for run in experiment.runs:
            if run.measured is not None:
                e = run.measured.evaluation
                found.append((run.label, e.accuracy_mean, e.ci95_episodes, style, f"{e.episodes} episodes"))
        e_all = experiment.evaluation
        if e_all is not None and e_all.ci95_runs is not None:
            over = f"{len(e_all.run_means)} trained models"
            found.append((experiment.letter, e_all.accuracy_mean, e_all.ci95_runs, f"{style} mean", over))
    found.reverse()
    mean, half = np.array([line[1:3] for line in found]).T
    known = np.nan_to_num(half, posinf=0)
    low, high = padded((mean - known).min(), (mean + known).max())
    return Chart(
        (max(low, 0.0), min(high, 100.0)), (-0.6, len(found) - 0.4),
        description=f"Accuracy with 95% intervals of {len(found)} results", xlabel=f"accuracy on {split} (%)",
        height=TOP + BOTTOM + 26 * len(found) + 6, ynames=[name for name, *_ in found],
        whiskers=[
            (style, max(mean - half, 0.0), min(mean + half, 100.0), y)
            for y, (_, mean, half, style, _) in enumerate(found) if math.isfinite(half)
        ],
        dots=[
            (style, mean, y, 4.5, f"{name}: {mean:.2f} ± {half:.2f} %, 95% over {over}")
            for y, (name, mean, half, style, over) in enumerate(found)
        ],
    )  # fmt: skip


def _coloured(report: Report) -> list[tuple[str, ReportedRun]]:
    return [(colour(experiment.number), run) for experiment in report.experiments for run in experiment.runs]
