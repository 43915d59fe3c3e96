"""Draws what cells of ``l2g reproduce`` do while they train, finished or not: figure 2 of the paper, and more.

    python docs/training_curves.py curves DIR       # validation accuracy against tasks and seconds; where rows cross
    python docs/training_curves.py states DIR       # loss on test classes at equal loss on training classes; alignment

DIR is the ``--out`` of ``l2g reproduce``; its CSV file, or ``states``' own, does as well.
Pictures (SVG) and the CSV of ``states`` stand in ``--out``; tables are printed as Markdown. ``states`` goes on where it
stopped.
"""

import argparse
import csv
import io
import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2g_meta.data.pairs import TaskPairs
from l2g_meta.evaluation.alignment import alignment
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.paper.cells import ALIGNED_SEED
from l2g_meta.paper.plan import SCALES, plan
from l2g_meta.paper.published import COLUMNS
from l2g_meta.paper.study import EXPERIMENTS, ROWS
from l2g_meta.paper.tables import curve
from l2g_meta.training.build import build_data, load_run
from l2g_meta.training.config import Config

INK = ("#1f2328", "#f0f6fc")  # on light and on dark
SERIES = (
    ("#59636e", "#9198a1"), ("#0969da", "#4493f8"), ("#8250df", "#ab7df8"), ("#bc4c00", "#db6d28"),
    ("#1a7f37", "#3fb950"), ("#bf3989", "#db61a2"), ("#9a6700", "#d29922"),
)  # fmt: skip
MARKERS = "so^vD<>"
STATES = ("data", "column", "row", "seed", "updates", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
          "train_cosine", "test_cosine", "train_slope", "test_slope")  # fmt: skip


def begun(args):
    """Cells of an experiment whose training has begun."""
    columns = EXPERIMENTS[args.experiment].columns
    what = plan(args.experiment, args.scale, args.dir, root=".", columns=columns, seeds=32, weights=".")
    return [cell for cell in what.cells if cell.begun]


def lines_of(path):
    """Lines of a CSV file; none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_table(lines, *names):
    """(data, column) -> row -> seed -> an array with a line for each of ``names``."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        numbers = [float(line[name]) for name in names]
        found[line["data"], line["column"]][line["row"]][int(line["seed"])].append(numbers)
    order = list(ROWS)
    return {
        part: {
            row: {seed: np.array(sorted(points)).T for seed, points in sorted(seeds.items())}
            for row, seeds in sorted(rows.items(), key=lambda item: order.index(item[0]))
        }
        for part, rows in found.items()
    }


