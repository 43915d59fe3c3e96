"""The arguments of the command `l2g`: a flag per field of ``Config`` and of the bench's ``Case``."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from l2g_meta.bench.case import Case
from l2g_meta.cluster import EXECUTORS
from l2g_meta.config import NOT_SUPERVISED, SUPERVISED, Config, Sizes
from l2g_meta.norm import POLICIES
from l2g_meta.reproduce.paper import COLUMNS, EXPERIMENTS, ROWS
from l2g_meta.reproduce.plan import SCALES


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``l2g``; ``command`` is the name of the command given."""
    from l2g_meta import __version__

    parser = argparse.ArgumentParser(prog="l2g", description="Few-shot learning that generalises to unseen tasks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    train = commands.add_parser(
        "train", help="train a model", description="Trains a model. Without flags: L2G on glyphs, in minutes on a CPU."
    )
    _add_config(train)
    train.add_argument("--replay", type=Path, metavar="RUN", help="run a run's failed update again and show where")

    pretrain = commands.add_parser(
        "pretrain",
        help="train an encoder on the training classes",
        description="Trains an encoder with a linear classifier of all training classes, as `l2g train --method "
        "supervised`, and chooses the checkpoint by few-shot accuracy of nearest prototypes on validation classes; "
        "`l2g train --weights RUN` begins with its encoder.",
    )
    _add_config(pretrain, leave_out=NOT_SUPERVISED)
    pretrain.set_defaults(method=SUPERVISED, replay=None)

    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy on unseen classes",
        description="Evaluates one trained run, or several as trained seeds: only then an interval over runs is given.",
    )
    evaluate.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run directory; several are seeds")
    evaluate.add_argument("--against", nargs="+", type=Path, metavar="RUN", help="also print the paired difference")
    evaluate.add_argument("--split", default="test", choices=("train", "validation", "test"))
    evaluate.add_argument("--ways", type=partial(_natural, least=2), help="classes per episode (default: as trained)")
    evaluate.add_argument("--shots", type=_positive, help="supports per class (default: as trained)")
    evaluate.add_argument("--queries", type=_positive, help="queries per class (default: as trained)")
    evaluate.add_argument("--episodes", type=_positive, default=600, help="per stream (default: 600)")
    evaluate.add_argument("--runs", type=_positive, default=1, help="streams of episodes for each model (default: 1)")
    evaluate.add_argument("--bn", default="running", choices=POLICIES, help="BatchNorm statistics (default: running)")
    evaluate.add_argument("--episode-seed", type=_natural, default=0, help="of the episodes (default: 0)")
    evaluate.add_argument("--checkpoint", default="best", choices=("best", "last"))
    evaluate.add_argument("--root", help="folder of the data, if it has moved since training")
    evaluate.add_argument("--device", help="auto, cpu, cuda, … (default: as trained)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the result, in per cent")

    bench = commands.add_parser(
        "bench",
        help="what an exact meta-step costs",
        description="Times one update of L2G, of episodic training and of other libraries in turn, on random images.",
    )
    for f in fields(Case):
        kind: Any = _positive if f.type == "int" else TYPES[str(f.type)]
        flag = "--" + f.name.replace("_", "-")
        bench.add_argument(flag, type=kind, default=f.default, help=f"{f.metadata['help']} (default: {f.default})")
    bench.add_argument("--variants", nargs="+", metavar="NAME", help="rows of the table (default: all installed)")
    bench.add_argument("--repeats", type=_positive, default=5, help="timed steps of each (default: 5)")
    bench.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    instead = bench.add_mutually_exclusive_group()
    instead.add_argument("--scaling", action="store_true", help="along ways, shots, pairs, image size and inner steps")
    instead.add_argument("--batching", action="store_true", help="the T_i of all pairs at once, against one by one")
    instead.add_argument("--ranks", action="store_true", help="what several processes would take, on paper")
    instead.add_argument("--norms", action="store_true", help="the double backward of each norm, on Conv4's first maps")
    instead.add_argument("--storage", action="store_true", help="an update's tasks from memory maps of mini-ImageNet's "
                         "and of tieredImageNet's size")  # fmt: skip
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the results")

    reproduce = commands.add_parser(
        "reproduce",
        help="the paper's tables and figures, ours beside theirs",
        description="Trains and tests what a table or figure of the paper shows. Run again, it continues; several "
        "machines may share one --out.",
        epilog="scales: " + "; ".join(f"{name}: {scale.title}" for name, scale in SCALES.items()),
    )
    reproduce.add_argument("experiment", choices=tuple(EXPERIMENTS))
    reproduce.add_argument("--scale", default="small", choices=tuple(SCALES), help="default: small")
    reproduce.add_argument("--data-root", metavar="DIR", help="folder that holds the data, as --root of l2g train")
    reproduce.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default: runs/reproduce")
    reproduce.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(ROWS)} (default: the table's)")
    reproduce.add_argument("--columns", nargs="+", metavar="COLUMN", help=f"of {', '.join(COLUMNS)}")
    reproduce.add_argument("--runs", type=_positive, metavar="N", help="trained seeds of each cell")
    reproduce.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: auto)")
    reproduce.add_argument("--submit", choices=EXECUTORS, help="hand the cells over as jobs: to Slurm, or to processes "
                           "in the background; the same command without it prints what there is")  # fmt: skip
    _add_jobs(reproduce)

    submit = commands.add_parser(
        "submit",
        help="many runs on a cluster",
        description="Hands the runs of a file, one `l2g train` command per line, over to Slurm. Run again, it says "
        "what has become of them, and submits those that have ended without being finished.",
    )
    submit.add_argument("file", type=Path, metavar="FILE", help="one `l2g train` command per line")
    submit.add_argument("--to", dest="submit", default="slurm", choices=EXECUTORS, help="default: slurm; local: "
                        "processes in the background")  # fmt: skip
    _add_jobs(submit)
    return parser


def _add_config(command: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """A flag per field of ``Config``, and what a run's folder takes."""
    for f in fields(Config):
        if f.name in leave_out:
            continue
        flag, options = "--" + f.name.replace("_", "-"), dict(f.metadata)
        options["default"] = argparse.SUPPRESS
        if f.default is not None and f.default is not False:
            options["help"] += f" (default: {f.default})"
        if f.type == "bool":
            command.add_argument(flag, action="store_true", **options)
        else:
            command.add_argument(flag, type=TYPES[str(f.type).removesuffix(" | None")], **options)
    command.add_argument("--out", type=Path, help="run directory (default: runs/DATA-METHOD-HEAD-seedSEED)")
    command.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="continue the run in this folder; "
                       "without one: that in --out if there is one, else begin it")  # fmt: skip
    command.add_argument("--force", action="store_true", help="resume with another config than the run had so far")


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--slurm", action="append", metavar="NAME=VALUE,…", help="options of sbatch, for example "
                         "partition=gpu,time=240,gpus_per_node=1; time is in minutes")  # fmt: skip
    command.add_argument("--parallel", type=_positive, metavar="N", help="side by side (default: 1; Slurm: no limit)")


def _natural(text: str, *, least: int = 0) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"need at least {least}, got {value}")
    return value


_positive = partial(_natural, least=1)


def _sizes(text: str) -> Sizes:
    """A number, or several as 1,5,10."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"need a number, or several as 1,5,10; got {text!r}") from error
    return sizes[0] if len(sizes) == 1 else sizes


TYPES: dict[str, Any] = {"int": int, "float": float, "str": str, "Sizes": _sizes, "Names": str}
