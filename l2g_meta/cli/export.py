"""``l2g export``: a model as one folder to share."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cli.flags import positive
from l2g_meta.cli.output import add_output, emit
from l2g_meta.cli.runs import MODELS, add_model, add_run

INTERRUPTED = "nothing was written; run it again"
DESCRIPTION = (
    "Writes a run's weights, how images are prepared, temperatures fitted on the validation split, and a model card "
    "with results on the test split; or the same of another model, but for what takes its data. Without RUN it is the "
    "model that comes with the package."
)
EXAMPLES = """\
l2g export runs/a model
l2g export runs/a model --root DIR                   # the data has moved since training
l2g export model                                     # the embedded model
l2g export timm:vit_small_patch14_dinov2.lvd142m dino
l2g predict --model model --support known --query photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help=MODELS)
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--half", action="store_true", help="weights as float16, half the size")
    add("--episodes", type=positive, metavar="N", default=600, help="for each number of shots (default: 600)")
    add_run(parser)
    add_model(parser, None)
    add_output(parser, json="what the folder's model.json holds")


def run(args: argparse.Namespace) -> int:
    """Exports."""
    from l2g_meta.classify.exported import export

    values = export(
        args.run, args.out, half=args.half, episodes=args.episodes, root=args.root, checkpoint=args.checkpoint,
        device=args.device, trust=args.trust, weights=args.weights, image_size=args.image_size,
    )  # fmt: skip
    for e in (values["calibration"] or {"shots": []})["shots"]:
        print(
            f"{e['shots']}-shot: test {e['accuracy']:.2f} ± {e['accuracy_ci95']:.2f} %, temperature "
            f"{e['temperature']:.3f}, calibration error {e['ece_before']:.4f} before, {e['ece_after']:.4f} after"
        )
    print(f"{args.out}: written; l2g predict --model {args.out} --support DIR --query DIR")
    emit(args, {"out": str(args.out), **values})
    return 0
