"""Tables of an experiment: ours beside the paper's, differences over the same episodes, and what it cost."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from l2g_meta.files.writing import write_text
from l2g_meta.models.batchnorm_policy import POLICIES, Policy
from l2g_meta.models.functional import confidence_interval
from l2g_meta.paper.cells import write_json
from l2g_meta.paper.plan import SCALES, Cell, Plan
from l2g_meta.paper.published import COLUMNS
from l2g_meta.paper.published import ROWS as PAPER
from l2g_meta.paper.study import EXPERIMENTS, ROWS, START, STUDIES
from l2g_meta.training.log import read_log


def write_tables(plan: Plan) -> Path:
    """Writes ``<experiment>-<scale>.json``, ``.csv`` and ``.md`` of the cells that are done; returns the last one.

    Also of rows, columns and seeds that an earlier command for this folder brought to an end.
    """
    spec = EXPERIMENTS[plan.experiment]
    known = (*spec.rows, *plan.rows, *(PAPER if plan.experiment.startswith("table") else ()))
    seeds = max(plan.seeds, SCALES[plan.scale].seeds)
    everything = replace(plan, rows=tuple(dict.fromkeys(known)), columns=spec.columns, seeds=seeds)
    found = [cell for cell in everything.cells if cell.done]
    rows, columns = {*plan.rows, *(cell.row for cell in found)}, {*plan.columns, *(cell.column for cell in found)}
    plan = replace(
        plan,
        rows=tuple(row for row in everything.rows if row in rows),
        columns=tuple(column for column in spec.columns if column in columns),
        seeds=max([plan.seeds, *(cell.seed + 1 for cell in found)]),
    )
    values = tables(plan)
    path = plan.out / f"{plan.experiment}-{plan.scale}.md"
    write_json(path.with_suffix(".json"), values)
    file = StringIO(newline="")
    writer = csv.DictWriter(file, CURVE)
    writer.writeheader()
    writer.writerows(line for cell in plan.cells if cell.done for line in curve(cell))
    write_text(path.with_suffix(".csv"), file.getvalue())
    write_text(path, markdown(values))
    return path


CURVE = ("data", "column", "row", "seed", "updates", "tasks", "seconds", "loss", "val_loss", "val_accuracy", "val_ci95")


def curve(cell: Cell) -> Iterator[dict[str, Any]]:
    """A cell's log at its validations: tasks and seconds so far, and the mean training loss since the last one."""
    of_cell: dict[str, Any] = {"data": cell.data, "column": cell.column, "row": cell.row, "seed": cell.seed}
    tasks, seconds, losses = 0, 0.0, []
    for line in read_log(cell.folder):
        tasks, seconds = tasks + int(line["tasks"]), seconds + float(line["seconds"])
        losses.append(float(line["loss"] or "nan"))
        if line["val_accuracy"]:
            of_cell |= {"updates": line["iteration"], "tasks": tasks, "seconds": f"{seconds:.1f}"}
            of_cell |= {"loss": f"{np.nanmean(losses):.4f}"}
            yield of_cell | {name: f"{float(line[name] or 'nan'):.4f}" for name in CURVE[-3:]}
            losses = []


def tables(plan: Plan) -> dict[str, Any]:
    """All that the Markdown shows, and each trained model's accuracies, as a dictionary that ``json`` takes."""
    spec, scale = EXPERIMENTS[plan.experiment], SCALES[plan.scale]
    results = {cell: cell.result for cell in plan.cells if cell.done}
    parts = []
    for data, column in itertools.product(plan.data, plan.columns):
        here = {cell: result for cell, result in results.items() if (cell.data, cell.column) == (data, column)}
        of_row = {row: [result for cell, result in here.items() if cell.row == row] for row in plan.rows}
        at = spec.columns.index(column)
        paper = {} if scale.data else {row: numbers[at] for row, numbers in spec.paper.items()}
        parts.append({
            "data": data,
            "classes": next((result["classes"] for cell, result in results.items() if cell.data == data), None),
            "column": column,
            "title": COLUMNS[column].title,
            "rows": [_summary(row, of_row[row], paper.get(row), of_row) for row in plan.rows],
        })  # fmt: skip
    return {
        "experiment": plan.experiment,
        "scale": plan.scale,
        "title": f"{spec.title}, {plan.scale}",
        "budget": scale.title,
        "seeds": plan.seeds,
        "test_episodes": scale.test_episodes,
        "machines": sorted({result["machine"] for result in results.values()}),
        "missing": [cell.name for cell in plan.cells if not cell.done],
        "tables": parts,
    }


