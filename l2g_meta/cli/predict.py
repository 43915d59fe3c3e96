"""``l2g predict``: folders in; a table, a CSV file or one JSON document out."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cli.flags import positive
from l2g_meta.cli.output import STDOUT, add_output, emit
from l2g_meta.cli.runs import add_model

INTERRUPTED = "nothing was printed, a file of --csv is as it was; run it again"
DESCRIPTION = (
    "Classifies images from a few examples of each class, DIR/<class>/*.{jpg,jpeg,png}. Prints a row per image, or "
    "writes them. Images that cannot be read are listed and skipped; then the exit code is 1."
)
EXAMPLES = """\
l2g predict --support known --query photos           # known/<class>/*.jpg; with the embedded model
l2g predict --model runs/a --support known --query a.jpg b.jpg
l2g predict --model timm:vit_small_patch14_dinov2.lvd142m --support known --query photos --csv out.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add = parser.add_argument
    add("--support", type=Path, required=True, metavar="DIR", help="a folder of one folder per class")
    add("--query", type=Path, required=True, nargs="+", metavar="DIR|FILE", help="what to classify: "
                         "images, and folders of them at any depth")  # fmt: skip
    add("--csv", type=Path, metavar="FILE", help="write the rows there instead of printing them")
    add_model(parser)
    add_batches(parser)
    add_output(parser, json="all rows and a summary")


def add_batches(parser: argparse.ArgumentParser) -> None:
    """How images are worked through, and where."""
    parser.add_argument("--batch-size", type=positive, metavar="N", default=64, help="images at a time, of "
                        "at most 4 million pixels together (default: 64)")  # fmt: skip
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, … (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Classifies."""
    from l2g_meta.classify.predictions import predict
    from l2g_meta.classify.source import open_source

    source = open_source(args.model, args.device, trust=args.trust, weights=args.weights, image_size=args.image_size)
    return predict(
        source,
        args.support,
        args.query,
        csv_file=args.csv,
        table=args.json != STDOUT,
        emit=None if args.json is None else lambda values: emit(args, {"model": args.model, **values}),
        progress=not args.quiet,
        batch_size=args.batch_size,
    )
