"""Pieces of a page that more than one part needs."""

from __future__ import annotations

from collections.abc import Sequence

from l2g_meta.data.pairs import listed
from l2g_meta.evaluation.episodes import Evaluation
from l2g_meta.report.svg import colour, escaped

CLASSES = {
    "test": "unseen classes",
    "validation": "validation classes, which chose the checkpoint",
    "train": "training classes, which the model has seen",
}


def badge(i: int, letter: str) -> str:
    """An experiment's letter on its colour."""
    return f'<span class="badge {colour(i)}">{escaped(letter)}</span>'


def figure(title: str, body: str, caption: str) -> str:
    """A card with a heading (HTML), something to look at (HTML), and a caption (text)."""
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f'<figure class="card"><h3>{title}</h3>{body}{below}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells; the first of each row is its heading.

    Args:
        head: of the columns.
        rows: of cells.
        numbers: columns that are numbers.
    """

    def cell(j: int, text: str, tag: str, scope: str = "") -> str:
        style = ' class="n"' if j in numbers else ""
        return f"<{tag}{style}{scope}>{text}</{tag}>"

    top = "".join(cell(j, text, "th", ' scope="col"') for j, text in enumerate(head))
    lines = []
    for row in rows:
        first = cell(0, row[0], "th", ' scope="row"')
        lines.append(f"<tr>{first}{''.join(cell(j, text, 'td') for j, text in enumerate(row[1:], 1))}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def shape_of(e: Evaluation) -> str:
    """The episodes' shape.

    Example:
        >>> shape_of(Evaluation(50.0, 1.0, None, "running", "test", 5, 1, 15, 2, 1, 0, [50.0], [40.0, 60.0]))
        '5-way 1-shot, 15 queries per class'
    """
    return f"{listed(e.ways)}-way {listed(e.shots)}-shot, {e.queries} queries per class"


def of_episodes(e: Evaluation | None) -> str:
    """What a number is over, and by which BatchNorm statistics.

    Example:
        >>> of_episodes(Evaluation(50.0, 1.0, None, "running", "test", 5, 1, 15, 2, 1, 0, [50.0], [40.0, 60.0]))
        'Over 2 episodes of the test split, 5-way 1-shot, 15 queries per class, BatchNorm running'
    """
    if e is None:
        return "Nothing was tested"
    models = "" if e.ci95_runs is None else f" and {len(e.run_means)} trained seeds"
    return f"Over {e.episodes} episodes{models} of the {e.split} split, {shape_of(e)}, BatchNorm {e.bn}"


def plus_minus(mean: float, half: float, *, sign: bool = False) -> str:
    """A number with its half width.

    Example:
        >>> plus_minus(50, 1.234), plus_minus(2, float("nan"), sign=True)
        ('50.00 ± 1.23', '+2.00')
    """
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return text + (f" ± {half:.2f}" if half == half else "")