def _summary(row: str, found: Sequence[dict[str, Any]], paper: float | None, of_row: dict[str, Any]) -> dict[str, Any]:
    spec = ROWS[row]
    summary: dict[str, Any] = {
        "row": row, "title": spec.title, "paper": paper, "published_bn": spec.published, "seeds": len(found),
    }  # fmt: skip
    if not found:
        return summary
    summary |= {
        "updates": [result["updates"] for result in found],
        "tasks": [result["tasks"] for result in found],
        "seconds": [round(result["seconds"], 1) for result in found],
        "config": {k: v for k, v in found[0]["config"].items() if k != "seed"},
    }
    if spec.time_of is not None:
        summary["equal_time"] = [result["equal_time"] for result in found]
    measured: dict[str, list[Any]] = {"alignment": [result.get("alignment") for result in found]}
    measured["cosine"] = [(result.get("held_out") or {}).get("cosine") for result in found]
    summary |= {name: None if None in each else float(np.mean(each)) for name, each in measured.items()}
    for bn in POLICIES:
        episodes = _episodes(found, bn)  # (seeds, episodes)
        means = episodes.mean(1)
        summary[bn] = {
            "accuracy_mean": means.mean().item(),
            "ci95_episodes": _number(confidence_interval(episodes.mean(0).tolist())),
            "ci95_runs": _number(confidence_interval(means.tolist())),
            "run_means": [round(m, 2) for m in means.tolist()],
            "accuracies": [result["tests"][bn]["accuracies"] for result in found],
        }
    others = [other for other in (*spec.against, *START) if other != row]
    gains = {other: {bn: difference(found, of_row.get(other, ()), bn) for bn in POLICIES} for other in others}
    summary["against"] = {other: found for other, found in gains.items() if found["running"]}  # with a common seed
    return summary


def difference(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], bn: Policy) -> dict[str, Any]:
    """Results a − b over the same test episodes, in points, the mean of the seeds that both have; empty without any.

    ``ci95_runs`` is over the seeds' own differences.
    """
    first, second = ({result["config"]["seed"]: result for result in results} for results in (a, b))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return {}
    gains = _episodes([first[s] for s in seeds], bn) - _episodes([second[s] for s in seeds], bn)  # (seeds, episodes)
    return {
        "mean": gains.mean().item(),
        "ci95_episodes": _number(confidence_interval(gains.mean(0).tolist())),
        "ci95_runs": _number(confidence_interval(gains.mean(1).tolist())),
        "runs": [round(g, 2) for g in gains.mean(1).tolist()],
    }


def _episodes(found: Sequence[dict[str, Any]], bn: Policy) -> np.ndarray:
    return np.array([result["tests"][bn]["accuracies"] for result in found])


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def markdown(values: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    loader = PackageLoader("l2g_meta.paper", "")
    templates = Environment(loader=loader, keep_trailing_newline=True)  # noqa: S701  # no HTML
    templates.filters["mean"] = lambda numbers: f"{np.mean(numbers):,.0f}"
    return templates.get_template("tables.md").render(
        values=values,
        study=values["experiment"] in STUDIES,
        columns=COLUMNS,
        titles={name: row.title for name, row in ROWS.items()},
    )
