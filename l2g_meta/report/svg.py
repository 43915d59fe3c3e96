"""Small charts as SVG text; colours are classes of the page's style (``k0`` … ``k9``), so that they fit its scheme."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

COLOURS = 10  # classes k0 … k9
WIDTH, HEIGHT = 380, 270  # units of a chart, about the pixels of a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40


def escaped(text: object) -> str:
    """Text that is safe between tags and in quoted attributes, whatever it was.

    Characters that no page may hold (lone surrogates, most control characters) become question marks.

    Example:
        >>> escaped('<script>"'), escaped(chr(0xDC80) + chr(0))
        ('&lt;script&gt;&quot;', '??')
    """
    shown = str(text).encode("utf-8", "replace").decode()
    return html.escape("".join("?" if ord(c) < 32 and c not in "\n\t" else c for c in shown))


def colour(i: int) -> str:
    """Class of the i-th colour."""
    return f"k{i % COLOURS}"


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About n round numbers from low to high.

    Example:
        >>> ticks(0, 300), ticks(24.3, 31.2)
        ([0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0], [26.0, 28.0, 30.0])
    """
    raw = max(high - low, 1e-9) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number at an axis.

    Example:
        >>> short(20000.0), short(0.25), short(3.0)
        ('20k', '0.25', '3')
    """
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


class Chart:
    """Axes with a scale, to draw into.

    Args:
        x: range of the horizontal axis.
        y: range of the vertical axis, upwards.
        description: what the chart shows, for readers who do not see it.
        xlabel: below the horizontal axis.
        ylabel: above the vertical axis.
        height: in units.
        ynames: names at y = 0, 1, … instead of numbers.
        yfirst: least number on the vertical axis.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        description: str,
        xlabel: str,
        ylabel: str = "",
        height: float = HEIGHT,
        ynames: Sequence[str] = (),
        yfirst: float = -math.inf,
    ):
        self.x, self.y, self.height = x, y, height
        self.description = description
        self.parts: list[str] = []
        top = TOP + (14 if ylabel else 0)
        self.box = LEFT, top, WIDTH - RIGHT, height - BOTTOM
        self._axes(xlabel, ylabel, ynames, yfirst)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in units."""
        left, top, right, bottom = self.box
        u = left + (right - left) * (x - self.x[0]) / max(self.x[1] - self.x[0], 1e-12)
        v = bottom - (bottom - top) * (y - self.y[0]) / max(self.y[1] - self.y[0], 1e-12)
        return round(u, 1), round(v, 1)

    def _axes(self, xlabel: str, ylabel: str, ynames: Sequence[str], yfirst: float) -> None:
        left, top, right, bottom = self.box
        for value in ticks(*self.x):
            u, _ = self.at(value, self.y[0])
            self.parts.append(f'<path class="grid" d="M{u} {top}V{bottom}"/>')
            self.text(u, bottom + 14, short(value), "middle")
        if ynames:
            for i, name in enumerate(ynames):
                self.text(left - 6, self.at(self.x[0], i)[1] + 4, name, "end")
        else:
            for value in ticks(max(self.y[0], yfirst), self.y[1]):
                v = self.at(self.x[0], value)[1]
                self.parts.append(f'<path class="grid" d="M{left} {v}H{right}"/>')
                self.text(left - 6, v + 4, short(value), "end")
        self.parts.append(f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>')
        self.text((left + right) / 2, self.height - 6, xlabel, "middle")
        if ylabel:
            self.text(4, 13, ylabel, "start")

    def text(self, u: float, v: float, text: str, anchor: str = "start") -> None:
        """Text at a place in units."""
        self.parts.append(f'<text x="{round(u, 1)}" y="{round(v, 1)}" text-anchor="{anchor}">{escaped(text)}</text>')

    def line(self, x: Iterable[float], y: Iterable[float], style: str) -> None:
        """A line through the points that are numbers."""
        points = [self.at(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
        if points:
            path = "L".join(f"{u} {v}" for u, v in points)
            self.parts.append(f'<path class="line {style}" d="M{path}"/>')

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], style: str) -> None:
        """The area between two lines."""
        points = [p for p in zip(x, low, high, strict=True) if all(map(math.isfinite, p))]
        outline = [self.at(a, b) for a, b, _ in points] + [self.at(a, c) for a, _, c in reversed(points)]
        if len(points) > 1:
            path = "L".join(f"{u} {v}" for u, v in outline)
            self.parts.append(f'<path class="band {style}" d="M{path}Z"/>')

    def dot(self, x: float, y: float, style: str, title: str, *, r: float = 3.5) -> None:
        """A point with a text for those who stop over it."""
        u, v = self.at(x, y)
        self.parts.append(
            f'<circle class="dot {style}" cx="{u}" cy="{v}" r="{r}"><title>{escaped(title)}</title></circle>'
        )

    def whisker(self, low: float, high: float, y: float, style: str) -> None:
        """A horizontal interval with ends."""
        (a, v), (b, _) = self.at(low, y), self.at(high, y)
        self.parts.append(
            f'<path class="line {style}" d="M{a} {v}H{b}M{a} {round(v - 5, 1)}v10M{b} {round(v - 5, 1)}v10"/>'
        )

    def bar(self, x: tuple[float, float], y: tuple[float, float], style: str, title: str) -> None:
        """A filled rectangle from (x[0], y[0]) to (x[1], y[1])."""
        (u, v), (right, top) = self.at(x[0], y[0]), self.at(x[1], y[1])
        size = f'width="{round(right - u, 1)}" height="{round(v - top, 1)}"'
        self.parts.append(f'<rect class="bar {style}" x="{u}" y="{top}" {size}><title>{escaped(title)}</title></rect>')

    def __str__(self) -> str:
        return picture(self.parts, self.description, WIDTH, self.height)


def picture(parts: Iterable[str], description: str, width: float, height: float, *, role: str = "img") -> str:
    """Parts as one SVG with a description."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="{role}" aria-label="{escaped(description)}">'
        f"{''.join(parts)}</svg>"
    )
