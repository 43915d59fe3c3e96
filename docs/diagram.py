"""Draws docs/pictures: Algorithm 1, for README, and the rooms of the package: ``python docs/diagram.py``."""

from pathlib import Path

OUT = Path(__file__).parent / "pictures"
ROOMS = (  # each row imports from rows above it, and from rooms to its left
    (("task, errors", "what a task is"), ("files", "reading, writing"), ("operators", "conv, norms")),
    (("inner", "clone, step"), ("algorithm", "Algorithm 1")),
    (("models", "encoders, heads"), ("testing", "laws of heads"), ("data", "pairs, sets")),
    (("evaluation", "accuracy"), ("training", "runs")),
    (("classify", "photos"), ("report", "the page"), ("bench", "speed"), ("paper", "tables")),
    (("cli", "a file a command"),),
)
STYLE = """
  text { font: 15px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; text-anchor: middle }
  .small { font-size: 12.5px; fill: #59636e } .maths { font-family: Georgia, "Times New Roman", serif; font-size: 17px }
  .box { fill: #f6f8fa; stroke: #818b98 } .i { fill: #0969da } .j { fill: #bc4c00 }
  .arrow { fill: none; stroke: #59636e; stroke-width: 1.8 } .back { stroke: #bc4c00; stroke-dasharray: 6 4 }
  .tip { fill: #59636e } .tipback { fill: #bc4c00 } text.i { fill: #0969da } text.j { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .small, .tip { fill: #9198a1 } .box { fill: #151b23; stroke: #656c76 }
    .arrow { stroke: #9198a1 } .i, text.i { fill: #4493f8 } .j, text.j, .tipback { fill: #db6d28 }
    .back { stroke: #db6d28 }
  }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Centred words."""
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, *lines: tuple[str, str]) -> str:
    """A rounded box around (words, kind) lines."""
    top = y + height / 2 - 11 * (len(lines) - 1) + 5
    words = "".join(text(x + width / 2, top + 22 * k, line, kind) for k, (line, kind) in enumerate(lines))
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" class="box"/>{words}'


def arrow(path: str, kind: str = "") -> str:
    """A line with a tip at its end."""
    return f'<path d="{path}" class="arrow {kind}" marker-end="url(#tip{kind})"/>'


def task(x: float, name: str, kind: str, shapes: str) -> str:
    """A task as a row of its classes, each a sign."""
    signs = "".join(
        f'<text x="{x + 34 + 32 * k}" y="65" class="{kind}" style="font-size:21px">{sign}</text>'
        for k, sign in enumerate(shapes)
    )
    return box(x, 14, 196, 64, (name, ""), ("", "")) + signs


def tip(kind: str) -> str:
    """The end of an arrow."""
    return (
        f'<marker id="tip{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" class="tip{kind}"/></marker>'
    )


def algorithm() -> str:
    """Algorithm 1."""
    parts = [
        task(152, "task Tᵢ, five classes", "i", "▲●■◆★"),
        task(512, "task Tⱼ, five others", "j", "✚⬟☾♥☂"),
        box(20, 132, 104, 62, ("weights θ", "")),
        box(176, 132, 148, 62, ("loss L(θ; Tᵢ)", "maths i"), ("of one pass", "small")),
        box(376, 132, 112, 62, ("weights θ′", ""), ("θ − α ∇L", "maths i")),
        box(540, 132, 148, 62, ("loss L(θ′; Tⱼ)", "maths j"), ("new classes", "small")),
        arrow("M124 163H172"),
        arrow("M250 78V128"),
        arrow("M324 163H372"),
        text(348, 153, "step", "small"),
        arrow("M610 78V128"),
        arrow("M488 163H536"),
        arrow("M614 194V232H72V198", "back"),
        text(344, 252, "the gradient of L(θ′; Tⱼ) goes back through the step, exactly", "j"),
    ]
    return svg(parts, 262, "Algorithm 1: one gradient step on a task, judged on a task of other classes")


def rooms() -> str:
    """The rooms of the package, from what all use to what uses all."""
    parts, height = [], 62
    for row, names in enumerate(ROOMS):
        y, width = 12 + row * (height + 26), (680 - 20 * (len(names) - 1)) / len(names)
        for k, (name, what) in enumerate(names):
            kind = "j" if name == "algorithm" else ""
            parts.append(box(20 + k * (width + 20), y, width, height, (name, kind), (what, "small")))
        if row:
            parts.append(arrow(f"M360 {y}V{y - 23}"))
    return svg(parts, 12 + len(ROOMS) * (height + 26), "Rooms of the package: each imports only from rooms above it")


def svg(parts: list[str], height: int, title: str) -> str:
    """The file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}" role="img">'
        f"<title>{title}</title><style>{STYLE}</style><defs>{tip('')}{tip('back')}</defs>{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for draw in (algorithm, rooms):
        (OUT / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")
