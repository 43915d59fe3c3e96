"""``l2g pretrain``: an encoder with a linear classifier of all training classes, for ``l2g train --weights``."""

from __future__ import annotations

from l2g_meta.cli.output import add_output
from l2g_meta.cli.parser import Commands, new_command
from l2g_meta.cli.train import add_config, run
from l2g_meta.training.checks import NOT_SUPERVISED, SUPERVISED

__all__ = ["INTERRUPTED", "add", "run"]

INTERRUPTED = "l2g pretrain --resume RUN continues a run to the same bits"
EXAMPLES = """\
l2g pretrain --data mini-imagenet --root DIR --augment --out runs/pre
l2g pretrain --backbone resnet12 --backbone-options dropblock=5 drop_rate=0.1 --data mini-imagenet --root DIR
l2g train --weights runs/pre --data mini-imagenet --root DIR     # meta-training begins with its encoder"""


def add(commands: Commands) -> None:
    """Adds the command."""
    pretrain = new_command(
        commands,
        "pretrain",
        "Trains an encoder with a linear classifier of all training classes, as `l2g train --method supervised`, and "
        "chooses the checkpoint by few-shot accuracy of nearest prototypes on validation classes; `l2g train --weights "
        "RUN` begins with its encoder.",
        EXAMPLES,
        usage="%(prog)s [FLAGS]",
    )
    add_config(pretrain, leave_out=NOT_SUPERVISED)
    pretrain.set_defaults(method=SUPERVISED, preset=None)
    add_output(pretrain, json="the run's folder, its best validation accuracy and at which update")
