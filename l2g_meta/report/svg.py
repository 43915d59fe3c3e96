"""Small charts as SVG; colours are classes of the page's style (``k0`` … ``k9``), so that they fit its scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

from markupsafe import Markup

COLOURS = 10  # classes k0 … k9
WIDTH, HEIGHT = 380, 270  # units of a chart, about the pixels of a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40


def colour(i: int) -> str:
    """Class of the i-th colour."""
    return f"k{i % COLOURS}"


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


def picture(description: str, width: float, height: float, *, role: str = "img") -> ET.Element:
    """An empty SVG with a description for readers who do not see it."""
    return ET.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": role, "aria-label": description})


def add(
    parent: ET.Element, tag: str, style: str = "", *, text: str = "", title: str = "", **attributes: object
) -> None:
    """Adds an element of a class of the page's style; ``title`` shows itself to those who stop over it."""
    child = ET.SubElement(parent, tag, {"class": style} if style else {})
    child.text = text
    for name, value in attributes.items():
        child.set(name.replace("_", "-"), str(round(value, 1) if isinstance(value, float) else value))
    if title:
        ET.SubElement(child, "title").text = title


def markup(svg: ET.Element) -> Markup:
    """As HTML has it, with all text escaped."""
    return Markup(ET.tostring(svg, encoding="unicode"))  # noqa: S704  # ElementTree escapes


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
        self.x, self.y = x, y
        self.svg = picture(description, WIDTH, height)
        self.box = left, top, right, bottom = LEFT, TOP + (14 if ylabel else 0), WIDTH - RIGHT, height - BOTTOM
        for value in ticks(*x):
            u, _ = self.at(value, y[0])
            self._path("grid", f"M{u} {top}V{bottom}")
            self._text(u, bottom + 14, short(value), "middle")
        numbers = [] if ynames else ticks(max(y[0], yfirst), y[1])
        for value in numbers:
            self._path("grid", f"M{left} {self.at(x[0], value)[1]}H{right}")
        for at, name in [*enumerate(ynames), *zip(numbers, map(short, numbers), strict=True)]:
            self._text(left - 6, self.at(x[0], at)[1] + 4, name, "end")
        self._path("axis", f"M{left} {top}V{bottom}H{right}")
        self._text((left + right) / 2, height - 6, xlabel, "middle")
        if ylabel:
            self._text(4, 13, ylabel, "start")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in units."""
        left, top, right, bottom = self.box
        u = left + (right - left) * (x - self.x[0]) / max(self.x[1] - self.x[0], 1e-12)
        v = bottom - (bottom - top) * (y - self.y[0]) / max(self.y[1] - self.y[0], 1e-12)
        return round(u, 1), round(v, 1)

    def line(self, x: Iterable[float], y: Iterable[float], style: str) -> None:
        """A line through the points that are numbers."""
        self._outline(f"line {style}", zip(x, y, strict=True))

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], style: str) -> None:
        """The area between two lines."""
        points = [p for p in zip(x, low, high, strict=True) if all(map(math.isfinite, p))]
        if len(points) > 1:
            below, above = [(a, b) for a, b, _ in points], [(a, c) for a, _, c in reversed(points)]
            self._outline(f"band {style}", below + above, end="Z")

    def dot(self, x: float, y: float, style: str, title: str, *, r: float = 3.5) -> None:
        """A point with a text for those who stop over it."""
        u, v = self.at(x, y)
        add(self.svg, "circle", f"dot {style}", title=title, cx=u, cy=v, r=r)

    def whisker(self, low: float, high: float, y: float, style: str) -> None:
        """A horizontal interval with ends."""
        (a, v), (b, _) = self.at(low, y), self.at(high, y)
        self._path(f"line {style}", f"M{a} {v}H{b}M{a} {v - 5:.1f}v10M{b} {v - 5:.1f}v10")

    def bar(self, x: tuple[float, float], y: tuple[float, float], style: str, title: str) -> None:
        """A filled rectangle from (x[0], y[0]) to (x[1], y[1])."""
        (u, v), (right, top) = self.at(x[0], y[0]), self.at(x[1], y[1])
        add(self.svg, "rect", f"bar {style}", title=title, x=u, y=top, width=right - u, height=v - top)

    def _outline(self, style: str, points: Iterable[tuple[float, float]], end: str = "") -> None:
        places = [self.at(*point) for point in points if all(map(math.isfinite, point))]
        if places:
            self._path(style, "M" + "L".join(f"{u} {v}" for u, v in places) + end)

    def _path(self, style: str, d: str) -> None:
        add(self.svg, "path", style, d=d)

    def _text(self, u: float, v: float, text: str, anchor: str) -> None:
        add(self.svg, "text", text=text, x=u, y=v, text_anchor=anchor)

    def __html__(self) -> str:
        """What a template shows of it."""
        return markup(self.svg)
