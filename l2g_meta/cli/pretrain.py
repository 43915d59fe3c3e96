"""``l2g pretrain``: an encoder with a linear classifier of all training classes, for ``l2g train --weights``."""

from __future__ import annotations

import argparse

from l2g_meta.cli.output import add_output
from l2g_meta.cli.train import add_config, run
from l2g_meta.training.checks import NOT_SUPERVISED, SUPERVISED

__all__ = ["DESCRIPTION", "EXAMPLES", "INTERRUPTED", "add_arguments", "run"]

INTERRUPTED = "l2g pretrain --resume RUN continues a run to the same bits"
DESCRIPTION = (
    "Trains an encoder with a linear classifier of all training classes, as `l2g train --method supervised`, and "
    "chooses the checkpoint by few-shot accuracy of nearest prototypes on validation classes; `l2g train --weights "
    "RUN` begins with its encoder."
)
EXAMPLES = """\
l2g pretrain --data mini-imagenet --root DIR --augment --out runs/pre
l2g pretrain --backbone resnet12 --backbone-options dropblock=5 drop_rate=0.1 --data mini-imagenet --root DIR
l2g train --weights runs/pre --data mini-imagenet --root DIR --inner-lr 0.003 --mix 0.5   # begins with its encoder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_config(parser, leave_out=NOT_SUPERVISED)
    parser.set_defaults(method=SUPERVISED, preset=None)
    add_output(parser, json="the run's folder, its best validation accuracy and at which update")
