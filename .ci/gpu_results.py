"""What `make gpu` found: what has to hold, the table, the exit code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

STOCK = "l2g, own network, stock operators"
CASES = ("conv4", 5), ("conv4", 1), ("resnet12", 5), ("resnet12", 1)


def skipped(step: dict[str, Any]) -> list[str]:
    """A line for each reason for which tests of a step were skipped."""
    return [f"{s['tests']} skipped{', as expected' * s['expected']}: {s['reason']}" for s in step["skips"]]


def musts(out: Path) -> list[dict[str, Any]]:
    """What has to hold on a GPU: each with its value, and whether it holds; both ``None`` where it was not measured."""
    found: list[tuple[str, str, float | None, float]] = []
    for backbone, pairs in CASES:
        step, case = f"bench-eager-{backbone}-{pairs}", f"{backbone}, pairs: {pairs}"
        rows = _rows(path := out / f"{step}.json")
        own, stock = (rows.get(name, {}).get("seconds") for name in ("l2g", STOCK))
        ratio = rows.get("l2g", {}).get("ratio_to_fastest")
        found.append((step, f"{case}: exact step / two fastest plain episodes", ratio, 2.2))
        if pairs == 5:
            faster = own / stock if own and stock else None
            found.append((step, f"{case}: exact step / the same on PyTorch's layers and operators", faster, 0.5))
        found.append((step, f"{case}: data / exact step", own and _read(path)["data"]["seconds"] / own, 0.05))
    return [
        {"step": step, "what": what, "value": value, "most": most, "holds": None if value is None else value <= most}
        for step, what, value, most in found
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def verdict(found: dict[str, Any]) -> str:
    """How many steps ended how, and how many musts hold."""
    steps, holds = Counter(step["status"] for step in found["steps"]), Counter(m["holds"] for m in found["musts"])
    line = "Steps: " + ", ".join(f"{n} {status}" for status, n in steps.items()) + ". Musts: "
    if found["tiny"] or not holds[True] + holds[False]:
        return line + ("not judged." if found["tiny"] else "none measured.")
    return line + f"{holds[True]} hold, {holds[False]} do not, {holds[None]} not measured."


def summary(found: dict[str, Any], out: Path) -> str:
    """All of it as Markdown."""
    judged, machine = not found["tiny"], found["machine"]
    lines = [f"# {', '.join(machine['gpus']) or 'CPU'}, PyTorch {machine['torch']}", ""]
    lines += [] if judged else ["A dry run on a CPU: it judges nothing of a GPU.", ""]
    ours = "ours" if found["L2G_FAST_CUDA"] == "1" else "PyTorch's own"
    lines += [verdict(found), "", f"Operators on CUDA: {ours} (L2G_FAST_CUDA={found['L2G_FAST_CUDA']}).", ""]
    lines += [*(f"- {line}" for line in found["missing"]), "", "| step | status | s | last line |", "|---|---|---|---|"]
    lines += [
        f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {s['note'].replace('|', '/')} |" for s in found["steps"]
    ]
    lines += ["", *(f"- {step['name']}: {line}" for step in found["steps"] for line in skipped(step))]
    lines += ["", "| must | at most | measured | |", "|---|---|---|---|"]
    for must in found["musts"]:
        holds = {True: "pass", False: "FAIL", None: "not measured"}[must["holds"]] if judged else "not judged"
        lines.append(f"| {must['what']} | {must['most']} | {_number(must['value'], 3)} | {holds} |")
    lines += ["", "| bench | row | ms | to two fastest episodes |", "|---|---|---|---|"]
    for path in sorted(out.glob("bench-*.json")):
        for title, row in _rows(path).items():
            lines.append(f"| {path.stem} | {title} | {1e3 * row['seconds']:.2f} | {_number(row['ratio_to_fastest'])} |")
    if evaluated := _read(out / "evaluate.json"):
        lines += ["", f"Trained on glyphs, tested on unseen classes: {evaluated['accuracy_mean']:.2f} %"]
    return "\n".join(lines) + "\n"


def _rows(path: Path) -> dict[str, Any]:
    return {row["name"]: row for row in _read(path).get("rows", [])}


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def exit_code(found: dict[str, Any]) -> int:
    """1 where a step broke, or a must of a step that ran does not hold or was not measured."""
    whole = {"passed", "partly", "skipped"} | ({"left out"} if found["tiny"] else set())
    ran = {step["name"]: step["status"] in whole for step in found["steps"]}
    held = found["tiny"] or all(must["holds"] for must in found["musts"] if must["step"] in ran)
    return int(not (held and all(ran.values())))
