"""``l2g bench``: what an exact meta-step costs; flags are the fields of ``Case``."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

from l2g_meta.bench.case import Case
from l2g_meta.cli.output import add_output, emit
from l2g_meta.cli.parser import Commands, new_command
from l2g_meta.cli.types import METAVARS, TYPES, positive
from l2g_meta.training.checks import flag, kinds

INTERRUPTED = "nothing was written; run it again"
EXAMPLES = """\
l2g bench                                            # Conv4 at 84 px, 5-way 1-shot
l2g bench --pairs 5 --variants episodic l2g learn2learn --json bench.json
l2g bench --scaling --image-size 28"""


def add(commands: Commands) -> None:
    """Adds the command."""
    bench = new_command(
        commands,
        "bench",
        "Times one update of L2G, of episodic training and of other libraries in turn, on random images.",
        EXAMPLES,
    )
    case = bench.add_argument_group("what is timed")
    for f in fields(Case):
        if (kind := kinds(Case)[f.name]) is bool:
            case.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
            continue
        case.add_argument(flag(f.name), type=TYPES[kind], metavar=METAVARS[kind], default=f.default,
                          help=f"{f.metadata['help']} (default: {f.default})")  # fmt: skip
    how = bench.add_argument_group("how")
    how.add_argument("--variants", nargs="+", metavar="NAME", help="rows of the table (default: all installed)")
    how.add_argument("--repeats", type=positive, metavar="N", default=5, help="timed steps of each (default: 5)")
    how.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    how.add_argument("--scaling", action="store_true", help="instead of the table: along ways, shots, pairs, image "
                     "size and inner steps")  # fmt: skip
    add_output(bench, json="the results")


def run(args: argparse.Namespace) -> int:
    """Measures."""
    from l2g_meta.bench.comparison import bench, scaling
    from l2g_meta.training.build import build_device

    case = Case(**{f.name: getattr(args, f.name) for f in fields(Case)})
    case = replace(case, device=str(build_device(case.device)))
    options: dict[str, Any] = {"repeats": args.repeats} | ({"variants": args.variants} if args.variants else {})
    emit(args, scaling(case, **options) if args.scaling else bench(case, memory=not args.no_memory, **options))
    return 0
