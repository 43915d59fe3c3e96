"""``l2g train``: flags are the fields of ``Config``, the work is in ``l2g_meta.training.loop``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from l2g_meta.cli.flags import add_fields, given
from l2g_meta.cli.output import add_output, complain, emit
from l2g_meta.cli.runs import add_trust, describe
from l2g_meta.errors import L2GError
from l2g_meta.evaluation.world import World
from l2g_meta.files.reading import read_text
from l2g_meta.files.tensors import read_info
from l2g_meta.training.config import Config
from l2g_meta.training.presets import PRESETS, preset

INTERRUPTED = "l2g train --resume RUN continues a run to the same bits"
DESCRIPTION = "Trains a model. Without flags: L2G on glyphs, in minutes on a CPU."
EXAMPLES = """\
l2g train --inner-lr 0.003 --mix 0.5                 # the defaults: L2G on glyphs, in minutes on a CPU
l2g train --mix 0 --inner-lr 0.01                    # Algorithm 1 as published
l2g train --data mini-imagenet --root DIR --image-size 32 --out runs/a
l2g train --data folder --root photos --method episodic --head relation
l2g train --resume runs/a                            # go on where it stopped"""

GROUPS = {  # by the field of ``Config`` that each begins with
    "data": "data",
    "backbone": "model",
    "ways": "tasks: T_i takes the inner step, T_j is what it is judged by",
    "method": "objective",
    "batch": "optimisation",
    "eval_every": "validation",
    "precision": "numerics",
    "save_every": "run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_config(parser)
    parser.add_argument("--preset", metavar="NAME", help=f"settings by name, which flags change: {', '.join(PRESETS)}")
    add_output(parser, json="the run's folder, its best validation accuracy and at which update")


def add_config(parser: argparse.ArgumentParser, *, leave_out: Collection[str] = ()) -> None:
    """A flag per field of ``Config``, in groups, and those about a run's folder."""
    parser.usage = "%(prog)s [FLAGS]"  # instead of a list of all
    run = add_fields(parser, Config, GROUPS, leave_out)["run"]
    run.add_argument("--out", type=Path, metavar="RUN", help="its folder (default: runs/DATA-METHOD-HEAD-seedSEED)")
    run.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="continue the run in this folder; without "
                     "one: that in --out if there is one, else begin it")  # fmt: skip
    run.add_argument("--force", action="store_true", help="resume with another config or other data than the run had")
    add_trust(run)


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on with a run."""
    from l2g_meta.data.pairs import listed
    from l2g_meta.training.loop import train

    config, out, resume = _what_to_train(args)
    train(config, out, resume=resume, force=args.force, progress=not args.quiet)
    if not World.here().main:
        return 0
    best = read_info(out / "best.safetensors")
    skipped = read_info(out / "last.safetensors").get("skipped")
    if skipped:
        print(f"{out}: {skipped} of {config.iterations} updates were left out, a number not being finite")
    print(
        f"{out}: {describe(config)}: best validation {best['val_accuracy']:.2f} % ({listed(best['val_ways'])}-way "
        f"{listed(config.outer_shots)}-shot, BatchNorm {config.bn}) at update {best['iteration']}"
    )
    emit(args, {
        "run": str(out),
        "best_val_accuracy": best["val_accuracy"],
        "best_iteration": best["iteration"],
        "iterations": config.iterations,
        "val_ways": best["val_ways"],
        "val_shots": config.outer_shots,
        "bn": config.bn,
        "skipped": skipped or 0,
    })  # fmt: skip
    return 0


def _what_to_train(args: argparse.Namespace) -> tuple[Config, Path, bool]:
    """Config, folder, and whether a run is there to go on with."""
    from l2g_meta.training.build import refuse_modules
    from l2g_meta.training.checkpoints import newest, numbers
    from l2g_meta.training.run_folder import holds_run

    named = isinstance(args.resume, str)
    if args.preset is not None and named:
        raise L2GError("need --preset for a new run, got --resume RUN, which has its settings; leave --preset out")
    if named and args.out is not None:
        raise L2GError("need --resume RUN, or --out RUN --resume; got two folders")
    if args.force and not args.resume:
        raise L2GError("--force belongs to --resume: it lets a run go on with another config")
    if named:
        out = Path(args.resume)
    else:
        config, out = new_run(args)
        if not (args.resume and holds_run(out)):
            return config, out, False
    stored = None
    try:
        stored = Config.load(out / "config.json")
    except L2GError as error:
        if not numbers(out) or _is_json(out / "config.json"):  # a value that somebody changed is not passed over
            raise
        complain(f"{error}; its states have the config, too")
    config = stored or Config.from_json(newest(out)[2]["config"])
    if not args.trust:
        refuse_modules(config, out, named=given(args, Config))
    return replace(config, **given(args, Config)).resolved(), out, True


def new_run(args: argparse.Namespace) -> tuple[Config, Path]:
    """Config and folder of the new run that the arguments describe."""
    config = Config(**preset(args.preset) | given(args, Config)).resolved()
    head = config.head.rpartition(":")[2]
    return config, args.out or Path("runs") / f"{config.data}-{config.method}-{head}-seed{config.seed}"


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(read_text(path)), dict)
    except (OSError, ValueError, RecursionError):
        return False
