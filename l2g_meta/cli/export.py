"""``l2g export``: a model as one folder to share."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cli.flags import positive
from l2g_meta.cli.output import add_output, emit
from l2g_meta.cli.runs import MODELS, add_model, add_run

INTERRUPTED = "nothing was written; run it again"
DESCRIPTION = (
    "Writes a run's weights, how images are prepared, temperatures fitted on the validation split, a model card with "
    "results on the test split, and the encoder for torch.export and ONNX; or the same of another model, but for what "
    "takes its data. Without RUN it is the model that comes with the package."
)
EXAMPLES = """\
l2g export runs/a model
l2g export runs/a model --no-onnx --root DIR         # the data has moved since training
l2g export model                                     # the embedded model, for torch.export and ONNX
l2g export timm:vit_small_patch14_dinov2.lvd142m dino
l2g predict --model model --support known --query photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help=MODELS)
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--no-onnx", action="store_true", help="leave ONNX out, which takes l2g-meta[export]")
    add("--half", action="store_true", help="weights as float16, half the size; leaves torch.export and ONNX out")
    add("--episodes", type=positive, metavar="N", default=600, help="for each number of shots (default: 600)")
    add_run(parser)
    add_model(parser, None)
    add_output(parser, json="what the folder's model.json holds")


def run(args: argparse.Namespace) -> int:
    """Exports."""
    from l2g_meta.classify.exported import export

    values = export(
        args.run, args.out, onnx=not args.no_onnx, half=args.half, episodes=args.episodes, root=args.root,
        checkpoint=args.checkpoint, device=args.device, trust=args.trust, weights=args.weights,
        image_size=args.image_size,
    )  # fmt: skip
    for e in (values["calibration"] or {"shots": []})["shots"]:
        print(
            f"{e['shots']}-shot: test {e['accuracy']:.2f} ± {e['accuracy_ci95']:.2f} %, temperature "
            f"{e['temperature']:.3f}, calibration error {e['ece_before']:.4f} before, {e['ece_after']:.4f} after"
        )
    for name, difference in (values["encoder"] or {}).get("largest_difference", {}).items():
        print(f"{name}: read back, embeddings differ by {difference:.1e} at most, relative to the largest")
    print(f"{args.out}: written; l2g predict --model {args.out} --support DIR --query DIR")
    emit(args, {"out": str(args.out), **values})
    return 0
