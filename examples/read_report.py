"""Two runs that differ in one thing, and one page about both.

    python examples/read_report.py [--smoke]

From the command line the page is ``l2g report RUN RUN -o report.html``.
"""

import argparse
from pathlib import Path

from l2g_meta.report.experiments import evaluate_runs
from l2g_meta.report.measure import ReportOptions
from l2g_meta.report.page import write_report
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train


def main() -> None:
    """Trains both, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, to see that everything runs")
    smoke = parser.parse_args().smoke
    out = Path("runs/report-smoke" if smoke else "runs/report")

    runs = []
    size = {"iterations": 4, "eval_every": 2, "eval_episodes": 10} if smoke else {"eval_every": 50}
    for method, step in {"episodic": {}, "l2g": {"inner_lr": 0.003, "mix": 0.5}}.items():  # the one thing
        config = Config(method=method, pairs=2, device="cpu", **step, **size)
        runs.append(out / method)
        train(config, runs[-1], resume=runs[-1].exists())

    report = evaluate_runs(runs, ReportOptions(episodes=10 if smoke else 600))
    for experiment in report.experiments:
        print(f"{experiment.letter}: {experiment.title}: {experiment.evaluation}")
    page = out / "report.html"
    write_report(report, page)
    print(f"open {page} in a browser")


if __name__ == "__main__":
    main()