def table(head, lines):
    print("\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)), end="\n\n")


# Curves


def curves(args):
    """The paper's figure 2, and where rows cross."""
    if args.dir.is_file():
        lines = lines_of(args.dir)
    else:
        lines = [line for cell in begun(args) if (cell.folder / "log.csv").exists() for line in curve(cell)]
    tables = by_table(lines, "updates", "tasks", "seconds", "val_accuracy")
    figure, axes = panels(len(tables))
    for (part, rows), (left, right) in zip(tables.items(), axes, strict=True):
        for k, (row, seeds) in enumerate(rows.items()):
            for axis, x in ((left, 1), (right, 2)):
                band(axis, k, row, seeds, x, 3)
        left.set(xlabel="tasks seen", ylabel="validation accuracy, %", title=titled(part))
        right.set(xlabel="seconds of training", title="mean and range of seeds")
        print(f"### {titled(part)}: where curves cross\n")
        crossings(rows)
    write_svg(figure, args, "curves")


def crossings(rows):
    """For each row and base, seed by seed: who is ahead at last, since when, and after how many crossings."""
    lines = []
    for row, base in itertools.product(rows, rows):
        if base in ROWS[row].against:
            pairs = [(seed, rows[row][seed], rows[base][seed]) for seed in rows[row] if seed in rows[base]]
            by = ["; ".join(f"seed {seed}: {lead(a, b, x)}" for seed, a, b in pairs) for x in (1, 2)]
            lines.append([f"`{row}`", f"`{base}`", *by])
    table(["row", "against", "by tasks", "by seconds"], lines)


def lead(a, b, x):
    """In words, over what both have seen.

    Example:
        >>> a, b = np.array([[0, 10, 20], [10.0, 20.0, 40.0]]), np.array([[0, 10, 20], [20.0, 25.0, 30.0]])
        >>> lead(a, b, 0)
        'ahead from 13 on, of 20 (1 crossing)'
    """
    first, last = max(a[x][0], b[x][0]), min(a[x][-1], b[x][-1])
    if first >= last:
        return "nothing in common"
    at = np.unique(np.clip(np.concatenate([a[x], b[x]]), first, last))
    gap = np.interp(at, a[x], a[-1]) - np.interp(at, b[x], b[-1])
    changes = [k for k in range(len(gap) - 1) if gap[k] * gap[k + 1] < 0 or (gap[k] == 0 and k)]
    who = "ahead" if gap[-1] > 0 else "behind"
    if not changes:
        return f"{who} all along, to {last:,.0f}"
    k = changes[-1]
    where = at[k] + (at[k + 1] - at[k]) * gap[k] / (gap[k] - gap[k + 1])
    return f"{who} from {where:,.0f} on, of {last:,.0f} ({len(changes)} crossing{'s' * (len(changes) > 1)})"


# States


def states(args):
    """Test-class loss at equal training-class loss, and the alignment on test classes."""
    path = args.dir if args.dir.is_file() else measured(args)
    tables = by_table(lines_of(path), "updates", "train_loss", "test_loss", "test_cosine")
    figure, axes = panels(len(tables))
    for (part, rows), (left, right) in zip(tables.items(), axes, strict=True):
        for k, (row, seeds) in enumerate(rows.items()):
            for points in seeds.values():
                left.plot(
                    points[1], points[2], **look(k), lw=1, label=row if points is next(iter(seeds.values())) else "_"
                )
            band(right, k, row, seeds, 0, 3)
        left.set(xlabel="loss on training classes", ylabel="loss on test classes", title=titled(part))
        left.invert_xaxis()
        right.set(xlabel="updates", ylabel="cosine of $g_i$ and $g_j$, test classes", title="mean and range of seeds")
        print(f"### {titled(part)}: loss on test classes at equal loss on training classes, mean and range of seeds\n")
        at_equal_loss(rows)
    write_svg(figure, args, "states")


def measured(args):
    """The CSV file of all kept states, after adding a line for each that has none yet."""
    path, data = named(args, "states", "csv"), {}
    known = {tuple(line[name] for name in STATES[:5]) for line in lines_of(path)}
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, STATES)
        if not known:
            writer.writeheader()
        for cell in begun(args):
            config = Config.load(cell.folder / "config.json")
            config = replace(config, root=args.data_root or config.root)
            for n in sorted(int(p.stem[6:]) for p in cell.folder.glob("after-*.safetensors") if p.stem[6:].isdigit()):
                of_state = cell.data, cell.column, cell.row, str(cell.seed), str(n)
                if of_state not in known:
                    data = data or {split: build_data(config, split) for split in ("train", "test")}
                    writer.writerow(dict(zip(STATES, of_state, strict=False)) | state(args, cell, n, data))
                    file.flush()
    return path


def state(args, cell, n, data):
    """What a state's weights give on training and test classes, under θ."""
    wrapper, _ = load_run(cell.folder, checkpoint=f"after-{n}", device="cpu")
    column, found = COLUMNS[cell.column], {}
    sizes = {"ways": column.ways[0], "shots": column.shots[0], "queries": SCALES[args.scale].test_queries}
    for split, dataset in data.items():
        result = evaluate(wrapper, dataset, **sizes, episodes=args.episodes, device="cpu")
        aligned = alignment(wrapper, TaskPairs(dataset, **sizes, seed=ALIGNED_SEED, device="cpu"), args.pairs)
        values = dict(loss=result.loss_mean, accuracy=result.accuracy_mean, cosine=aligned.cosine, slope=aligned.slope)
        found |= {f"{split}_{name}": f"{value:.5f}" for name, value in values.items()}
    return found


