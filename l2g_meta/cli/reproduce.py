"""``l2g reproduce``: the paper's tables, ours beside theirs."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cli.flags import positive
from l2g_meta.cli.output import add_output, emit
from l2g_meta.paper.plan import SCALES
from l2g_meta.paper.published import COLUMNS
from l2g_meta.paper.published import EXPERIMENTS as PAPER
from l2g_meta.paper.study import EXPERIMENTS, ROWS, STUDIES

INTERRUPTED = "the same command continues to the same bits"
DESCRIPTION = (
    "Trains and tests what a table of the paper, or a study of ours, shows. Run again, it continues; several "
    "processes and machines may share one --out."
)
EXAMPLES = """\
l2g reproduce table1 --data-root DIR
l2g reproduce table1 --data-root DIR --rows proto-tasks l2g-proto --columns 5w1s
l2g reproduce table3 --scale smoke                   # that everything runs; its numbers mean nothing"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS), metavar="EXPERIMENT", help=f"a table of the paper: "
                           f"{', '.join(PAPER)}; or a study of ours: {', '.join(STUDIES)}")  # fmt: skip
    add("--scale", default="small", choices=tuple(SCALES), help="how much of the paper's budget "
                           "(default: small)")  # fmt: skip
    add("--data-root", metavar="DIR", help="folder that holds the data, as --root of l2g train")
    add("--out", type=Path, metavar="DIR", default=Path("runs/reproduce"), help="folder of the runs "
                           "and results (default: runs/reproduce)")  # fmt: skip
    add("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(ROWS)} (default: the table's)")
    add("--columns", nargs="+", metavar="COLUMN", help=f"of {', '.join(COLUMNS)}")
    add("--weights", metavar="RUN|FILE", help="initial weights of the encoder, as --weights of l2g train; --scale "
                           "finetune needs them")  # fmt: skip
    add("--runs", type=positive, metavar="N", help="trained seeds of each cell")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, … (default: auto)")
    add_output(parser, json="the files of the results, and what failed")


def run(args: argparse.Namespace) -> int:
    """Trains, tests, and prints the tables."""
    from l2g_meta.paper.cells import run_cells
    from l2g_meta.paper.plan import plan
    from l2g_meta.paper.tables import write_tables

    what = plan(
        args.experiment, args.scale, args.out, root=args.data_root, columns=args.columns, rows=args.rows,
        seeds=args.runs, device=args.device, weights=args.weights,
    )  # fmt: skip
    failed: list[str] = []
    tables = None
    try:
        failed = run_cells(what, quiet=args.quiet)
    finally:  # interrupted, too: what there is
        if any(cell.done for cell in what.cells):
            tables = write_tables(what)
            print(tables.read_text(encoding="utf-8"))
    emit(args, {"tables": tables, "failed": failed})
    return 1 if failed else 0
