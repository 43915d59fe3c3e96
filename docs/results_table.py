"""Writes the tables that come from docs/results/*.json into README.md and the pages, between their markers.

    python docs/results_table.py

A marker is ``<!-- KIND … -->``; the table reaches to the next ``<!-- end -->``. ``glance`` has a row for each line of
``GLANCE`` whose JSON file is there and has that row, ``glance 5`` the first five. ``systems FILE COLUMN`` and
``differences FILE COLUMN`` show a table of the paper, ``study FILE COLUMN`` a study. ``tests/test_docs.py`` holds pages
and JSON together.
"""

import json
import re
from pathlib import Path
from statistics import mean

from l2g_meta.paper.published import EXPERIMENTS

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", DOCS / "results.md", DOCS / "paper-tables.md", DOCS / "notebook.md")
TABLE = re.compile(r"<!-- ((?:glance|systems|differences|study)[^\n]*) -->\n(.*?)<!-- end -->", re.DOTALL)
TIMED = "table1-small-time.json"  # has updates of L2G and of each base, timed in turn

SAME, ONE = "same tasks", "one task per update, as in the paper"
LONG, PRE = "length-long.json", "finetune-finetune.json"

# (what L2G is, what its base gets, file, column, row, base)
GLANCE = (
    ("Algorithm 1, 8,000 updates", ONE, LONG, "5w1s", "l2g-proto", "proto"),
    ("Algorithm 1, 8,000 updates", SAME, LONG, "5w1s", "l2g-proto", "proto-tasks"),
    ("Algorithm 1, 8,000 updates", "same time", LONG, "5w1s", "l2g-proto", "proto-time"),
    ("mix 0.5, α = 0.003, 8,000 updates", SAME, LONG, "5w1s", "l2g-mix-0.5-0.003", "proto-tasks"),
    ("Algorithm 1, 8,000 updates, 5-shot", SAME, LONG, "5w5s", "l2g-proto", "proto-tasks"),
    ("mix 0.5, α = 0.003, 8,000 updates, 5-shot", SAME, LONG, "5w5s", "l2g-mix-0.5-0.003", "proto-tasks"),
    *(
        (f"{what}, from a pre-trained encoder{shots}", base_gets, PRE, column, row, base)
        for column, shots in (("5w1s", ""), ("5w5s", ", 5-shot"))
        for base_gets, base in ((SAME, "proto-tasks"), ("no training", "start"))
        for what, row in (("Algorithm 1", "l2g-proto"), ("mix 0.5, α = 0.003", "l2g-mix-0.5-0.003"))
    ),
    ("Algorithm 1", SAME, "parts-confirm.json", "5w1s", "l2g-proto", "proto-tasks"),
    ("mix 0.5", SAME, "parts-confirm.json", "5w1s", "l2g-mix-0.5", "proto-tasks"),
    ("mix 0.5, α = 0.003", SAME, "parts-confirm.json", "5w1s", "l2g-mix-0.5-0.003", "proto-tasks"),
    ("Algorithm 1", "same time", TIMED, "5w1s", "l2g-proto", "proto-time"),
    ("Algorithm 1", ONE, "table1-small.json", "5w1s", "l2g-proto", "proto"),
    ("Algorithm 1, Relation Network", SAME, "table1-small.json", "5w1s", "l2g-relation", "relation-tasks"),
    ("mix 0.5, 5-shot", SAME, "tasks-confirm.json", "5w5s", "l2g-mix-0.5", "proto-tasks"),
    ("mix 0.5, α = 0.003, glyphs", SAME, "far-classes-confirm.json", "5w1s", "l2g-mix-0.5-0.003", "proto-tasks"),
    ("Algorithm 1, any-shot", SAME, "table3-small.json", "any-shot", "l2g-proto-fixed", "proto-tasks"),
    ("Algorithm 1, any-way", SAME, "table3-small.json", "any-way", "l2g-proto-fixed", "proto-tasks"),
    ("Algorithm 1, any-way any-shot", SAME, "table3-small.json", "any-both", "l2g-proto-fixed", "proto-tasks"),
    ("Algorithm 1, part of tieredImageNet", SAME, "table2-small.json", "5w1s", "l2g-proto", "proto-tasks"),
)


def load(file):
    return json.loads((DOCS / "results" / file).read_text(encoding="utf-8"))


def part_of(file, column):
    """The data set of a table, and its rows by their names, those that were trained."""
    (part,) = (part for part in load(file)["tables"] if part["column"] == column)
    return part["data"], {row["row"]: row for row in part["rows"] if row["seeds"]}


