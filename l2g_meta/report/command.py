"""The command `l2g report`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from l2g_meta.errors import L2GError
from l2g_meta.norm import POLICIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("run", nargs="+", type=Path, metavar="RUN", help="run directory; those that differ in their seed alone are "
        "shown as one experiment")  # fmt: skip
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    add("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    add("--episodes", type=_positive, default=600, help="of each run (default: 600)")
    add("--ways", type=partial(_at_least, 2), help="classes per episode (default: as trained)")
    add("--shots", type=_positive, help="supports per class (default: as trained)")
    add("--queries", type=_positive, help="queries per class (default: as trained)")
    add("--bn", default="running", choices=POLICIES, help="BatchNorm statistics (default: running)")
    add("--episode-seed", type=partial(_at_least, 0), default=0, help="of the episodes (default: 0)")
    add("--classes", type=_positive, default=10, metavar="N", help="hard classes shown (default: 10)")
    add("--root", help="folder of the data, if it has moved since training")
    add("--device", help="auto, cpu, cuda, … (default: as trained)")


def run(args: argparse.Namespace) -> int:
    """Writes the page; returns 0, or 1 if something of a run could not be read or tested.

    Raises:
        L2GError: if a folder is no run, or the page cannot be written.
    """
    from l2g_meta.report.gather import gather
    from l2g_meta.report.measure import Asked
    from l2g_meta.report.page import write_report

    _check_place(args.out)
    names = ("split", "episodes", "ways", "shots", "queries", "bn", "episode_seed", "classes", "root", "device")
    report = gather(args.run, Asked(**{name: getattr(args, name) for name in names}))
    size = write_report(report, args.out)
    problems = [f"{r.folder.path}: {problem}" for r in report.runs for problem in r.problems]
    for problem in problems:
        print(f"l2g: {problem}", file=sys.stderr)
    print(f"{args.out}: {size / 1000:,.0f} kB, {len(report.runs)} runs; open it in a browser")
    return 1 if problems else 0


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise L2GError(f"need a file to write, -o {path} is a folder; name a file in it, {path / 'report.html'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise L2GError(f"need a folder for the page, cannot make {path.parent}: {error.strerror}") from error


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"need at least {least}, got {value}")
    return value


_positive = partial(_at_least, 1)