def at_equal_loss(rows, n=8):
    """A table: what each row's loss on test classes is where that on training classes first reaches a level."""
    found = [points[1] for seeds in rows.values() for points in seeds.values()]
    levels = np.linspace(max(map(np.max, found)), min(map(np.min, found)), n + 2)[1:-1]
    lines = []
    for row, seeds in rows.items():
        reached = np.array([[reaching(level, p[1], p[2]) for level in levels] for p in seeds.values()])
        cells = (f"{r.mean():.3f} [{r.min():.3f}, {r.max():.3f}]" if np.isfinite(r).all() else "" for r in reached.T)
        lines.append([f"`{row}`", *cells])
    table(["row", *(f"{level:.3f}" for level in levels)], lines)


def reaching(level, falls, other):
    """``other`` where ``falls`` first is at a level, or NaN.

    Example:
        >>> reaching(1.5, np.array([2.0, 1.0, 1.8, 0.5]), np.array([3.0, 2.0, 9.0, 1.0]))
        2.5
    """
    k = int(np.argmax(falls <= level))
    if k == 0:  # it begins below, or never comes there
        return float("nan")
    return float(np.interp(level, [falls[k], falls[k - 1]], [other[k], other[k - 1]]))


# Pictures


def titled(part):
    data, column = part
    return f"{data}, {COLUMNS[column].title}"


def look(k):
    return {"color": SERIES[k % len(SERIES)][0], "marker": MARKERS[k % len(MARKERS)], "markersize": 3.5}


def band(axis, k, row, seeds, x, y):
    """The mean over the seeds that have come to each point, and their range."""
    updates = np.unique(np.concatenate([points[0] for points in seeds.values()]))
    inside = {"left": np.nan, "right": np.nan}
    of_seeds = [[np.interp(updates, p[0], p[at], **inside) for at in (x, y)] for p in seeds.values()]
    at, mean = np.nanmean(of_seeds, axis=0)
    low, high = (f([values for _, values in of_seeds], axis=0) for f in (np.nanmin, np.nanmax))
    n = len(seeds)
    axis.plot(at, mean, **look(k), lw=1.6, label=f"{row} ({n} seed{'s' * (n > 1)})")
    axis.fill_between(at, low, high, color=SERIES[k % len(SERIES)][0], alpha=0.18, lw=0)


def panels(n):
    """A figure with n rows of two axes, transparent, in inks that the page's mode chooses."""
    ink = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK[0])
    matplotlib.rcParams.update(ink | {"svg.fonttype": "none", "svg.hashsalt": "l2g", "font.size": 10})
    figure = Figure(figsize=(10, 4.2 * max(n, 1)), layout="constrained")
    axes = figure.subplots(max(n, 1), 2, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.patch.set_alpha(0)
    return figure, axes[:n]


def write_svg(figure, args, kind):
    """The figure, whose colours follow light and dark mode."""
    for left, _ in np.reshape(figure.axes, (-1, 2)):
        left.legend(frameon=False, fontsize=9)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg, names = text.getvalue(), {}
    for k, pair in enumerate((INK, *SERIES)):
        svg, names[f"--c{k}"] = svg.replace(pair[0], f"var(--c{k})"), pair
    light, dark = ("; ".join(f"{name}: {pair[mode]}" for name, pair in names.items()) for mode in (0, 1))
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    path = named(args, kind, "svg")
    path.write_text(svg.replace("<defs>", f"{style}<defs>", 1), encoding="utf-8")
    print(path)


def named(args, kind, suffix):
    folder = args.out or (args.dir.parent if args.dir.is_file() else args.dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{args.experiment}-{args.scale}-{kind}.{suffix}"


def arguments(parser, default):
    """The arguments that the scripts share, read."""
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--experiment", default=default, choices=tuple(EXPERIMENTS), help=f"(default: {default})")
    parser.add_argument("--scale", choices=tuple(SCALES), help="(default: long for length, or that of its name)")
    args = parser.parse_args()
    args.scale = args.scale or {"length": "long"}.get(args.experiment, args.experiment)
    return args


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("curves", "states"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of what it writes (default: DIR)")
    parser.add_argument("--data-root", metavar="DATA", help="states: where the data lies, if not as in the run")
    parser.add_argument("--episodes", type=int, default=600, help="states: of each split (default: 600)")
    parser.add_argument("--pairs", type=int, default=100, help="states: of tasks, for the alignment (default: 100)")
    args = arguments(parser, "length")
    {"curves": curves, "states": states}[args.what](args)


if __name__ == "__main__":
    main()
