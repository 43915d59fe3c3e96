"""The commands of ``l2g``, a file each.

Such a file has ``DESCRIPTION`` and ``EXAMPLES`` for its help, ``add_arguments(parser)``, which ends with
``add_output``, and ``run(args)``, which does the work and returns the exit code. It may have ``INTERRUPTED``: what to
do after Ctrl-C, in words. A new command is one file here and one line below. Files are imported when their command is
used, so that `l2g --help` takes no PyTorch.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

# An empty entry of PYTHONPATH is the current folder, as is ".": a torch.py in a folder of data would run.
if {"", "."}.intersection((os.environ.get("PYTHONPATH") or "none").split(os.pathsep)):
    sys.path[:] = [entry for entry in sys.path if entry not in ("", os.path.realpath("."), os.path.abspath("."))]

COMMANDS = {  # in the order of `l2g --help`, which prints these lines
    "train": "train a model",
    "pretrain": "train an encoder on the training classes, to begin with",
    "evaluate": "accuracy on unseen classes",
    "predict": "classify images of new classes from a few examples",
    "embed": "embeddings of images as one file",
    "export": "a run as one folder to share",
    "report": "a page to look at, of one run or several",
    "bench": "what an exact meta-step costs",
    "reproduce": "the paper's tables, ours beside theirs",
    "doctor": "what is installed here, and whether it works",
}


def command(name: str) -> ModuleType:
    """The file of a command."""
    return importlib.import_module(f"{__name__}.{name}")
