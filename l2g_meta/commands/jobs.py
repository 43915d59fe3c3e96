"""What the commands that hand work to a cluster have in common."""

from __future__ import annotations

import argparse
from typing import Any

from l2g_meta.commands.types import Arguments, positive
from l2g_meta.errors import L2GError


def add_jobs(parser: Arguments) -> None:
    """Options of Slurm, and how many at a time."""
    parser.add_argument("--slurm", action="append", metavar="NAME=VALUE,…", help="options of sbatch, for example "
                        "partition=gpu,time=240,gpus_per_node=1; time is in minutes")  # fmt: skip
    parser.add_argument("--parallel", type=positive, metavar="N", help="side by side (default: 1; Slurm: no limit)")


def slurm_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of ``sbatch``.

    Raises:
        L2GError: if there is nothing to submit to Slurm.
    """
    from l2g_meta.cluster import parsed

    if args.slurm and args.submit != "slurm":
        raise L2GError("--slurm belongs to jobs for Slurm; choose slurm instead, or leave it out")
    return parsed(args.slurm or [])
