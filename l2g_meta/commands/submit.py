"""``l2g submit``: a file of `l2g train` commands as jobs."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cluster import EXECUTORS
from l2g_meta.commands.jobs import add_jobs, slurm_options
from l2g_meta.commands.output import add_output, emit
from l2g_meta.commands.parser import Commands, new_command

INTERRUPTED = "jobs that were named are submitted; the same command submits the rest"
EXAMPLES = """\
l2g submit runs.txt --slurm partition=gpu,time=240,gpus_per_node=1
l2g submit runs.txt --to local --parallel 2          # without a cluster
l2g submit runs.txt                                  # again: what has become of them"""


def add(commands: Commands) -> None:
    """Adds the command."""
    submit = new_command(
        commands,
        "submit",
        "Hands the runs of a file, one `l2g train` command per line, over to Slurm. Run again, it says what has become "
        "of them, and submits those that have ended without being finished.",
        EXAMPLES,
    )
    submit.add_argument("file", type=Path, metavar="FILE", help="one `l2g train` command per line")
    submit.add_argument("--to", dest="submit", default="slurm", choices=EXECUTORS, help="default: slurm; local: "
                        "processes in the background")  # fmt: skip
    add_jobs(submit)
    add_output(submit, json="the submitted jobs")


def run(args: argparse.Namespace) -> int:
    """Submits."""
    from l2g_meta.sweep import submit_sweep

    jobs = submit_sweep(args.file, args.submit, options=slurm_options(args), parallel=args.parallel)
    emit(args, [job._asdict() for job in jobs])
    return 0
