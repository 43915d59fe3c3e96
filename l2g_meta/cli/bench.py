"""``l2g bench``: what an exact meta-step costs; flags are the fields of ``Case``."""

from __future__ import annotations

import argparse
from dataclasses import replace

from l2g_meta.bench.case import Case
from l2g_meta.cli.flags import add_fields, given, positive
from l2g_meta.cli.output import add_output, emit

INTERRUPTED = "nothing was written; run it again"
DESCRIPTION = "Times one update of L2G, of episodic training and of other libraries in turn, on random images."
EXAMPLES = """\
l2g bench                                            # Conv4 at 84 px, 5-way 1-shot
l2g bench --pairs 5 --variants episodic l2g learn2learn --json bench.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_fields(parser, Case, {"backbone": "what is timed"})
    add = parser.add_argument_group("how").add_argument
    add("--variants", nargs="+", metavar="NAME", help="rows of the table (default: all installed)")
    add("--repeats", type=positive, metavar="N", default=5, help="timed steps of each (default: 5)")
    add_output(parser, json="the results")


def run(args: argparse.Namespace) -> int:
    """Measures."""
    from l2g_meta.bench.comparison import bench
    from l2g_meta.training.build import build_device

    case = Case(**given(args, Case))
    case = replace(case, device=str(build_device(case.device)))
    emit(args, bench(case, repeats=args.repeats, variants=args.variants))
    return 0