def table(head, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def number(value, digits=2, sign=""):
    return "" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")  # no −0


def plus_minus(value, digits=2):
    return "" if value is None else f" ± {value:.{digits}f}"


def difference(found, *, each=False):
    """``−3.07 ± 1.64 (3 seeds) [± 0.35]``: over seeds, then over test episodes; ``each`` lists the seeds' own."""
    n = len(found["runs"])
    seeds = ", ".join(number(run, sign="+") for run in found["runs"]) if each else f"{n} seed{'s' * (n > 1)}"
    over = plus_minus(found["ci95_runs"])
    inside = "" if each and n == 1 else f" ({seeds})"
    return f"{number(found['mean'], sign='+')}{over}{inside} [±{plus_minus(found['ci95_episodes'])[2:]}]"


def task_time(file, row):
    """Seconds of an L2G task / of a base's, from updates timed in turn, in its file or ``TIMED``; or none."""
    for timed in (file,) if file == PRE else (file, TIMED):  # TIMED has another encoder
        for part in load(timed)["tables"]:
            seeds = [seed for other in part["rows"] for seed in other.get("equal_time") or () if seed is not None]
            if found := [seed["ratio"] for seed in seeds if seed["of"] == row]:
                return mean(found)
    return None


def cost(file, row, base):
    """Time of training divided by the base's; the time itself where the base has no training.

    From updates timed in turn, or for other encoders than were timed, ``≈``, from the logs.
    """
    if not any(base["updates"]):
        return f"{mean(row['seconds']) / 3600:.1f} h"
    head = "relation" if "relation" in row["row"] else "proto"
    if (of_task := task_time(file, f"l2g-{head}")) is None:
        return f"≈ {mean(row['seconds']) / mean(base['seconds']):.1f}×"
    ratio = of_task * mean(row["tasks"]) / mean(base["tasks"])
    return f"{ratio:.{0 if ratio >= 9.5 else 1}f}×"


def known(line):
    """Whether its row and base were trained, and tested with a common seed."""
    *_, file, column, row, base = line
    if not (DOCS / "results" / file).exists() or column not in {part["column"] for part in load(file)["tables"]}:
        return False
    return base in part_of(file, column)[1].get(row, {}).get("against", ())


def published(data, column, row):
    """The paper's accuracy; ``None`` where it has none."""
    for experiment in EXPERIMENTS.values():
        if data in experiment.data and column in experiment.columns and row in experiment.paper:
            return experiment.paper[row][experiment.columns.index(column)]
    return None


def glance(count="99"):
    lines = []
    for what, against, file, column, name, base_name in list(filter(known, GLANCE))[: int(count)]:
        data, rows = part_of(file, column)
        row, base, bn = rows[name], rows[base_name], rows[name]["published_bn"]
        head = "relation" if "relation" in name else "proto"
        paper, paper_base = (None if file == PRE else published(data, column, of) for of in (name, head))
        ahead = "" if paper is None or paper_base is None else f"{paper:.2f} ({number(paper - paper_base, sign='+')})"
        gain = difference(row["against"][base_name][bn])
        accuracies = [number(of[bn]["accuracy_mean"]) for of in (row, base)]
        lines.append([what, against, *accuracies, gain, cost(file, row, base), ahead])
    return table(["L2G", "base gets", "L2G, %", "base, %", "L2G − base", "time", "paper (its lead)"], lines)


def systems(file, column):
    """Every system of a table of the paper."""
    lines = []
    for row in part_of(file, column)[1].values():
        found = {bn: row[bn] for bn in ("running", "batch")}
        cells = {bn: f"{f['accuracy_mean']:.2f}{plus_minus(f['ci95_episodes'])}" for bn, f in found.items()}
        cells[row["published_bn"]] = f"**{cells[row['published_bn']]}**"
        over_seeds = "" if row["seeds"] == 1 else plus_minus(row[row["published_bn"]]["ci95_runs"]).strip()
        counts = [f"{mean(row[of]):,.0f}" for of in ("updates", "tasks", "seconds")]
        lines.append([row["title"], *cells.values(), over_seeds, number(row["paper"]), *counts])
    head = ["system", "inductive", "transductive", "over seeds", "paper", "updates", "tasks", "s / seed"]
    return table(head, lines)


def differences(file, column):
    """L2G and MAML + X against their bases."""
    rows = part_of(file, column)[1]
    lines = [
        [row["title"], rows[other]["title"], *(difference(found[bn], each=True) for bn in ("running", "batch"))]
        for row in rows.values()
        for other, found in row["against"].items()
    ]
    return table(["system", "minus", "inductive", "transductive"], lines)


def study(file, column):
    """Rows of a study, each beside its first base."""
    rows = part_of(file, column)[1]
    lines = []
    for name, row in rows.items():
        base = next(iter(row["against"]), None)
        gain = "" if base is None else difference(row["against"][base]["running"], each=True)
        gain += "" if base in (None, next(iter(rows))) else f" against `{base}`"
        accuracies = [number(row[bn]["accuracy_mean"]) for bn in ("running", "batch")]
        measured = [number(row["alignment"], 4), number(row["cosine"], 3), f"{mean(row['seconds']):.0f}"]
        lines.append([f"`{name}`", row["title"], *accuracies, gain, *measured])
    head = ["row", "system", "inductive", "transductive", "row − base", "alignment", "cosine", "s"]
    return table(head, lines)


def rewritten(text):
    """A page with its tables as the JSON has them."""
    kinds = {f.__name__: f for f in (glance, systems, differences, study)}

    def fill(match):
        kind, *arguments = match[1].split()
        return f"<!-- {match[1]} -->\n\n{kinds[kind](*arguments)}\n\n<!-- end -->"

    return TABLE.sub(fill, text)


def main():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(rewritten(text), encoding="utf-8")
        print(f"{page.relative_to(DOCS.parent)}: {len(TABLE.findall(text))} tables")


if __name__ == "__main__":
    main()
