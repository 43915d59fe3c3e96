"""``l2g report``: a page to look at, of one run or several."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cli.flags import given, positive
from l2g_meta.cli.output import add_output, check_place, complain, emit
from l2g_meta.cli.runs import add_episodes, add_trust

INTERRUPTED = "no page was written; run it again"
DESCRIPTION = (
    "Tests trained runs and writes one HTML file: accuracies with intervals, settings, learning curves, confusions, "
    "t-SNE, and episodes as pictures. It needs no network."
)
EXAMPLES = """\
l2g report runs/a                                    # report.html: open it in a browser
l2g report runs/l2g-* runs/episodic-* -o both.html   # seeds of one experiment are taken together
l2g report runs/a --episodes 100 --classes 5 --root DIR"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add = parser.add_argument
    add("run", nargs="+", type=Path, metavar="RUN", help="run directory; those that differ in their seed alone are "
         "shown as one experiment")  # fmt: skip
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    add_episodes(parser, "of each run")
    add("--classes", type=positive, metavar="N", default=10, help="hard classes shown (default: 10)")
    add("--root", metavar="DIR", help="folder of the data, if it has moved since training")
    add("--device", metavar="NAME", help="auto, cpu, cuda, … (default: as trained)")
    add_trust(parser)
    add_output(parser, json="where the page is and what could not be read or tested")


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns 0, or 1 if something of a run could not be read or tested."""
    from l2g_meta.report.experiments import evaluate_runs
    from l2g_meta.report.measure import ReportOptions
    from l2g_meta.report.page import write_report

    check_place(args.out, "--out")
    report = evaluate_runs(args.run, ReportOptions(**given(args, ReportOptions)))
    size = write_report(report, args.out)
    problems = [f"{r.path}: {problem}" for r in report.runs for problem in r.problems]
    for problem in problems:
        complain(problem)
    print(f"{args.out}: {size / 1000:,.0f} kB, runs: {len(report.runs)}; open it in a browser")
    emit(args, {"out": str(args.out), "bytes": size, "problems": problems})
    return 1 if problems else 0
