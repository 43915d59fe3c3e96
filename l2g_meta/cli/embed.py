"""``l2g embed``: photos in, their embeddings as one file out."""

from __future__ import annotations

import argparse
from pathlib import Path

from l2g_meta.cli.output import add_output, emit
from l2g_meta.cli.predict import add_batches
from l2g_meta.cli.runs import add_model

INTERRUPTED = "nothing was written; run it again"
DESCRIPTION = (
    "Writes the embeddings of images to a safetensors file: features (n, d), and in its header the files and their "
    "folders' names. Images that cannot be read are listed and skipped; then the exit code is 1."
)
EXAMPLES = """\
l2g embed photos features.safetensors                # with the embedded model
l2g embed --model timm:vit_small_patch14_dinov2.lvd142m photos features.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("photos", type=Path, nargs="+", metavar="DIR|FILE", help="images, and folders of them")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, *.safetensors")
    add_model(parser)
    add_batches(parser)
    add_output(parser, json="where the embeddings are, and their number and length")


def run(args: argparse.Namespace) -> int:
    """Embeds."""
    from l2g_meta.classify.photo_folder import embed_files
    from l2g_meta.classify.predictions import photo_reader
    from l2g_meta.classify.source import open_source
    from l2g_meta.files.tensors import make_folder, save_tensors

    make_folder(args.out.parent, "a file to write the embeddings to", "choose another")
    source = open_source(args.model, args.device, trust=args.trust, weights=args.weights, image_size=args.image_size)
    reader = photo_reader(source, args.batch_size)
    files, features = embed_files(source, reader, args.photos, progress=not args.quiet)
    labels = [Path(file).parent.name for file in files]
    save_tensors(args.out, {"features": features}, {"files": files, "labels": labels, "model": args.model})
    print(f"{args.out}: {len(files)} images, {features.shape[1]} numbers each")
    emit(args, {"out": str(args.out), "images": len(files), "length": features.shape[1], "skipped": reader.skipped})
    return 1 if reader.skipped else 0
